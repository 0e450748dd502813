"""Bits per byte count the UTF-8 bytes of the text itself, for any tokenizer."""
import dataclasses
import json
import pathlib
import tempfile
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import score
from helpers.tokenizers import byte_level, piece_model

from lm import sharding
from lm.data import dataset, store
from lm.data.encoding import TextEncoder
from lm.data.text import corpora
from lm.data.text.source import Source
from lm.data.tokenizers import folder as tokenizer
from lm.data.tokenizers.huggingface import HuggingFace
from lm.evaluate import text_scores
from lm.hf import pretrained
from lm.models import transformer
from lm.objectives.diffusion import masked_diffusion
from lm.objectives.infill import infill
from lm.objectives.masked import masked
from lm.objectives.next_token import next_token
from lm.objectives.prefix import prefix
from lm.objectives.span_corruption import span_corruption
from lm.train import validation
from lm.workdir import integrity

tokenizers = pytest.importorskip('tokenizers')


def lower_case():
  """A tokenizer of word pieces for normalised text, without tokens for spaces."""
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
def test_bytes_that_are_not_scored_are_not_counted(text, counted):
  model = transformer.llama(260, 32, 1, 2, max_length=64)
  params = jax.jit(model.init)(jax.random.key(0))
  loaded = pretrained.Pretrained(model, params, KINDS['byte-level'](), None)
  for bos, size in ((False, counted), (True, len(text.encode()))):
    scores, = text_scores.scored(loaded, [text], None, bos)
    assert scores.size == size


