"""Preference losses equal formulas written out in NumPy on unpacked answers, and their finite differences."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import on
from helpers.preferences import ROWS, Records, T, V, packed, pairs, rated, tiny
from helpers.slow import slow

from lm import optim, sharding, train
from lm.data.batch import Batch, Dialogue, Pair, Rated
from lm.models import transformer
from lm.objectives import objective, preference
from lm.objectives.next_token import next_token
from lm.objectives.supervised import supervised
from lm.optim import schedules

ADAM = optim.adamw(schedules.warmup_constant(1e-3, 10, 1))

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def apply(params, batch, key=None):
  """A model whose logits are its parameters."""
  return transformer.Output(params, transformer.Head(sharding.constrain(jnp.eye(V), 'V-')), None)


LOGITS = np.random.default_rng(4).normal(size=(ROWS, T, V))

REFERENCE = np.random.default_rng(8).normal(size=(ROWS, T, V))


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def batch_of(records, goal) -> Batch:
  batch = packed(records, goal)(0)
  assert packed(records, goal).steps_per_epoch == 1
  if 'reference' not in (batch.columns or {}):
    picked = np.take_along_axis(log_softmax(REFERENCE), batch.targets[..., None], -1)[..., 0]
    batch = batch._replace(columns={**(batch.columns or {}), 'reference': picked.astype('f4')})
  return batch


def answers(records, batch, logits):
  """Returns (record, [log p of the tokens of each answer]). Answers are identified in the rows by their tokens, not by
  marks.
  """
  lp = log_softmax(logits)
  for row in range(len(batch.tokens)):
    ends = np.flatnonzero(np.diff(batch.segments[row], append=0)) + 1
    ends = [e for e in ends if batch.segments[row, e - 1]]
    spans = list(zip([0, *ends], ends))
    for (a, b), (c, d) in zip(spans[::2], spans[1::2]):
      for record in records:
        both = [x for x in record if isinstance(x, Dialogue)]
        if all(np.array_equal(batch.tokens[row, i:j], x.tokens[:-1]) and np.array_equal(batch.targets[row, i:j],
               x.tokens[1:]) for (i, j), x in zip([(a, b), (c, d)], both)):
          yield record, [np.array([lp[row, i + k - 1, x.tokens[k]] for k in np.flatnonzero(x.loss_mask)])
                         for i, x in zip((a, c), both)]
          break
      else:
        raise AssertionError('a segment is of no record')


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def by_hand(method, logits, records, batch):
  """Returns the loss and the (chosen, rejected) rewards of each pair by TRL's formulas, in float64."""
  losses, rewards = [], []
  for (_, (w, l)), (_, (rw, rl)) in zip(answers(records, batch, logits), answers(records, batch, REFERENCE)):
    ratio_w, ratio_l = w.sum() - rw.sum(), l.sum() - rl.sum()
    beta = 0.3
    if method in ('dpo', 'cdpo', 'robust'):
      h, e = beta * (ratio_w - ratio_l), {'dpo': 0, 'cdpo': 0.2, 'robust': 0.2}[method]
      losses.append((-np.log(sigmoid(h)) * (1 - e) - np.log(sigmoid(-h)) * e * (-1 if method == 'robust' else 1))
                    / (1 - 2 * e if method == 'robust' else 1))
      rewards.append((beta * ratio_w, beta * ratio_l))
    elif method == 'ipo':
      losses.append((ratio_w / len(w) - ratio_l / len(l) - 1 / (2 * beta)) ** 2)
      rewards.append((beta * ratio_w, beta * ratio_l))
    elif method == 'orpo':
      odds = [np.exp(x.mean()) / (1 - np.exp(x.mean())) for x in (w, l)]
      losses.append(-w.mean() - beta * np.log(sigmoid(np.log(odds[0] / odds[1]))))
      rewards.append((beta * w.mean(), beta * l.mean()))
    elif method == 'simpo':
      losses.append(-np.log(sigmoid(beta / len(w) * w.sum() - beta / len(l) * l.sum() - 0.7)))
      rewards.append((beta * w.mean(), beta * l.mean()))
  return np.array(losses), np.array(rewards)


