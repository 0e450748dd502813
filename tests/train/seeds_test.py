"""All seeds from 0 to 2 ** 63 differ, in keys, in orders of data, and in the runs that they give."""
import ast
import importlib
import itertools
import pathlib

import jax
import numpy as np
import pytest
from helpers.runs import RUN, Data

from lm import generate, seeds, signature, train
from lm.models import transformer
from lm.objectives.next_token import next_token

ROOT = pathlib.Path(__file__).parents[2]
WIDE = [0, 1, 2 ** 31, 2 ** 32 - 1, 2 ** 32, 2 ** 32 + 1, 2 ** 33, 2 ** 62, 2 ** 63 - 1]


@pytest.mark.parametrize('implementation', ['threefry2x32', 'rbg'])
def test_keys_of_wide_seeds_differ_and_are_those_of_jax(implementation):
  with jax.default_prng_impl(implementation):
    data = {seed: np.asarray(jax.random.key_data(seeds.key(seed))) for seed in WIDE}
    inside = jax.jit(lambda: [jax.random.key_data(seeds.key(seed)) for seed in WIDE])()
    for seed, traced in zip(WIDE, inside):
      with jax.enable_x64(True):
        np.testing.assert_array_equal(data[seed], jax.random.key_data(jax.random.key(seed)))
      np.testing.assert_array_equal(data[seed], traced)
      if seed < 2 ** 32:
        np.testing.assert_array_equal(data[seed], jax.random.key_data(jax.random.key(seed)))
  assert len({x.tobytes() for x in data.values()}) == len(WIDE)


def test_no_wide_seed_equals_another_seed_in_another_epoch():
  numbers = list(itertools.product(WIDE, range(3), [0, 1]))
  drawn = {seeds.generator(seed, epoch, i).integers(2 ** 63) for seed, epoch, i in numbers}
  assert len(drawn) == len(numbers)
  for entropy in itertools.product(WIDE[:4], range(3), [1, 2 ** 31]):
    assert seeds.generator(*entropy).integers(2 ** 63) == np.random.default_rng(entropy).integers(2 ** 63)


@pytest.mark.parametrize('seed', [-1, 2 ** 63, 2 ** 70])
def test_a_seed_out_of_range_is_refused_by_its_value(seed):
  for use in (seeds.check, seeds.key, seeds.generator):
    with pytest.raises(ValueError, match=f'seed={seed} is not a whole number from 0 to'):
      use(seed)


def test_generate_refuses_a_seed_before_it_opens_anything(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'experiments')
  main = importlib.import_module('generate').main
  with pytest.raises(ValueError, match='seed=-1 is not a whole number'):
    signature.call(main, {'workdir': tmp_path / 'absent', 'seed': -1})


def test_runs_of_wide_seeds_differ():
  def start(seed):
    run = train.Run(RUN.model, RUN.objective, RUN.data, RUN.optimizer, steps=6, batch=8, seed=seed)
    return jax.tree.leaves(jax.jit(lambda: train.init(run))().params)[0]

  def order(seed):
    return Data().batches('train', next_token(), 8, seed)(0).tokens

  for make in (start, order):
    assert len({np.asarray(make(seed)).tobytes() for seed in (0, 1, 2 ** 32, 2 ** 32 + 1)}) == 4


@pytest.mark.slow
def test_texts_of_wide_seeds_differ():
  model = transformer.llama(Data.tokenizer.vocab_size, width=8, layers=1, heads=1, hidden=8, max_length=16)
  params = jax.jit(model.init)(jax.random.key(0))
  with jax.set_mesh(jax.make_mesh((1, 1), ('data', 'model'), axis_types=(jax.sharding.AxisType.Explicit,) * 2)):
    texts = [generate.generate(model, params, Data.tokenizer, [''], max_tokens=12, seed=seed) for seed in (0, 2 ** 32)]
  assert texts[0] != texts[1]


def test_keys_and_generators_of_a_seed_are_made_in_one_place():
  """Code elsewhere would truncate a seed, or confuse a seed and an epoch with another seed."""
  for path in [*(ROOT / 'lm').rglob('*.py'), *(ROOT / 'experiments').glob('*.py')]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and path.stem != 'seeds':
        constant, called = all(isinstance(value, ast.Constant) for value in node.args), ast.unparse(node.func)
        assert constant or not called.endswith(('random.key', 'random.PRNGKey')), (path.name, node.lineno)
        whole = constant or isinstance(node.args[0], ast.Name)   # a single number may have any size
        assert whole or not called.endswith('default_rng'), (path.name, node.lineno)
