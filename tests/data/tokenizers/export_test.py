"""transformers opens exported tokenizers and gives the same ids for any text, and the text back."""
import json
import pathlib
import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lm.data.tokenizers import export, protobuf
from lm.data.tokenizers import folder as tokenizer

DATA = pathlib.Path(__file__).parents[4] / 'shared' / 'data'
TEXT = ''.join(pathlib.Path(json.__file__).with_name(name).read_text() for name in ('decoder.py', 'encoder.py'))
DOCUMENTS = [TEXT[i:i + 3000] for i in range(0, len(TEXT), 3000)]
NASTY = ['', '▁', '▁▁ ▁', 'a▁b ▁', '\0', 'a\0b', '\t\t', '\r\n', ' ', '  a  ' + ' ' * 99, '<0x41>', '<0x0A><s>',
         '</s>', '<unk>', '<|mask|>', '你好，世界', '👩‍👩‍👧 🙂', 'e\u0301 ﬁ Ａ①', '\ufeffx', '\u2028\x85',
         '\U0010ffff', ' ⁇ ', 'aĠb']
ANY = st.characters(exclude_categories=['Cs']) | st.sampled_from('▁ \n\t\0<>x4Ġ') | st.sampled_from(
    ['<s>', '<0x41>', '<|mask|>', '    ', 'self', '你好', '"' * 3])


def train(kind):
  return tokenizer.Bytes() if kind == 'bytes' else tokenizer.train_sentencepiece(DOCUMENTS, 700, kind)


def opened(folder):
  return pytest.importorskip('transformers').AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope='module', params=['bytes', 'bpe', 'unigram'])
def both(request, tmp_path_factory):
  pytest.importorskip('transformers')
  ours, folder = train(request.param), tmp_path_factory.mktemp('exported')
  export.export(ours, folder)
  return ours, opened(folder), folder


def check_same(both, text):
  ours, theirs, _ = both
  ids = ours.encode(text).tolist()
  assert theirs(text).input_ids == [ours.bos_id, *ids]
  assert theirs(text, add_special_tokens=False).input_ids == ids
  assert theirs.decode(ids) == text


def test_nasty_text_has_the_same_ids(both):
  for text in [*NASTY, ''.join(NASTY), TEXT]:
    check_same(both, text)


@hypothesis.given(st.lists(ANY, max_size=40).map(''.join))
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_text_has_the_same_ids(both, text):
  check_same(both, text)


def test_text_made_of_few_pieces_has_the_same_ids(both):
  """Such texts can be split in several equally good ways: runs of one piece, and pieces of pieces."""
  ours, rng = both[0], random.Random(0)
  pieces = [piece for i in range(ours.vocab_size) if (piece := ours.decode([i])).isprintable() and piece]
  for _ in range(1500):
    few = rng.choices(pieces, k=rng.randint(1, 3)) + rng.choices([' ', '\n', '_', '"'], k=2)
    check_same(both, ''.join(rng.choices(few, k=rng.randint(1, 60))))


def test_separators_and_the_file_itself_are_kept(both):
  ours, theirs, folder = both
  assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (ours.vocab_size, ours.bos_id, ours.eos_id)
  again = tokenizer.load(folder)
  assert again.adds_bos and ours.adds_bos
  assert (again.bos_id, again.eos_id, again.control_names) == (ours.bos_id, ours.eos_id, ours.control_names)
  np.testing.assert_array_equal(again.byte_lengths()[again.encode(TEXT)], ours.byte_lengths()[ours.encode(TEXT)])
  export.export(again, folder / 'again')
  assert (folder / 'again/tokenizer.json').read_bytes() == (folder / 'tokenizer.json').read_bytes()


def test_with_a_chat_template_control_tokens_are_parsed_as_ours_are(tmp_path):
  ours = train('bpe')
  export.export(ours, tmp_path, '{{ messages[0].content }}\n')
  theirs, text = opened(tmp_path), '<|user|> hi <|end|><s> <unk> <0x41>'
  assert theirs.chat_template == '{{ messages[0].content }}\n'
  ids = theirs(text, add_special_tokens=False).input_ids
  assert ids == ours.parse(text)[0].tolist() != ours.encode(text).tolist()


def test_unigram_scores_add_up_exactly():
  model = train('unigram').model
  scores = np.array([piece.score for piece in protobuf.pieces(model) if piece.type == protobuf.NORMAL])
  assert not (scores * protobuf.EXACT % 1).any() and len(set(scores)) > 20


def test_models_that_cannot_be_exported_are_refused(tmp_path):
  ours = train('unigram')
  third = protobuf.pieces(ours.model)[-1]
  place = third.score_place
  inexact = ours.model[:place] + np.float32(third.score + 0.01).tobytes() + ours.model[place + 4:]
  with pytest.raises(ValueError, match='no multiples of 1/16'):
    export.export(tokenizer.SentencePiece(inexact, '<s>', '</s>'), tmp_path)
  with pytest.raises(ValueError, match='object has no form'):
    export.export(object(), tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not DATA.exists(), reason='no shared data')
def test_models_that_change_text_are_refused(tmp_path):
  with pytest.raises(ValueError, match='changes text'):
    export.export(tokenizer.load(DATA / 'sentencepiece/t5_tokenizer_base.model'), tmp_path)


def gpt2_folder(folder):
  tokenizers = pytest.importorskip('tokenizers')
  t = tokenizers.ByteLevelBPETokenizer()
  t.train_from_iterator(DOCUMENTS, 600, special_tokens=['<|endoftext|>'], show_progress=False)
  t.save_model(str(folder))
  return folder


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
  transformers = pytest.importorskip('transformers')
  folder = gpt2_folder(tmp_path_factory.mktemp('gpt2'))
  config = {'tokenizer_class': 'GPT2Tokenizer', 'pad_token': '<|pad|>', 'eos_token': '<|end|>'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return tokenizer.load(folder), transformers.GPT2Tokenizer.from_pretrained(folder)


@hypothesis.given(st.lists(ANY, max_size=40).map(''.join))
@hypothesis.settings(max_examples=200, deadline=None)
def test_gpt2_files_have_the_ids_that_transformers_finds(gpt2, text):
  ours, theirs = gpt2
  assert ours.encode(text).tolist() == theirs(text, split_special_tokens=True).input_ids
  parsed = text + '<|endoftext|>' + text
  assert ours.parse(parsed)[0].tolist() == theirs(parsed).input_ids
  assert ours.decode(ours.encode(text)) == text


def test_gpt2_files_have_the_separators_that_transformers_finds(gpt2):
  ours, theirs = gpt2
  assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (len(theirs), theirs.bos_token_id, theirs.eos_token_id)
  assert ours.control_id('<|pad|>') == theirs.pad_token_id
