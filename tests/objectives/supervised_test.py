"""Supervised fine-tuning equals a masked loss of each dialogue alone, in NumPy; prompts only condition."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import on
from helpers.slow import slow

from lm.data.batch import Batch, Dialogue, Special
from lm.data.rows.packed_records import Packed
from lm.models import transformer
from lm.objectives.objective import sequence_mean
from lm.objectives.supervised import supervised

V, T, SPECIAL = 16, 24, Special(0, 1, 16, ())


class Records(list):
  """Dialogues in memory."""
  @property
  def positions(self):
    return np.array([len(x.tokens) - 1 for x in self])


def dialogues() -> Records:
  """Returns dialogues of several turns, some of which have one token."""
  rng, records = np.random.default_rng(0), Records()
  for n in (2, 3, 7, 12, 20, 24, 5, 9):
    loss_mask = np.r_[False, rng.uniform(size=n - 1) < 0.5, True]
    records.append(Dialogue(np.r_[0, rng.integers(2, V, n)].astype(np.int32), loss_mask))
  return records


def batch_of(records=None) -> Batch:
  return Packed(supervised(), SPECIAL, T, 4, records=records or dialogues(), repeat=False)(0)


def log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('shape', ['fsdp:4,tensor:2', *slow('fsdp:1')])
@pytest.mark.parametrize('denominator, by', [(None, 'tokens'), *slow((sequence_mean, 'dialogues'))])
def test_the_loss_is_the_masked_loss_of_each_dialogue_alone(shape, denominator, by):
  model = transformer.llama(V, 8, 1, heads=2, hidden=8, max_length=T)
  objective, records = supervised(*[denominator] if denominator else []), dialogues()
  with on(shape):
    params = jax.jit(lambda: jax.tree.map(lambda x: 9 * x, model.init(jax.random.key(0))))()
    loss, weight, sums = jax.jit(lambda p, b: objective.loss(model.apply, p, b, None))(params, batch_of())
    alone = Batch(np.stack([np.pad(x.tokens[:-1], (0, T + 1 - len(x.tokens))) for x in records]))
    outputs = jax.jit(lambda p, b: (lambda out: out.head(out.hidden))(model.apply(p, b)))(params, alone)
  lp = log_softmax(np.asarray(outputs, np.float64))
  nll = -sum(lp[i, j - 1, x.tokens[j]] for i, x in enumerate(records) for j in np.flatnonzero(x.loss_mask))
  count = sum(int(x.loss_mask.sum()) for x in records)
  assert float(loss) == pytest.approx(nll, rel=1e-5) and float(sums['nll']) == pytest.approx(nll, rel=1e-5)
  assert sums['tokens'] == count and weight == (count if by == 'tokens' else len(records))


def test_prompts_have_no_loss_and_no_gradient_of_their_own():
  batch = batch_of()
  logits = np.random.default_rng(1).normal(size=(*batch.tokens.shape, V)).astype('f4')
  apply = lambda logits, batch, key: transformer.Output(logits, transformer.Head(jnp.eye(V)), None)

  @jax.value_and_grad
  def loss(logits, batch):
    total, count, _ = supervised().loss(apply, logits, batch, None)
    return total / count
  value, grad = loss(logits, batch)
  weighted = batch.weights > 0
  assert 0 < weighted.sum() < (batch.segments > 0).sum()
  assert not np.asarray(grad)[~weighted].any()
  expected = (np.exp(log_softmax(logits)) - np.eye(V)[batch.targets]) / weighted.sum()
  np.testing.assert_allclose(np.asarray(grad)[weighted], expected[weighted], atol=1e-6)
  targets = np.where(weighted, batch.targets, (batch.targets + 3) % V)
  assert loss(logits, batch._replace(targets=targets))[0] == value
  assert loss(np.where(weighted[..., None], logits, 7 * logits[:, ::-1]), batch)[0] == value


def test_targets_are_the_tokens_that_the_mask_of_the_dialogue_marks():
  for dialogue in dialogues():
    example = supervised().forms[0].example(dialogue, np.random.default_rng(0), SPECIAL)
    targets = {(int(t), int(x)) for t, x, w in zip(np.arange(T), example.targets, example.weights) if w}
    assert targets == {(j - 1, int(dialogue.tokens[j])) for j in np.flatnonzero(dialogue.loss_mask)}
    assert example.weights.dtype == np.float32 and set(example.weights) <= {0, 1}