def kto_by_hand(logits, records, batch):
  compared = list(zip(answers(records, batch, logits), answers(records, batch, REFERENCE)))
  ratios = np.array([[x.sum() - y.sum() for x, y in zip(p, r)] for (_, p), (_, r) in compared])
  good = np.array([record.good for (record, _), _ in compared])
  kl = max(ratios[:, 1].mean(), 0)
  if logits is not LOGITS:   # for finite differences, the baseline stays constant, as it has no gradient
    kl = kto_by_hand(LOGITS, records, batch)[1]
  return np.where(good, 1.5 * (1 - sigmoid(0.3 * (ratios[:, 0] - kl))),
                  0.5 * (1 - sigmoid(0.3 * (kl - ratios[:, 0])))), kl, 0.3 * ratios[:, 0], good


METHODS = {'dpo': preference.dpo(0.3), 'cdpo': preference.dpo(0.3, 0.2), 'robust': preference.robust_dpo(0.3, 0.2),
           'ipo': preference.ipo(0.3), 'orpo': preference.orpo(0.3), 'simpo': preference.simpo(0.3, 0.7)}

OBJECTIVES = {**{name: preference.preference(loss) for name, loss in METHODS.items()},
              'kto': preference.kto(0.3, 1.5, 0.5)}


def computed(goal, batch, logits=LOGITS):
  """Returns the mean loss, its gradient by the logits, and the metrics."""
  def loss(logits, batch):
    total, count, sums = goal.loss(apply, logits, batch, None)
    return total / count, sums
  logits = sharding.constrain(jnp.asarray(logits, jnp.float32), 'B--')
  batch = jax.tree.map(lambda x: sharding.constrain(jnp.asarray(x), 'B-'), batch)
  (value, sums), grad = jit(jax.value_and_grad(loss, has_aux=True))(logits, batch)
  return float(value), np.asarray(grad), {
      name: float(x[0] / x[1]) if isinstance(x, tuple) else float(x) for name, x in sums.items()}


