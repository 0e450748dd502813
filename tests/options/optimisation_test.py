"""The flags of an optimizer: each optimizer and schedule is made, and what does not fit says so."""
import sys
import typing

import jax
import numpy as np
import pytest
from helpers.declared import bound
from helpers.figures import points, saved_figures

from lm import optim, options
from lm.optim import averaging, schedules
from lm.options.optimisation import OptimizerName, ScheduleName

PARAMS = {'embedding': np.ones((4, 2), 'f4'), 'norm': {'scale': np.ones(2, 'f4')}}


def step(**flags):
  """A step from gradients of ones, and the state after it."""
  optimizer = bound(options.Optimizer(**flags).make(40, warmup=4), PARAMS)
  return optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, obj_fn=lambda params: params['embedding'].sum())


OPTIMIZERS = {'adamw': optim.adamw, 'adam': optim.adam, 'nadamw': optim.nadamw, 'rmsprop': optim.rmsprop,
              'sgd': optim.sgd, 'adafactor': optim.adafactor, 'lion': optim.lion, 'adan': optim.adan,
              'muon': optim.muon, 'soap': optim.soap, 'sophia': optim.sophia, 'schedule_free': optim.schedule_free}


def two_steps(optimizer):
  """The updates of two steps, of which gradients differ, in one vector, and the state after them."""
  params = {'blocks': {'matrix': np.float32([[0.5, -1., 2.], [1., 0.3, -0.2]])}, 'embedding': np.float32([[1., -2.]])}
  optimizer, all_updates = bound(optimizer, params), []
  state = optimizer.init(params)
  for factor in (1., -0.3):
    grads = jax.tree.map(lambda x, factor=factor: np.float32(factor) * (x ** 2 - 0.7), params)
    updates, state = optimizer.update(grads, state, params,
                                      obj_fn=lambda p: sum(jax.numpy.sum(x ** 3) for x in jax.tree.leaves(p)))
    all_updates += jax.tree.leaves(updates)
  return np.concatenate([np.ravel(update) for update in all_updates]), state


@pytest.fixture(scope='module')
def updates_of_all():
  rate = schedules.warmup_cosine(1e-3, 40, 4)
  return {name: two_steps(make(rate, clip=1.))[0] for name, make in OPTIMIZERS.items()}


@pytest.mark.parametrize('name', typing.get_args(OptimizerName))
def test_every_optimizer_has_its_name(name, updates_of_all):
  """It makes the updates of the function of that name, whose formula `optim_test` checks, and those of no other."""
  updates, state = two_steps(options.Optimizer(optimizer=name).make(40, warmup=4))
  assert [other for other, expected in updates_of_all.items() if np.allclose(updates, expected, rtol=1e-3, atol=1e-8)
          ] == [name]
  assert float(optim.learning_rate(state)) == pytest.approx(2e-3 / 5)
  assert averaging.has_average(state) == (name == 'schedule_free')


@pytest.mark.parametrize('flags,last', [
    ({'schedule': 'cosine'}, 1e-4), ({'schedule': 'constant'}, 1e-3), ({'schedule': 'linear'}, 0.),
    ({'schedule': 'inverse_sqrt'}, 1e-3 * (4 / 40) ** 0.5), ({'schedule': 'stable_decay'}, 0.),
    ({'schedule': 'one_cycle', 'cooldown': 10}, 4e-9),
    ({'schedule': 'steps', 'milestones': (10, 20), 'drop': 0.5}, 2.5e-4)])
def test_every_schedule_has_its_name(flags, last):
  assert float(options.Optimizer(**flags).rate(40, warmup=4)(np.int32(40))) == pytest.approx(last, abs=1e-9)


def test_decay_rates_penalties_and_averages_come_from_flags():
  plain, _ = step(optimizer='sgd', weight_decay=0.5, decay=('norm/*',), rates=('emb*=4', '*=0.5'), clip=None)
  np.testing.assert_allclose(plain['embedding'], -2e-4 * 2, rtol=1e-5)
  np.testing.assert_allclose(plain['norm']['scale'], -2e-4 * 0.5 * 1.5, rtol=1e-5)
  updates, state = step(optimizer='sgd', l1=0.25, l2=0.5, average=0.9, clip=None)
  np.testing.assert_allclose(updates['embedding'], -2e-4 * 1.75, rtol=1e-5)
  np.testing.assert_allclose(updates['norm']['scale'], -2e-4, rtol=1e-5)
  assert averaging.has_average(state)


@pytest.mark.parametrize('flags,message', [
    ({'cooldown': 5}, '--cooldown=5 is for .* not for cosine'),
    ({'milestones': (5,)}, '--milestones=5 and --schedule=cosine do not fit'),
    ({'schedule': 'steps'}, '--milestones= and --schedule=steps do not fit'),
    ({'rates': ('embedding',)}, "'embedding' is not of the form"),
    ({'optimizer': 'adam', 'weight_decay': 0.1}, '--optimizer=adam has no weight decay'),
    ({'schedule': 'stable_decay', 'cooldown': 37}, 'a decay of 37 steps after a warm-up of 4 does not fit'),
    ({'decay': ('head',)}, "'head' matches no parameter; there are embedding, norm/scale"),
    ({'rates': ('head=2',)}, "'head' matches no parameter"), ({'weight_decay': -1.}, 'weight_decay=-1.0'),
    ({'l1': -1.}, 'l1=-1.0'), ({'average': 1.}, 'the decay 1.0 of a moving average'),
    ({'schedule': 'one_cycle', 'warmup': 4}, '--warmup=4 has no effect'),
    ({'average': 0.9, 'optimizer': 'schedule_free'}, 'has an average of its own already')])
def test_flags_that_do_not_fit_are_refused(flags, message):
  with pytest.raises(ValueError, match=message):
    step(**flags)


def test_schedules_are_drawn(tmp_path, monkeypatch, capsys):
  import schedules as script
  figures = saved_figures(monkeypatch)
  script.main(steps=20, warmup=2, png=tmp_path / 'all.png')
  script.main(only=['steps'], steps=20, warmup=2, milestones=(5, 9), png=tmp_path / 'one.png')
  every, one = (figure.axes for figure in figures)
  assert [axes.get_ylabel() for axes in every] == list(typing.get_args(ScheduleName))
  lines = {axes.get_ylabel(): points(axes)[0] for axes in every}
  assert all([x for x, _ in line] == list(range(20)) for line in lines.values()) and every[-1].get_xlabel() == 'step'
  assert [y for _, y in lines['constant'][2:]] == pytest.approx([1e-3] * 18)
  assert [y for _, y in points(one[0])[0][2:]] == pytest.approx([1e-3] * 3 + [1e-4] * 4 + [1e-5] * 11)
  with pytest.raises(ValueError, match='a warm-up of 30 steps does not fit'):
    script.main(only=['cosine'], steps=20, warmup=30, png=tmp_path / 'none.png')
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  script.main(only=['cosine'], steps=20, warmup=2, png=tmp_path / 'none.png')
  assert 'no none.png: matplotlib is missing' in capsys.readouterr().out and not (tmp_path / 'none.png').exists()
