"""Folders that `transformers` wrote give the logits that it computed; no torch is needed."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_rows import forward, jit
from helpers.slow import slow

from lm import sharding
from lm.data.batch import Batch
from lm.hf import files, weights

FOLDERS = sorted(path.parent for path in pathlib.Path(__file__).parents[1].glob('fixtures/*/config.json'))


FAST = 'gpt2', 'llama', 'gemma3', 'mixtral', 'bert', 't5'


@pytest.mark.parametrize('folder', [
    pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] * (folder.name not in FAST)) for folder in FOLDERS])
def test_logits_are_those_that_transformers_computed(folder, tmp_path):
  model, family = weights.open_model(folder)
  expected = np.load(folder / 'expected.npz')
  with files.Weights(folder) as stored:
    params = weights.load_params(model, family, stored, jnp.float32)
    assert np.std(expected['logits']) > 0.3
    source = expected.get('source')
    actual = forward(model, params, Batch(expected['tokens'], source=source))
    assert np.abs(actual - expected['logits']).max() <= 1e-4
    weights.write(tmp_path / 'out', model, params, [family], jnp.bfloat16)
    with files.Weights(tmp_path / 'out') as goes:
      assert set(stored) == set(goes)
      for name in stored:
        np.testing.assert_array_equal(goes[name].view(np.uint16), stored[name].view(np.uint16), err_msg=name)


def load(name):
  folder = FOLDERS[0].with_name(name)
  model, family = weights.open_model(folder)
  with files.Weights(folder) as stored:
    return model, weights.load_params(model, family, stored, jnp.float32), np.load(folder / 'expected.npz')


def test_a_text_as_long_as_the_original_context_has_the_short_factors():
  model, params, expected = load('phi3')
  actual = forward(model, params, Batch(expected['tokens'][:, :20]))
  assert np.abs(actual - expected['short']).max() <= 1e-4
  assert np.abs(actual - expected['logits'][:, :20]).max() > 1e-2   # one more token would select the long factors


@pytest.mark.parametrize('name, length', [('gemma3', 32), *slow(('llama4', 32), ('mistral', 32), ('phi3', 20))])
def test_cached_decoding_gives_those_logits(name, length):
  """Decoding crosses the ends of chunks and windows, up to the place where stretched positions would change."""
  model, params, expected = load(name)
  step, cache, logits = jit(model.apply), model.init_cache(1, length), []
  for start in range(0, length, 4):
    out = step(params, Batch(expected['tokens'][:, start:start + 4]), cache=cache)
    cache = out.cache
    logits.append(out.head(out.hidden))
  whole = expected['short' if name == 'phi3' else 'logits']
  assert np.abs(np.concatenate(logits, axis=1) - whole).max() <= 1e-4


def test_experts_are_read_into_the_shards_of_a_mesh():
  folder = FOLDERS[0].with_name('deepseek_v3')
  model, family = weights.open_model(folder)
  with files.Weights(folder) as stored:
    params = weights.load_params(model, family, stored)
    with jax.set_mesh(sharding.make_mesh('fsdp:2,tensor:2', jax.devices()[:4])):
      split = weights.load_params(model, family, stored)
      gate = split['blocks']['1']['feed_forward']['gate']   # [repeats, E, D, F]
      assert {shard.data.shape[1] for shard in gate.addressable_shards} == {2}
      assert jax.tree.all(jax.tree.map(np.array_equal, split, params))


def test_every_family_has_a_fixture_whose_norms_have_an_epsilon_of_its_own():
  """Multimodal families are covered by the fixture of their language model."""
  configs = [json.loads((folder / 'config.json').read_text()) for folder in FOLDERS]
  families = [family for family in weights.FAMILIES if getattr(family.config, '__name__', None) == 'config']
  assert {family.architecture for family in families if not (
      family.architecture.endswith('Generation') and family.stacks is None)} == {
          architecture for config in configs for architecture in config['architectures']}
  names = ('rms_norm_eps', 'layer_norm_eps', 'layer_norm_epsilon')
  assert all(0.01 in [config.get(name) for name in names] for config in configs)