@pytest.mark.parametrize('shape', [None, *slow('fsdp:4,tensor:2')])
@pytest.mark.parametrize('method', OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_formulas(method, shape, monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: 7)
  goal, records = OBJECTIVES[method], rated() if method == 'kto' else pairs()
  batch = batch_of(records, goal)
  with on(shape):
    value, grad, metrics = computed(goal, batch)
  mean = lambda logits: (kto_by_hand(logits, records, batch)[0] if method == 'kto'
                         else by_hand(method, logits, records, batch)[0]).mean()
  assert value == pytest.approx(mean(LOGITS), rel=2e-5)
  if method == 'kto':
    losses, kl, rewards, good = kto_by_hand(LOGITS, records, batch)
    expected = {'kl': kl, 'chosen': rewards[good].mean(), 'rejected': rewards[~good].mean(),
                'accuracy': ((rewards > 0.3 * kl) == good).mean()}
    assert kl > 0 and 0 < expected['accuracy'] < 1
  else:
    losses, rewards = by_hand(method, LOGITS, records, batch)
    expected = {'chosen': rewards[:, 0].mean(), 'rejected': rewards[:, 1].mean(),
                'margin': (rewards[:, 0] - rewards[:, 1]).mean(),
                'accuracy': (rewards[:, 0] > rewards[:, 1]).mean()}
    assert 0 < expected['accuracy'] < 1
  assert len(losses) == len(records)
  assert {name: metrics[f'preference/{name}'] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
  chosen = np.concatenate([both[0] for _, both in answers(records, batch, LOGITS)])
  assert metrics['tokens'] == len(chosen) and metrics['nll'] == pytest.approx(-chosen.sum(), rel=1e-5)
  weighted = np.abs(batch.weights) > 0
  assert not grad[~weighted].any()
  rng = np.random.default_rng(3)
  places = np.argwhere(weighted)[rng.permutation(weighted.sum())[:12]] if shape is None else []
  for row, position in places:
    for token in (batch.targets[row, position], int(rng.integers(V))):
      moved = [LOGITS.copy() for _ in range(2)]
      moved[0][row, position, token] += 1e-5
      moved[1][row, position, token] -= 1e-5
      slope = (mean(moved[0]) - mean(moved[1])) / 2e-5
      assert grad[row, position, token] == pytest.approx(slope, rel=1e-3, abs=2e-6)


@pytest.mark.parametrize('method', ['dpo', 'kto'])
def test_a_policy_that_is_its_reference_has_no_rewards(method):
  records = rated() if method == 'kto' else pairs()
  goal = preference.preference(preference.dpo(0.1)) if method == 'dpo' else preference.kto()
  batch = packed(records, goal)(0)
  logits = jnp.asarray(LOGITS, jnp.float32)
  stored = preference.reference(apply, logits, batch)['reference']
  batch = batch._replace(columns={**(batch.columns or {}), 'reference': stored})
  value, grad, metrics = computed(goal, batch)
  assert value == pytest.approx(math.log(2) if method == 'dpo' else 0.5, rel=1e-7)
  assert metrics['preference/chosen'] == metrics['preference/rejected'] == 0
  assert np.abs(grad).max() > 1e-3


def test_kto_has_no_negative_baseline_and_no_gradient_through_it():
  records, goal = rated(), preference.kto(0.3, 1.5, 0.5)
  batch = batch_of(records, goal)
  batch = batch._replace(columns={**batch.columns, 'reference': batch.columns['reference'] + np.float32(9)})
  _, grad, metrics = computed(goal, batch)
  assert metrics['preference/kl'] == 0
  assert not grad[batch.weights < 0].any() and grad[batch.weights > 0].any()


@pytest.mark.slow
def test_each_record_occurs_once_an_epoch_and_its_loss_does_not_depend_on_its_row():
  records, goal = pairs(40), OBJECTIVES['dpo']
  batches = packed(records, goal, rows=4)
  epoch = [batches(step) for step in range(batches.steps_per_epoch)]
  contents = [tuple(map(bytes, (r.chosen.tokens, r.rejected.tokens)))
              for batch in epoch for r, _ in answers(records, batch, np.zeros((4, T, V)))]
  assert sorted(contents) == sorted(tuple(map(bytes, (r.chosen.tokens, r.rejected.tokens))) for r in records)
  logits = np.random.default_rng(5).normal(size=(V, V))   # logits depend on the input token alone

  def loss(batches):
    total = count = 0
    for step in range(batches.steps_per_epoch):
      batch = batches(step)
      reference = np.zeros(batch.tokens.shape, 'f4') - 2
      batch = batch._replace(columns={'reference': reference})
      loss_sum, weight_sum, _ = goal.loss(apply, jnp.asarray(logits[batch.tokens], jnp.float32), batch, None)
      total, count = total + float(loss_sum), count + float(weight_sum)
    return total, count
  alone = [loss(packed(Records([record]), goal, rows=1)) for record in records]
  assert loss(batches) == pytest.approx(np.sum(alone, 0), rel=1e-5) and loss(batches)[1] == 40


class Toy:
  """Unopened data with this kind of record."""
  length, source_length, inputs = T, None, {}

  def __init__(self, kind, columns=()):
    self.kind, self.columns = kind, dict(columns)


@pytest.mark.parametrize('goal, kind, message', [
    (supervised(), Pair, 'learns from dialogues, and the data holds pairs'),
    (OBJECTIVES['dpo'], np.ndarray, 'learns from pairs of .* the data holds documents'),
    (next_token(), Dialogue, 'learns from documents, and the data holds dialogues'),
    (OBJECTIVES['kto'], Pair, 'learns from dialogues that are rated'),
    (OBJECTIVES['dpo'], Pair, 'compares with a reference'), (OBJECTIVES['ipo'], Pair, 'compares with a reference'),
    (OBJECTIVES['kto'], Rated, 'compares with a reference')])
def test_objectives_and_data_that_do_not_fit_are_refused_before_training(goal, kind, message):
  mesh = sharding.make_mesh('fsdp:1', jax.devices()[:1])
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
    train.check(train.Run(tiny(), goal, Toy(kind), ADAM, steps=1, batch=2), mesh)


@pytest.mark.slow
@pytest.mark.parametrize('name', OBJECTIVES)
def test_a_step_is_lowered_on_a_mesh(name):
  mesh = sharding.abstract_mesh('fsdp:4,tensor:2')
  goal = OBJECTIVES[name]
  data = Toy(goal.needs, {} if name in ('orpo', 'simpo') else preference.COLUMNS)
  with jax.sharding.use_abstract_mesh(mesh):
    run = train.Run(tiny(), goal, data, ADAM, steps=1, batch=16, accumulate=2)
    train.check(run, mesh)
    train.make_step(run).trace(train.abstract_state(run, mesh), train.abstract_batch(run, mesh)).lower(
        lowering_platforms=('tpu',))
