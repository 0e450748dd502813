"""Training, generation and scoring need no members of models, data and tokenizers but those that the protocols name.

Every fake below has exactly those members, and fails at any other name.
"""
import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import generate, optim, sharding, train
from lm.data import batch, batches, dataset, tokenizers
from lm.data.text import mixture, source
from lm.evaluate import continuations, score
from lm.launch import outcome
from lm.models import layers
from lm.models.context import Aux
from lm.objectives.next_token import next_token
from lm.objectives.objective import Objective
from lm.train import interfaces
from lm.workdir import checkpoint

WIDTH, BOS, EOS, VOCAB = 8, 256, 257, 258
TEXTS = {'train': [f'{i} and {i + 1}' for i in range(12)], 'validation': ['one two', 'three', 'four of them']}


class Exact:
  def __getattr__(self, name: str) -> Any:
    if name.startswith('__'):   # names that Python and NumPy look up
      raise AttributeError(name)
    pytest.fail(f'{type(self).__name__} has no {name!r} in its protocol')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
  weight_VD: jax.Array

  def __call__(self, hidden_BTD):
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, self.weight_VD, out_sharding=sharding.spec('BTV'))


class Outputs(Exact):
  def __init__(self, hidden, head, cache):
    self.hidden, self.head, self.cache, self.aux = hidden, head, cache, Aux()


@dataclasses.dataclass(frozen=True)
class Model(Exact):
  """The logits depend on the sum of the embeddings of this token and of the one before; the cache is the latter."""
  causal, reads_source, vocab, max_length, depths, original_context = True, False, VOCAB, 32, 0, None

  def init(self, key):
    return {name: sharding.constrain(jax.random.normal(key, (VOCAB, WIDTH)), 'VD')
            for name, key in zip(('embedding', 'head'), jax.random.split(key))}

  def apply(self, params, batch, *, key=None, cache=None):
    embedding, head = (sharding.gather(params[name], 'VD') for name in ('embedding', 'head'))
    x = layers.lookup(embedding, sharding.constrain(batch.tokens, 'BT'))
    first = jnp.zeros_like(x[:, :1]) if cache is None else cache
    before = jnp.concatenate([first, x[:, :-1]], axis=1)
    positions = jnp.arange(x.shape[1])[None] if batch.positions is None else batch.positions
    return Outputs(x + jnp.where(positions[..., None] > 0, before, 0), Head(head), x[:, -1:])

  def prompt(self, texts, rows, bos, eos, adds_bos=True):
    texts = [[bos, *ids] if adds_bos else list(ids) for ids in texts]
    width = max(map(len, texts))
    tokens, positions, segments = np.zeros((3, rows, width), np.int32)
    for row, ids in enumerate(texts):
      tokens[row, width - len(ids):], positions[row, width - len(ids):] = ids, range(len(ids))
      segments[row, width - len(ids):] = 1
    return batch.Batch(tokens, positions=positions, segments=segments)

  def init_cache(self, batch_size, slots):
    return sharding.constrain(jnp.zeros((batch_size, 1, WIDTH)), 'BTD')

  def insert(self, cache, new, rows):
    return sharding.insert_rows(cache, new, rows)

  def unstack(self, params):
    return params

  def with_dtype(self, dtype):
    return self


class Tokenizer(Exact):
  """UTF-8 bytes."""
  vocab_size, bos_id, eos_id, eos_ids, adds_bos, fingerprint, lossless = VOCAB, BOS, EOS, (EOS,), True, 'bytes', True
  control_names = ('<s>', '</s>')

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts):
    return [self.encode(text) for text in texts]

  def sample(self, text, alpha, seed):
    return self.encode(text)

  def decode(self, ids):
    return self.decode_bytes(ids).decode(errors='replace')

  def decode_bytes(self, ids):
    return bytes([i for i in np.asarray(ids).tolist() if i < BOS])

  def byte_lengths(self):
    return np.int32([1] * 256 + [0, 0])

  def sizes(self, text, ids):
    return np.ones(len(ids), int)

  def parse(self, text):
    return self.encode(text), np.zeros((0, 2), int)

  def control_id(self, name):
    return BOS + self.control_names.index(name)

  def save(self, folder):
    tokenizers.Bytes(()).save(folder)


@dataclasses.dataclass(frozen=True)
class Rows(Exact, batches.Batches):
  """One document per row."""
  documents: list[np.ndarray] = dataclasses.field(kw_only=True)

  @property
  def rows_per_epoch(self):
    return len(self.documents)

  def _fill(self, row, epoch, index, rng):
    form, = self.objective.forms
    row.add(form.example(np.int32([BOS, *self.documents[index], EOS]), rng, self.special))


class OpenData(Exact):
  tokenizer, fingerprint, validation_sets = Tokenizer(), 'numbers', ()
  stores = {split: [Tokenizer().encode(text) for text in texts] for split, texts in TEXTS.items()}

  def batches(self, split, objective, rows, seed=0, repeat=True):
    return Rows(objective, batch.special(self.tokenizer, objective.control), 24, rows, seed, repeat,
                documents=self.stores[split])