def test_a_space_in_front_of_a_document_has_no_bytes(tmp_path):
  """A uniform model costs log2(V) bits per token, ends included, divided by the bytes of the documents."""
  texts = ['anna', 'bert carl', 'dora', 'carl'] * 4
  (tmp_path / 'a.txt').write_text('\n\n'.join(texts))
  data = dataset.Text(corpora.text(str(tmp_path / 'a.txt'), 0., '\n\n'), KINDS['prefix'](), 16,
                      rules=()).open(tmp_path / 'run', progress=lambda line: None)
  t = data.tokenizer
  tokens = sum(len(t.encode(text)) + 1 for text in texts)
  head = jax.tree_util.Partial(lambda x: x @ jax.numpy.zeros((1, t.vocab_size)))
  apply = lambda params, batch, **_: types.SimpleNamespace(
      hidden=jax.numpy.zeros((*batch.tokens.shape, 1)) + params, head=head)
  with jax.set_mesh(mesh := sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    step = validation.make_step(apply, next_token(), t)
    metrics = validation.evaluate(step, np.float32(0), data.batches('train', next_token(), 2, repeat=False), mesh)
  expected = tokens * np.log2(t.vocab_size) / sum(len(text.encode()) for text in texts)
  assert metrics['bits_per_byte'] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('lines, bos, message', [
    (['', ''], None, 'none of 2 texts has anything to score under --key=text'),
    (['ab', '', ''], None, '2 of 3 texts are left out, as they are empty; the first is .*a.jsonl:2; .*--allow'),
    (['a'], False, 'each text has one token, and no bos before it')])
def test_nothing_to_score_is_refused(lines, bos, message, tmp_path):
  model = transformer.llama(258, 32, 1, 2, max_length=64)
  t = byte_level(['<s>', '</s>'])
  params = jax.jit(model.init)(jax.random.key(0))
  pretrained.write(tmp_path / 'model', model, params, HuggingFace(t.to_str(), '<s>', '</s>'))
  (tmp_path / 'a.jsonl').write_text(''.join(f'{{"text": "{line}"}}\n' for line in lines))
  with pytest.raises(ValueError, match=message):
    score.score(model=str(tmp_path / 'model'), jsonl=str(tmp_path / 'a.jsonl'), bos=bos)


def without_loss(objective):
  """Returns the objective with a loss of zero, so that only its counts matter."""
  zero, one = np.float32(0), np.float32(1)
  return dataclasses.replace(objective, loss=lambda apply, params, batch, key: (
      zero, one, {'nll': one, 'tokens': one, 'correct': zero}))


def opened(texts, folder, t, length, source_length=None):
  """Returns opened data in which each text is a document, unchanged."""
  source = Source('texts', {'train': texts}, repr(texts))
  stores = store.build(folder, source, TextEncoder(t), (), progress=lambda line: None)
  return dataset.OpenText(stores, t, length, source_length)


@pytest.fixture(scope='module', params=['next_token', 'prefix', 'masked', 'diffusion'])
def in_place(request, kind):
  """Returns an objective that weights every token of a document, and its evaluation step."""
  control = kind.control_names[-1]   # any control token: no model reads it
  objective = without_loss({
      'next_token': next_token, 'prefix': lambda: prefix(lambda n, rng: 1), 'masked': lambda: masked(1., control),
      'diffusion': lambda: masked_diffusion(mask=control)}[request.param]())
  return objective, validation.make_step(None, objective, kind)


@hypothesis.given(st.lists(st.text(st.sampled_from('anberT é好😀①\n'), min_size=1, max_size=12), min_size=1, max_size=4,
                           unique=True), st.integers(0, 1))
@hypothesis.settings(max_examples=6, deadline=None)
def test_bytes_of_targets_add_up_to_the_documents(kind, in_place, texts, part):
  objective, step = in_place
  hypothesis.assume(any(len(kind.encode(text)) for text in texts))
  size = sum(len(text.encode()) for text in texts if len(kind.encode(text)))
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    data = opened(texts, pathlib.Path(folder), kind, 5)   # so that rows cut the documents
    batches = data.batches('train', objective, 2, repeat=False).with_bytes()
    assert sum(int(step(None, batches(i))['bytes']) for i in range(batches.steps_per_epoch)) == size


@pytest.mark.parametrize('objective, source_length', [
    (span_corruption(sentinels=('</s>',)), 16), (infill(1., names=('<s>', '</s>', '</s>')), None)],
    ids=['span corruption', 'infill'])
@pytest.mark.parametrize('name', ['prefix', 'bytes'])
def test_bits_per_byte_are_omitted_if_the_bytes_of_targets_are_unknown(objective, source_length, name, tmp_path):
  """For 'a', span corruption predicts '<0>', '▁a': a space that the text lacks, after another token than bos."""
  t = KINDS[name]()
  with jax.set_mesh(mesh := sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    data = opened(['a', 'anna'], tmp_path, t, 16, source_length)
    objective = without_loss(objective)
    metrics = validation.evaluate(validation.make_step(None, objective, t), None,
                                data.batches('train', objective, 2, repeat=False), mesh)
  assert ('bits_per_byte' in metrics) == t.lossless == (name == 'bytes') and 'perplexity' in metrics


def test_a_store_without_numbers_of_bytes_says_so(tmp_path):
  source, lines = Source('texts', {'train': ['anna'], 'validation': ['bert']}, 'x'), []
  data = dataset.Text(source, KINDS['prefix'](), 16, rules=())
  data.open(tmp_path, progress=lines.append)
  assert not any('no bits per byte' in line for line in lines)
  path = tmp_path / 'data' / 'tokens' / 'manifest.json'
  manifest, _ = integrity.parse_json_with_checksum(path.read_text())
  for counts in manifest['splits'].values():
    del counts['sizes']
  path.write_text(json.dumps(manifest))
  batches = data.open(tmp_path, progress=lines.append).batches('train', next_token(), 1, repeat=False)
  assert 'no bits per byte' in lines[-1] and batches.with_bytes() is batches


@pytest.mark.parametrize('name', KINDS)
def test_bytes_and_byte_level_tokenizers_alone_are_lossless(name):
  assert KINDS[name]().lossless == (name in ('bytes', 'byte-level'))
