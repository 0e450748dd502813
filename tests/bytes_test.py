"""Bits a byte are over the text's own UTF-8, whatever a tokenizer makes of it."""
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import score
from bos_test import byte_level, piece_model

from lm import evaluate, pretrained, sharding
from lm.data import corpora, dataset, tokenizer
from lm.data.huggingface import HuggingFace
from lm.models import transformer
from lm.objectives.next_token import next_token

tokenizers = pytest.importorskip('tokenizers')


def lower_case():
  """Word pieces, of a text that is normalised; with no tokens for spaces."""
  names = {name: i for i, name in enumerate(['[UNK]', '[CLS]', '[SEP]', *'abmnrt', *(f'##{c}' for c in 'abmnrt')])}
  t = tokenizers.Tokenizer(tokenizers.models.WordPiece(names, unk_token='[UNK]'))
  t.normalizer, t.pre_tokenizer = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.BertPreTokenizer()
  t.add_special_tokens(['[UNK]', '[CLS]', '[SEP]'])
  return HuggingFace(t.to_str(), '[CLS]', '[SEP]')


KINDS = {'bytes': tokenizer.Bytes, 'word pieces': lower_case,
         'byte-level': lambda: HuggingFace(byte_level(['<s>', '</s>']).to_str(), '<s>', '</s>'),
         'prefix': lambda: tokenizer.SentencePiece(piece_model(), '<s>', '</s>'),
         'prefix of json': lambda: HuggingFace(prefix_json().to_str(), '<s>', '</s>')}


def prefix_json():
  names = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', *'anb']
  t = tokenizers.Tokenizer(tokenizers.models.BPE({n: i for i, n in enumerate(names)}, [], byte_fallback=True))
  t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  t.add_special_tokens(['<unk>', '<s>', '</s>'])
  return t


@pytest.fixture(scope='module', params=KINDS)
def kind(request):
  return KINDS[request.param]()


@hypothesis.given(st.text(st.sampled_from('anberT é好😀 \n'), min_size=1, max_size=8))
@hypothesis.settings(max_examples=60, deadline=None)
def test_sizes_add_up_to_the_text(kind, text):
  ids = kind.encode(text)
  sizes = kind.sizes(text, ids)
  assert len(sizes) == len(ids) and (sizes >= 0).all() and sizes.sum() == (len(text.encode()) if len(ids) else 0)


@pytest.mark.parametrize('name, text, sizes', [
    ('bytes', 'é', [1, 1]), ('byte-level', 'é', [1, 1]), ('byte-level', 'мb', [1, 1, 1]), ('prefix', 'anna', [4]),
    ('prefix of json', 'an', [0, 1, 1]), ('prefix of json', 'éa', [0, 1, 1, 1]), ('word pieces', 'aN b', [1, 1, 2])])
def test_sizes_by_hand(name, text, sizes):
  t = KINDS[name]()
  assert t.sizes(text, t.encode(text)).tolist() == sizes


@pytest.mark.parametrize('text, counted', [('é', 1), ('мир', 5), ('😀 hi', 6)])
def test_what_is_not_scored_is_not_counted(text, counted):
  model = transformer.llama(260, 32, 1, 2, max_length=64)
  params = jax.jit(model.init)(jax.random.key(0))
  loaded = pretrained.Pretrained(model, params, KINDS['byte-level'](), None)
  for bos, size in ((False, counted), (True, len(text.encode()))):
    found, = score.scored(loaded, [text], None, bos)
    assert found.size == size


def test_a_space_in_front_of_a_document_has_no_bytes(tmp_path):
  """A uniform model costs log2(V) bits a token, ends included, over the bytes of the documents."""
  texts = ['anna', 'bert carl', 'dora', 'carl'] * 4
  (tmp_path / 'a.txt').write_text('\n\n'.join(texts))
  data = dataset.Text(corpora.text(str(tmp_path / 'a.txt'), 0., '\n\n'), KINDS['prefix'](), 16,
                      rules=()).open(tmp_path / 'run', progress=lambda line: None)
  t = data.tokenizer
  tokens = sum(len(t.encode(text)) + 1 for text in texts)
  head = jax.tree_util.Partial(lambda x: x @ jax.numpy.zeros((1, t.vocab_size)))
  apply = lambda params, batch, **_: types.SimpleNamespace(
      hidden=jax.numpy.zeros((*batch.tokens.shape, 1)) + params, head=head)
  with jax.set_mesh(mesh := sharding.make_mesh('1x1', jax.devices()[:1])):
    step = evaluate.make_step(apply, next_token(), t)
    found = evaluate.evaluate(step, np.float32(0), data.batches('train', next_token(), 2, repeat=False), mesh)
  expected = tokens * np.log2(t.vocab_size) / sum(len(text.encode()) for text in texts)
  assert found['bits_per_byte'] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('lines, bos, message', [
    (['a', '', 'b'], None, 'text 2 of 3 is empty'), (['a'], False, 'each text has one token, and no bos before it')])
def test_nothing_to_score_is_refused(lines, bos, message, tmp_path):
  model = transformer.llama(258, 32, 1, 2, max_length=64)
  t = byte_level(['<s>', '</s>'])
  params = jax.jit(model.init)(jax.random.key(0))
  pretrained.write(tmp_path / 'model', model, params, HuggingFace(t.to_str(), '<s>', '</s>'))
  (tmp_path / 'a.jsonl').write_text(''.join(f'{{"text": "{line}"}}\n' for line in lines))
  with pytest.raises(ValueError, match=message):
    score.score(model=str(tmp_path / 'model'), jsonl=str(tmp_path / 'a.jsonl'), bos=bos)
