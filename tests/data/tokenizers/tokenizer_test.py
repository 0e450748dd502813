"""Tokenizers round-trip Unicode, give the ids of the original libraries, are deterministic, and refuse bad input."""
import json
import pathlib
import pickle
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from helpers.byte_level import TEXT, byte_level
from helpers.disks import files_of

from lm.data.tokenizers import folder as tokenizer

DATA = pathlib.Path(__file__).parents[4] / 'shared' / 'data'
NASTY = ['', '▁', '▁▁ ▁', 'a▁b ▁', '\0', 'a\0b', '\t\t', '\r\n', '\n\n  \n', ' ', '  a  ', '<0x41>', '<s>', '</s>',
         '<unk>', '<|mask|>', '<|0|>', '你好，世界', '👩‍👩‍👧 🙂', 'e\u0301 é ﬁ Ａ①', '\ufeffx', '\u2028\x85',
         '\U0010ffff', ' ⁇ ', '▅']


@pytest.fixture(scope='module', params=['bytes', 'bpe', 'unigram', 'byte-level'])
def lossless(request, documents):
  if request.param == 'bytes':
    return tokenizer.Bytes()
  if request.param == 'byte-level':
    return byte_level(documents)
  return tokenizer.train_sentencepiece(documents, 700, request.param)


def check_round_trip(t, text):
  ids = t.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert t.decode(ids) == text
  assert t.byte_lengths()[ids].sum() == len(text.encode())
  assert not set(ids.tolist()) & {t.bos_id, t.eos_id, t.control_id('<|mask|>')}


def test_round_trip_of_nasty_text(lossless):
  for text in [*NASTY, ''.join(NASTY), TEXT]:
    check_round_trip(lossless, text)


@hypothesis.given(st.text(st.characters(exclude_categories=['Cs']) | st.sampled_from('▁ \n\t\0<>x4'), max_size=40))
@hypothesis.settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(lossless, text):
  check_round_trip(lossless, text)


def test_a_batch_has_the_ids_of_its_texts_alone(lossless):
  for ids, text in zip(lossless.encode_batch(NASTY), NASTY, strict=True):
    np.testing.assert_array_equal(ids, lossless.encode(text))
  assert lossless.encode_batch([]) == []


def test_a_tokenizer_is_the_same_saved_loaded_and_pickled(lossless, tmp_path):
  lossless.encode(TEXT)  # fills a cache, which must not change the pickle
  lossless.save(tmp_path)
  for other in (tokenizer.load(tmp_path), pickle.loads(pickle.dumps(lossless))):
    assert other == lossless and other.fingerprint == lossless.fingerprint
    assert (other.bos_id, other.eos_id, other.vocab_size) == (lossless.bos_id, lossless.eos_id, lossless.vocab_size)
    np.testing.assert_array_equal(other.encode(TEXT), lossless.encode(TEXT))


def test_a_save_that_fails_leaves_the_tokenizer_that_was_there(lossless, tmp_path):
  lossless.save(tmp_path)
  with files_of(10), pytest.raises(OSError, match='File too large'):
    lossless.save(tmp_path)
  assert tokenizer.load(tmp_path) == lossless


def test_errors_say_what_to_do(lossless):
  with pytest.raises(ValueError, match=r"'\\udc80' at character 2 .*clean"):
    lossless.encode('ab\udc80')
  with pytest.raises(ValueError, match="'<|no|>'.*<|mask|>"):
    lossless.control_id('<|no|>')
  for bad in (-1, lossless.vocab_size):
    with pytest.raises(ValueError, match=f'id {bad} is outside'):
      lossless.decode([bad])


