"""No text becomes a control token, or the byte that it names, in any kind of tokenizer."""
import io

import numpy as np
import pytest

from lm.data.chat import templates
from lm.data.tokenizers import folder as tokenizer
from lm.data.tokenizers.huggingface import HuggingFace

tokenizers = pytest.importorskip('tokenizers')
models, decoders, pre = tokenizers.models, tokenizers.decoders, tokenizers.pre_tokenizers
CONTROL = ['<unk>', '<s>', '</s>']
BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
LETTERS = ['▁', *'abcdirsu<>/|_0x41']
PLAIN = 'a bad cab, <x> 41 is a </sub> é <0x4> |user| 好'
SPELLED = ['</s>', 'a </s> b', '<s>', 'a<s>b', '<0x41>', 'a <0x41>b', '<|user|>', 'a<|user|> b', '</s>' * 2]


def vocabulary(*further):
  return {name: i for i, name in enumerate([*CONTROL, *BYTES, *LETTERS, *further])}


def fallback():
  return decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])


def unigram():
  t = tokenizers.Tokenizer(models.Unigram(
      [(name, -9. if name in BYTES else -3.) for name in vocabulary()], unk_id=0, byte_fallback=True))
  t.normalizer, t.decoder = tokenizers.normalizers.Replace(' ', '▁'), fallback()
  return t


def bpe(ignore_merges):
  """A tokenizer whose merges build control tokens and '<0x41>' from letters, or which looks for whole words."""
  merges = [('<', '/'), ('</', 's'), ('</s', '>'), ('<', '0'), ('<0', 'x'), ('<0x', '4'), ('<0x4', '1'),
            ('<0x41', '>'), ('<', 's'), ('<s', '>')]
  names = vocabulary('</', '</s', '<0', '<0x', '<0x4', '<0x41', '<s')
  t = tokenizers.Tokenizer(models.BPE(names, merges, unk_token='<unk>', byte_fallback=True,
                                      ignore_merges=ignore_merges))
  t.normalizer, t.decoder = tokenizers.normalizers.Replace(' ', '▁'), fallback()
  return t


def byte_level():
  t = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))}, []))
  t.pre_tokenizer, t.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  return t


def words(kind):
  names = {name: i for i, name in enumerate([*CONTROL, *'ab<>', 'cab', 'bad'])}
  t = tokenizers.Tokenizer(kind(names, unk_token='<unk>'))
  t.pre_tokenizer = pre.WhitespaceSplit()
  return t


def open_json(make, *args):
  t = make(*args)
  t.add_special_tokens(CONTROL)
  t.add_tokens([tokenizers.AddedToken('<|user|>', special=False, normalized=False)])
  return HuggingFace(t.to_str(), '<s>', '</s>')


def sentencepiece():
  import sentencepiece as module
  model = io.BytesIO()
  module.SentencePieceTrainer.train(
      sentence_iterator=iter([PLAIN] * 9), model_writer=model, vocab_size=320, model_type='bpe', byte_fallback=True,
      minloglevel=2, hard_vocab_limit=False, user_defined_symbols=['<|user|>', 'cab'], add_dummy_prefix=False,
      normalization_rule_name='identity', remove_extra_whitespaces=False)
  return tokenizer.SentencePiece(model.getvalue(), '<s>', '</s>')


KINDS = {'unigram': lambda: open_json(unigram), 'bpe': lambda: open_json(bpe, False),
         'bpe of whole words': lambda: open_json(bpe, True), 'byte-level': lambda: open_json(byte_level),
         'sentencepiece': sentencepiece, 'words': lambda: open_json(words, models.WordLevel),
         'word pieces': lambda: open_json(words, models.WordPiece)}


@pytest.fixture(scope='module', params=KINDS)
def any_kind(request):
  return KINDS[request.param](), request.param.startswith('word')


@pytest.mark.parametrize('text', SPELLED)
def test_text_that_spells_a_control_token_is_text(any_kind, text):
  t, unknown = any_kind
  control = {t.control_id(name) for name in ('<s>', '</s>', '<|user|>')}
  ids = t.encode(text).tolist()
  assert ids and not control & {*ids, *(i for other in t.encode_batch([text, 'a']) for i in other.tolist())}
  if not unknown:   # word tokenizers know few words
    assert t.decode(ids) == text
    assert b''.join(t._table[i] for i in ids) == text.encode()


def test_text_that_spells_none_has_the_ids_of_the_library(any_kind):
  t, _ = any_kind
  if isinstance(t, HuggingFace):
    expected = tokenizers.Tokenizer.from_str(t.model).encode(PLAIN, add_special_tokens=False).ids
  else:
    import sentencepiece as module
    expected = module.SentencePieceProcessor(model_proto=t.model).encode(PLAIN)
  assert t.encode(PLAIN).tolist() == expected


def test_parsing_reads_control_tokens_where_that_is_wanted(any_kind):
  t, _ = any_kind
  ids, spans = t.parse('a</s><|user|>b')
  assert [t.control_id('</s>'), t.control_id('<|user|>')] == ids[1:3].tolist() and t.decode(ids[1:3]) == ''
  assert spans.tolist()[1:3] == [[1, 5], [5, 13]]


def test_a_message_that_spells_a_mark_is_text(any_kind):
  pytest.importorskip('jinja2')
  t, unknown = any_kind
  template = templates.JinjaTemplate("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}")
  for text in SPELLED:
    ids = template.encode(t, [{'role': 'user', 'content': text}])[0].tolist()
    assert ids[0] == t.control_id('<|user|>')
    assert not {t.control_id(name) for name in ('<s>', '</s>', '<|user|>')} & {*ids[1:]}
    assert unknown or t.decode(ids) == text




def test_a_vocabulary_with_the_word_is_not_byte_level():
  t = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(['<s>', '</s>', '▁', 'é', 'ByteLevel'])}, []))
  t.pre_tokenizer, t.decoder = pre.Metaspace(), decoders.Metaspace()
  t.add_special_tokens(['<s>', '</s>'])
  np.testing.assert_array_equal(HuggingFace(t.to_str(), '<s>', '</s>').byte_lengths()[2:], [1, 2, 9])
