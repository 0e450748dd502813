"""Shapes by name have the parameters of the published models, and each number can be replaced."""
import json
import math
import typing

import jax
import pytest
from absl import flags
from helpers.published_configs import CONFIGS

from lm import launch, options, sharding
from lm.hf import weights
from lm.options.sizes import Name

# The published config of each size. GPT-2's has 1024 positions, which are parameters.
MODELS = {'gpt2-small': 'gpt2', 'gpt2-medium': 'gpt2-medium', 'gpt2-large': 'gpt2-large', 'gpt2-xl': 'gpt2-xl',
          'llama-1b': 'Llama-3.2-1B', 'llama-3b': 'Llama-3.2-3B', 'llama-8b': 'Llama-3.1-8B',
          'llama2-7b': 'Llama-2-7b-hf', 'tinyllama-1b': 'TinyLlama-1.1B-Chat-v1.0', 'mistral-7b': 'Mistral-7B-v0.1',
          'mistral-nemo-12b': 'Mistral-Nemo-Base-2407', 'smollm2-135m': 'SmolLM2-135M',
          'smollm2-360m': 'SmolLM2-360M', 'smollm2-1.7b': 'SmolLM2-1.7B-Instruct', 'qwen3-0.6b': 'Qwen3-0.6B',
          'qwen3-1.7b': 'Qwen3-1.7B', 'qwen3-4b': 'Qwen3-4B', 'qwen3-8b': 'Qwen3-8B', 'qwen3-32b': 'Qwen3-32B'}
DEFAULT = options.Size('llama', layers=2, width=64, heads=2, vocab=320)


def shaped(*, shape: options.Shape = options.Shape()): ...   # noqa: B008


def parameters(model):
  """Returns the shape of each parameter by its path. Nothing is allocated."""
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh('fsdp:1,tensor:1')):
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize('name', typing.get_args(Name))
def test_a_size_is_the_shape_of_the_published_model(name, tmp_path):
  """The parameters and the rotary frequencies are those of the model that `hf` opens by the published config."""
  config, count = CONFIGS[MODELS[name]]
  (tmp_path / 'config.json').write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
  published, _ = weights.open_model(tmp_path)
  shape = options.Shape(size=name)
  model = shape.decoder(DEFAULT, shape.resolve(DEFAULT).vocab, 1024)
  assert parameters(model) == parameters(published)
  assert sum(map(math.prod, parameters(model).values())) == count
  rotaries = model.layers[0].attention.rotary, published.layers[0].attention.rotary
  assert rotaries == (None, None) or rotaries[0].theta == rotaries[1].theta


def test_each_number_of_a_size_can_be_replaced():
  assert options.Shape().resolve(DEFAULT) == DEFAULT
  assert options.Shape(layers=3).resolve(DEFAULT) == options.Size('llama', 3, 64, 2, vocab=320)
  shape = options.Shape(size='llama-1b', layers=2, width=64, heads=8, kv_heads=4, hidden=96, tied=False, rope_theta=1e4)
  model = shape.decoder(DEFAULT, 320, 32)
  block = model.layers[0]
  assert (len(model.layers), model.width, model.tied, model.vocab) == (2, 64, False, 320)
  assert (block.attention.heads, block.attention.kv_heads, block.feed_forward.hidden) == (8, 4, 96)
  assert options.Shape(size='llama-1b', architecture='gpt2').resolve(DEFAULT).hidden is None
  attention = options.Shape(size='qwen3-0.6b', head_size=6, qk_norm=False).decoder(DEFAULT, 320, 32).layers[0].attention
  assert (attention.head_size, attention.query_norm, attention.key_norm) == (6, None, None)


def test_what_a_shape_does_not_have_is_refused():
  with pytest.raises(flags.Error, match=r'--size=gpt3: expected gpt2-small \| gpt2-medium .* \| qwen3-32b'):
    launch.parse([shaped], ['script.py', '--size=gpt3'])
  with pytest.raises(ValueError, match='--kv_heads=2 is for --architecture=llama, and this is gpt2'):
    options.Shape(architecture='gpt2', kv_heads=2).resolve(DEFAULT)
  with pytest.raises(ValueError, match='--qk_norm=True is for --architecture=llama, and this is gpt2'):
    options.Shape(architecture='gpt2', qk_norm=True).resolve(DEFAULT)
  with pytest.raises(ValueError, match='head_size=3 gives heads of size 3; rotary positions need an even size'):
    options.Shape(head_size=3).decoder(DEFAULT, 320, 32)
  with pytest.raises(ValueError, match='--model=x gives the shape of the model, and --layers=3 is given too'):
    options.Shape(layers=3).refuse(DEFAULT, '--model=x')