def test_control_tokens_are_distinct_and_decode_to_nothing(documents):
  for t in (tokenizer.Bytes(), tokenizer.train_sentencepiece(documents, 700)):
    ids = [t.bos_id, t.eos_id, *map(t.control_id, tokenizer.CONTROL)]
    assert len(set(ids)) == len(ids) and t.decode(ids) == '' and not t.byte_lengths()[ids].any()
  assert tokenizer.Bytes(('<|a|>',)).fingerprint != tokenizer.Bytes(('<|b|>',)).fingerprint


def test_half_of_a_character_decodes_to_a_replacement():
  for t in (tokenizer.Bytes(), tokenizer.train_sentencepiece([TEXT], 700)):
    assert t.decode(t.encode('a好')[:-1]) == 'a\N{REPLACEMENT CHARACTER}'


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_training_is_the_same_in_another_process(kind, documents):
  code = ('import sys, json; from lm.data import tokenizers; '
          'print(tokenizers.train_sentencepiece(json.load(sys.stdin), 600, sys.argv[1]).fingerprint)')
  process = subprocess.run([sys.executable, '-c', code, kind], input=json.dumps(documents), capture_output=True,
                           text=True, cwd=pathlib.Path(__file__).parents[3], check=True)
  assert process.stderr == ''  # SentencePiece prints nothing either
  assert process.stdout.strip() == tokenizer.train_sentencepiece(documents, 600, kind).fingerprint


def test_indentation_and_newlines_are_part_of_pieces(documents):
  t = tokenizer.train_sentencepiece(documents, 900)
  assert len(t.encode('        ')) == 1
  assert len(t.encode(TEXT)) < len(TEXT) / 2.5  # SentencePiece's defaults: 2.0 bytes a token at this size
  assert '):\n' in [t.decode([i]) for i in range(t.vocab_size)]


def test_sampling_reads_no_more_than_it_needs():
  class Lazy:
    read = 0

    def __len__(self):
      return 10**6

    def __getitem__(self, i):
      self.read += 1
      return TEXT[i % 1000:][:3000]
  documents = Lazy()
  tokenizer.train_sentencepiece(documents, 500, sample_bytes=60_000)
  assert documents.read == 20


def test_long_lines_are_not_skipped_in_training():
  t = tokenizer.train_sentencepiece(['あいうえおかきく' * 20_000], 320)  # 4000 characters are 12,000 bytes
  assert len(t.encode('あいうえおかきく' * 8)) < 16


@pytest.mark.parametrize('size, documents, message', [
    (100_000, [TEXT], r'--vocab=100000 is more than the text supports: at most \d+'),
    (300, [TEXT], r'--vocab=300 is too small: .* take 3\d\d'), (500, [], 'no text'), (500, [''], 'no text')])
def test_impossible_sizes_of_vocabularies_are_refused(size, documents, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.train_sentencepiece(documents, size)


def test_the_size_that_an_error_names_is_possible():
  with pytest.raises(ValueError) as error:
    tokenizer.train_sentencepiece([TEXT[:5000]], 100_000)
  size = int(str(error.value).split()[-1])
  assert tokenizer.train_sentencepiece([TEXT[:5000]], size).vocab_size == size


def test_missing_and_malformed_files_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='give a .model file'):
    tokenizer.load(tmp_path)
  for name in ('tokenizer.model', 'tokenizer.json'):
    (tmp_path / name).write_text('{}')
    with pytest.raises(ValueError, match=f'{name}: this is no '):
      tokenizer.load(tmp_path / name)
  (tmp_path / 'tokenizer.json').rename(tmp_path / 'other.model')
  with pytest.raises(ValueError, match='other.model, tokenizer.model: give'):
    tokenizer.load(tmp_path)
  (tmp_path / 'vocab.json').write_text('{}')
  with pytest.raises(ValueError, match='vocab.json: .*merges.txt go together'):
    tokenizer.load(tmp_path)
  (tmp_path / 'merges.txt').write_text('')
  with pytest.raises(ValueError, match='lacks 256 of 256 bytes'):
    tokenizer.load(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "CLIPTokenizer"}')
  with pytest.raises(ValueError, match='CLIPTokenizer .*save its tokenizer.json'):
    tokenizer.load(tmp_path)
  for text, message in (('{', 'cannot be read as JSON'), ('[]', 'holds no JSON object')):
    (tmp_path / 'tokenizer_config.json').write_text(text)
    with pytest.raises(ValueError, match=f'tokenizer_config.json {message}'):
      tokenizer.load(tmp_path)


