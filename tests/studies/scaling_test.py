"""The fit recovers the law that made the points, with honest intervals; FLOPs equal their formulas."""
import interleaved
import jax
import jax.numpy as jnp
import numpy as np
import optimizer_costs
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN

from lm import optim, train
from lm.data import dataset
from lm.models import transformer
from lm.objectives.next_token import next_token
from lm.studies import costs, scaling
from lm.train import flops

LAW = scaling.Law(1.2, 30., 0.4, 80., 0.35)
GRID = [(n, d) for n in (3e4, 6e4, 1.2e5, 2.4e5) for d in (2.5e5, 5e5, 1e6, 2e6)]


@pytest.mark.slow
def test_points_of_a_law_give_the_law():
  law = scaling.fit([(n, d, float(LAW(n, d))) for n, d in GRID])
  np.testing.assert_allclose([getattr(law, field) for field in vars(LAW)], list(vars(LAW).values()), rtol=2e-3)


@pytest.mark.slow
@pytest.mark.long
def test_intervals_hold_the_outcome_about_as_often_as_they_say():
  """The outcome is the next rung, at twice the size and tokens, with noise of half a percent."""
  inside, trials = 0, 12
  for trial in range(trials):
    rng = np.random.default_rng(trial)
    points = [(n, d, float(LAW(n, d)) * np.exp(0.005 * rng.normal())) for n, d in GRID]
    law = scaling.fit(points, starts=[LAW])
    laws = scaling.bootstrap(points, law, 60, seed=trial)
    predicted, low, high = scaling.predict(points, law, laws, 4.8e5, 4e6, seed=trial)
    inside += low <= float(LAW(4.8e5, 4e6)) * np.exp(0.005 * rng.normal()) <= high
    assert low < predicted < high and high - low < 0.3
  assert inside >= 9   # 12 intervals at 95 %: fewer than 9 hold with a chance of 0.2 %


@pytest.mark.slow
def test_an_outlier_moves_the_fit_little():
  points = [(n, d, float(LAW(n, d)) * (1.3 if i == 5 else 1)) for i, (n, d) in enumerate(GRID)]
  assert float(scaling.fit(points)(4.8e5, 4e6)) == pytest.approx(float(LAW(4.8e5, 4e6)), rel=0.02)


@pytest.mark.parametrize('points', [GRID[:5], GRID[:4] * 2, [(n, 1e6) for n, _ in GRID]])
def test_too_few_points_are_refused(points):
  with pytest.raises(ValueError, match='do not fix the 5 numbers of the law'):
    scaling.fit([(*point, 2.) for point in points])


def test_products_are_counted_where_they_run():
  a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
  product = lambda a, b: jnp.einsum('bij,bjk->bik', a, b)
  once = 2 * 3 * 4 * 5 * 6
  assert flops.count(product, a, b) == once
  assert flops.count(jax.jit(product), a, jax.eval_shape(lambda: b)) == once
  repeated = lambda a, b: jax.lax.scan(lambda total, _: (total + product(a, b).sum(), None), 0., None, 7)[0]
  assert flops.count(repeated, a, b) == 7 * once
  chosen = lambda a, b: jax.lax.cond(a.sum() > 0, product, lambda a, b: jnp.zeros((3, 4, 6)), a, b)
  assert flops.count(chosen, a, b) == once
  sometimes = lambda n, a, b: jax.lax.cond(n % 10 == 0, product, lambda a, b: jnp.zeros((3, 4, 6)), a, b)
  counter = flops.counter(jax.jit(sometimes), np.int32(0), a, b)
  assert [counter(np.int32(n), a, b) for n in (0, 1, 19, 20)] == [once, 0, 0, once]
  loss = lambda a, b: product(a, b).sum()
  assert flops.count(jax.grad(loss, (0, 1)), a, b) == 3 * once
  assert flops.count(jax.grad(jax.checkpoint(lambda a, b: jnp.sin(product(a, b)).sum()), (0, 1)), a, b) == 4 * once
  with pytest.raises(ValueError, match='whose number of iterations is not known'):
    flops.count(lambda n, a, b: jax.lax.fori_loop(0, n, lambda i, t: t + product(a, b).sum(), 0.), np.int32(3), a, b)
  x, w, sizes = jnp.zeros((7, 4)), jnp.zeros((3, 4, 5)), jnp.int32([2, 3, 2])
  grouped = lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum()
  # Each row is multiplied by one of the three matrices.
  assert flops.count(jax.grad(grouped, (0, 1)), x, w) == 3 * 2 * 7 * 4 * 5
  noisy = lambda n: jax.debug.print('{}', n)
  assert flops.counter(noisy, np.int32(0))(np.int32(0)) == 0
  kernel = jnp.zeros((3, 3, 4, 8))
  image = jnp.zeros((2, 10, 10, 4))
  layout = ('NHWC', 'HWIO', 'NHWC')
  convolved = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), 'SAME', dimension_numbers=layout)
  assert flops.count(convolved, image, kernel) == 2 * (2 * 10 * 10 * 8) * 3 * 3 * 4


@pytest.mark.slow
def test_updates_cost_what_their_formulas_say():
  mesh, shape = mesh_of('fsdp:1'), interleaved.SHAPES['tiny']
  make = lambda optimizer, model: train.Run(model, next_token(), dataset.Text(None, None, shape.length), optimizer,
                                            100, shape.batch)
  model = transformer.gpt2(*shape[:4], shape.length)
  with jax.set_mesh(mesh):
    cost = lambda optimizer: costs.cost(make(optimizer(lambda step: 0.1), model), 'flops', mesh)
    plain = cost(optim.adamw)
    for name, optimizer in {'muon': optim.muon, 'soap': optim.soap}.items():
      assert cost(optimizer) - plain == pytest.approx(optimizer_costs.products(name, shape))
    # Sophia's second derivative is counted at every tenth step, or at all steps if the step is unknown.
    sophia = make(optim.sophia(lambda step: 0.1), model)
    always = flops.count(train.make_step(sophia), jax.eval_shape(lambda: train.init(sophia)),
                         train.abstract_batch(sophia, mesh), {})
    assert cost(optim.sophia) == pytest.approx(plain + (always - plain) / 10) and always > 2 * plain


def test_a_step_costs_six_flops_a_weight_of_the_head_and_token():
  mesh = mesh_of('fsdp:1')
  with jax.set_mesh(mesh):
    flops = costs.cost(RUN, 'flops', mesh)
    head = jax.eval_shape(lambda: train.init(RUN)).params['head'].size
  assert flops == 6 * head * RUN.batch * RUN.data.length   # the embedding is looked up
  assert costs.cost(RUN, 'tokens', mesh) == RUN.batch * RUN.data.length and costs.cost(RUN, 'steps', mesh) == 1
