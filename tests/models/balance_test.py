"""Losses that balance experts equal the formulas of their papers, and reach the training loss and the log."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.declared import bound
from helpers.experts import EXPERTS, KINDS, ROWS, TIME, WIDTH
from helpers.meshes import on

from lm import optim, sharding, train
from lm.data.batch import Batch
from lm.declarations import Role, declare
from lm.models import attention, layers, moe, stack, transformer
from lm.objectives.next_token import next_token


def routing(seed=5):
  """Returns (routing, mask): the decision of a router with random weights on random tokens, some of them padding."""
  rng = np.random.default_rng(seed)
  scores = rng.uniform(size=(ROWS, TIME, EXPERTS)).astype('f4')
  chosen = np.argsort(-scores, axis=-1)[..., :2].astype('i4')
  mask = np.arange(TIME)[None] < rng.integers(1, TIME, (ROWS, 1))
  return moe.Routing(np.take_along_axis(scores, chosen, -1), chosen, scores, np.zeros(EXPERTS, 'f4')), mask


def test_balancing_losses_are_their_papers_formulas():
  decision, mask = routing()
  p = np.float64(decision.scores) / decision.scores.sum(-1, keepdims=True)
  chose = np.eye(EXPERTS)[decision.chosen].sum(2)
  whole = 0.5 * EXPERTS * sum(chose[mask].mean(0)[e] * p[mask].mean(0)[e] for e in range(EXPERTS))
  np.testing.assert_allclose(moe.SwitchBalance(0.5)(decision, mask), whole, rtol=1e-5)
  rows = [0.5 * EXPERTS / 2 * np.sum(chose[b][mask[b]].mean(0) * p[b][mask[b]].mean(0)) for b in range(ROWS)]
  np.testing.assert_allclose(moe.SequenceBalance(0.5)(decision, mask), np.mean(rows), rtol=1e-5)
  even = moe.Routing(None, np.arange(ROWS * TIME * 2).reshape(ROWS, TIME, 2) % EXPERTS, np.ones_like(decision.scores))
  np.testing.assert_allclose(moe.SwitchBalance(0.5)(even, np.ones((ROWS, TIME), bool)), 2 * 0.5, rtol=1e-6)


def test_balancing_losses_are_the_same_on_a_mesh():
  """Also where the devices have unequal loads and numbers of tokens: the loads are those of the whole batch."""
  decision, mask = routing()
  losses = moe.SwitchBalance(0.5), moe.SequenceBalance(0.5), moe.BiasBalance()

  def values_and_grads(scores, correction, chosen, mask):
    def apply(scores, correction):
      parts = moe.Routing(None, sharding.constrain(chosen, 'BTX'), sharding.constrain(scores, 'BTX'), correction)
      return jnp.stack([loss(parts, sharding.constrain(mask, 'BT')) for loss in losses])
    return apply(scores, correction), jax.jacrev(apply, (0, 1))(scores, correction)

  arrays = decision.scores, decision.correction, decision.chosen, mask
  expected = jax.jit(values_and_grads)(*arrays)
  with on('fsdp:2,expert:2,tensor:2'):
    actual = jax.jit(values_and_grads)(*arrays)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, expected)


def test_the_loss_of_balance_is_that_of_transformers():
  torch = pytest.importorskip('torch')
  mixtral = pytest.importorskip('transformers.models.mixtral.modeling_mixtral')
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(ROWS, TIME, EXPERTS)).astype('f4')
  mask = np.arange(TIME)[None] < rng.integers(1, TIME, (ROWS, 1))
  expected = mixtral.load_balancing_loss_func((torch.from_numpy(logits.reshape(-1, EXPERTS)),), EXPERTS, 2,
                                              torch.from_numpy(mask.astype('i8')))
  scores = jax.nn.softmax(logits)
  decision = moe.Routing(None, jax.lax.top_k(logits, 2)[1], scores)
  np.testing.assert_allclose(moe.SwitchBalance(1.)(decision, mask), float(expected), rtol=1e-5)


def test_the_bias_of_an_expert_falls_where_it_is_chosen_too_often():
  decision, mask = routing()
  excess = jax.value_and_grad(lambda correction: moe.BiasBalance()(decision._replace(correction=correction), mask))
  value, grad = excess(np.ones(EXPERTS, 'f4'))
  loads = np.eye(EXPERTS)[decision.chosen[mask]].sum((0, 1))
  assert value == 0
  np.testing.assert_allclose(grad, loads / loads.sum() - 1 / EXPERTS, atol=1e-6)
  params = {'blocks': {'0': {'correction': jnp.zeros(EXPERTS), 'up': jnp.ones((1, 2, 2))}}}
  grads = {'blocks': {'0': {'correction': grad, 'up': jnp.ones((1, 2, 2))}}}
  balanced = optim.with_router_balance(optim.sgd(lambda step: 0.1, momentum=0., clip=1.), 1e-3)
  declared = {'blocks': {'0': {'correction': declare('-', Role.CORRECTION), 'up': declare('DF')}}}
  optimizer = bound(balanced, params, declared)
  updates = optimizer.update(grads, optimizer.init(params), params)[0]['blocks']['0']
  np.testing.assert_allclose(updates['correction'], -1e-3 * np.sign(loads - loads.mean()), rtol=1e-5)
  np.testing.assert_allclose(updates['up'], -0.1 / 2, rtol=1e-5)   # clipped to norm 1, without the correction
  with pytest.raises(ValueError, match='no router of this model has a correction'):
    bound(balanced, {'up': jnp.ones(2)})
  with pytest.raises(ValueError, match='which this one has not'):
    moe.BiasBalance()(decision._replace(correction=None), mask)


@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_balancing_loss_and_its_metric_reach_the_loss_and_the_log(accumulate):
  balance = moe.SwitchBalance(0.3), moe.SequenceBalance(0.2)
  block = layers.Block(attention.Attention(2, 2, 4), KINDS['mixtral'].clone(balance=balance), layers.RMSNorm(),
                       layers.RMSNorm())
  lm = transformer.Transformer(16, WIDTH, stack.stacks([block] * 2), layers.RMSNorm(), TIME)
  tokens = np.random.default_rng(0).integers(0, 16, (4, TIME)).astype('i4')
  batch = Batch(tokens, np.roll(tokens, -1, 1), np.ones((4, TIME), 'f4'), segments=np.ones((4, TIME), 'i4'))
  run = train.Run(lm, next_token(), None, optim.sgd(lambda step: 0.1), steps=1, batch=4, accumulate=accumulate)
  state = jax.jit(lambda: train.init(run))()
  auxes, total = [], 0.
  for part in range(accumulate):   # row i is of part i % accumulate
    rows = jax.tree.map(lambda x, part=part: x[part::accumulate], batch)
    aux = jax.jit(lambda params, rows=rows: lm.apply(params, rows).aux)(state.params)
    loss, weight, _ = jax.jit(lambda params, rows=rows: next_token().loss(lm.apply, params, rows, None))(state.params)
    auxes.append(aux)
    total += loss / weight
  losses = [aux.loss for aux in auxes]
  assert losses[0] > 2 * 0.3 * 2 * 0.9   # two layers, two experts a token: at least as much as in balance
  metrics = train.make_step(run)(state, batch)[1]
  np.testing.assert_allclose(metrics['loss'], total / accumulate + np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics['auxiliary_loss'], np.mean(losses), rtol=1e-5)
  sums, counts = np.sum([aux.metrics['router/violation'] for aux in auxes], axis=0)
  assert counts == 2 * accumulate and sums > 0
  np.testing.assert_allclose(metrics['router/violation'], sums / counts, rtol=1e-5)