@pytest.mark.skipif(not DATA.exists(), reason='no shared data')
def test_sentencepiece_models_as_published():
  golden = json.loads((DATA / 'sentencepiece/golden_encode.json').read_text())['models']
  for name, expected in golden.items():
    t = tokenizer.load(DATA / 'sentencepiece' / name)
    assert t.vocab_size == expected['vocab_size']
    if expected['eos'] >= 0:
      assert (t.bos_id, t.eos_id) == (expected['bos'] if expected['bos'] >= 0 else expected['eos'], expected['eos'])
    for case in expected['cases']:
      assert t.encode(case['text']).tolist() == case['ids'], name
      assert t.decode(case['ids']) == case['decoded'], name
  albert = tokenizer.load(DATA / 'sentencepiece/hf_albert_spiece.model')
  assert (albert.bos_id, albert.eos_id) == (albert.control_id('[CLS]'), albert.control_id('[SEP]'))


@pytest.mark.skipif(not DATA.exists(), reason='no shared data')
def test_gpt2_ids_as_published(tmp_path):
  pytest.importorskip('tokenizers')
  for name, copy in (('encoder.json', 'vocab.json'), ('vocab.bpe', 'merges.txt')):
    (tmp_path / copy).write_bytes((DATA / 'gpt2_bpe' / name).read_bytes())
  gpt2 = tokenizer.load(tmp_path)
  assert gpt2 == tokenizer.load(tmp_path / 'merges.txt')
  assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id) == (50257, 50256, 50256)
  for case in json.loads((DATA / 'gpt2_bpe/golden_encode.json').read_text())['cases']:
    assert gpt2.encode(case['text']).tolist() == case['ids']
    assert gpt2.decode(case['ids']) == case['text']
    assert gpt2.byte_lengths()[case['ids']].sum() == len(case['text'].encode())
  assert gpt2.decode([50256]) == '' and gpt2.byte_lengths()[50256] == 0


def test_parsing_finds_control_tokens_and_where_each_token_lies(lossless):
  for text in [*NASTY, '<|mask|>', 'a<|mask|><|mask|> 你好\n<|mask|']:
    ids, spans = lossless.parse(text)
    assert ids.dtype == np.int32 and spans.shape == (len(ids), 2)
    parts = text.split('<|mask|>')
    assert (ids == lossless.control_id('<|mask|>')).sum() == len(parts) - 1
    if not any(name in text for name in lossless.control_names):
      np.testing.assert_array_equal(ids, lossless.encode(text))
    assert sorted(np.unique([i for start, end in spans for i in range(start, end)])) == list(range(len(text)))
    names = {lossless.control_id(name): name for name in lossless.control_names}
    for i, (start, end) in zip(ids.tolist(), spans):
      spelled = lossless.decode([i]) or names[i]
      assert spelled == text[start:end] or '\N{REPLACEMENT CHARACTER}' in spelled


@pytest.mark.skipif(not DATA.exists(), reason='no shared data')
def test_parsing_gives_spans_in_text_that_is_normalised():
  t5 = tokenizer.load(DATA / 'sentencepiece/t5_tokenizer_base.model')
  ids, spans = t5.parse('one  two</s>Ａ')
  assert ids.tolist() == [*t5.encode('one  two'), t5.eos_id, *t5.encode('Ａ')]
  assert [(int(start), int(end)) for start, end in spans] == [(0, 3), (3, 8), (8, 12), (12, 13)]
  assert t5.parse('')[1].shape == (0, 2)