class Data(Exact):
  length, source_length, kind, template = 24, None, np.ndarray, None
  columns = inputs = types.MappingProxyType({})
  text_fingerprint = 'numbers'

  def questions(self, split, count):
    return []

  def open(self, workdir, *, control=(), check=dataset.unchecked):
    check(OpenData.fingerprint, Tokenizer.fingerprint)
    return OpenData()

  def load_tokenizer(self, workdir):
    return Tokenizer()

  def verify(self, workdir):
    return []


class ExactObjective(Exact, Objective):
  pass


class ExactSource(Exact, source.Source):
  pass


def members(kind: type) -> set[str]:
  """The public members of a class and of its bases, without those of `Exact` and of `Protocol`."""
  return {name for base in kind.__mro__ if base.__module__ != 'typing' and base not in (object, Exact)
          for name in (*vars(base), *base.__dict__.get('__annotations__', ())) if not name.startswith('_')}


@pytest.mark.parametrize('fake, protocol', [
    (Model, interfaces.Decoder), (Tokenizer, tokenizers.Tokenizer), (Data, interfaces.Data),
    (OpenData, interfaces.OpenData)])
def test_a_fake_has_exactly_the_members_of_its_protocol(fake, protocol):
  assert members(fake) == members(protocol)
  assert set(vars(Outputs(1, 2, 3))) == members(interfaces.OutputLike)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Returns a run, its workdir, its result, and the same result from the checkpoint."""
  objective = ExactObjective(**{field.name: getattr(next_token(), field.name)
                                for field in dataclasses.fields(Objective)})
  run = train.Run(model=Model(), objective=objective, data=Data(), optimizer=optim.adamw(lambda step: 0.02), steps=6,
                  batch=4, accumulate=2, evaluate_every=3)
  workdir = tmp_path_factory.mktemp('run')
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    yield run, workdir, train.train(run, workdir, mesh), train.train(run, workdir, mesh)


def logits(params, tokens):
  """Returns the logits [n, V] of a text by a plain loop over its tokens."""
  rows = [params['embedding'][token] + (params['embedding'][tokens[i - 1]] if i else 0)
          for i, token in enumerate(tokens)]
  return np.stack(rows).astype(float) @ params['head'].T


def test_a_run_of_fakes_is_trained_loaded_and_generates_and_scores(trained, capsys, monkeypatch):
  run, workdir, result, again = trained
  jax.tree.map(np.testing.assert_array_equal, result.params, again.params)
  params = jax.tree.map(np.asarray, result.params)

  texts = [np.int32([BOS, *document, EOS]) for document in OpenData.stores['validation']]
  scores = score.log_probabilities(run.model, result.params, texts)
  for ids, values in zip(texts, scores):
    own = logits(params, ids)[:-1]
    expected = own[range(len(own)), ids[1:]] - np.log(np.exp(own).sum(-1))
    np.testing.assert_allclose(values, expected, atol=1e-5)
  assert result.metrics['validation/nll'] == pytest.approx(-np.concatenate(scores).mean(), abs=1e-5)
  monkeypatch.setattr(continuations, '_SHORTEST', 2)
  for values, predicted in zip(scores, continuations.predictions(run.model, result.params, texts, [6] * len(texts))):
    np.testing.assert_allclose(predicted.log_p, values[5:], atol=1e-5)

  written, = generate.generate(run.model, result.params, Tokenizer(), ['on'], generate.Sampling(0), max_tokens=6)
  ids = [BOS, *b'on']
  while len(ids) < 9 and ids[-1] != EOS:
    ids.append(int(logits(params, ids)[-1].argmax()))
  assert written == Tokenizer().decode(ids[3:])

  engine = generate.Engine(run.model, result.params, 32, VOCAB, (EOS,))
  batch = run.model.prompt([np.frombuffer(b'on', np.uint8)] * 2, 2, BOS, EOS)
  settings = generate.settings([generate.Sampling(0)] * 2, [0] * 2, np.arange(2))
  state, first = engine.prefill(batch, settings, [6] * 2)
  state = engine.insert(engine.prefill(batch, settings, [0] * 2)[0], state, [1, 2])   # one row of two
  state, others = engine.step(state)
  assert others.count_B[0] == 0 and [*first.rows(1)[0], *others.rows(2)[1]] == ids[3:]

  outcome.show(run, workdir, result, workdir / 'script.py', sample=True)
  assert "the model continues 'one two'" in capsys.readouterr().out
  assert run.data.template is None and checkpoint.stored_facts(workdir / 'checkpoints')['data'] == 'numbers'


def test_texts_mixtures_and_samples_read_exact_sources(tmp_path):
  parts = [ExactSource(name, {split: [f'{name} {text}' for text in texts] for split, texts in TEXTS.items()}, name)
           for name in ('a', 'b')]
  whole = source.sample(mixture.mixture([(part, 1) for part in parts[:1]]), 5)
  for corpus in (parts[0], mixture.mixture([(part, 1) for part in parts]), whole):
    data = dataset.Text(corpus, tokenizers.Bytes(()), 24, folder=tmp_path / corpus.fingerprint)
    assert data.text_fingerprint and data.open(tmp_path, lambda line: None).batches('train', next_token(), 2)(0)
