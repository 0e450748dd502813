"""Shapes by name have the parameters of the published models, and each number can be replaced."""
import typing

import jax
import pytest
from absl import flags

from lm import launch, options, sharding
from lm.options.sizes import Name

# Of the published weights: a tied head counts once. GPT-2's are with 1024 positions.
PUBLISHED = {'gpt2-small': 124_439_808, 'gpt2-medium': 354_823_168, 'gpt2-large': 774_030_080,
             'gpt2-xl': 1_557_611_200, 'llama-1b': 1_235_814_400, 'llama-3b': 3_212_749_824,
             'llama-8b': 8_030_261_248, 'llama2-7b': 6_738_415_616, 'tinyllama-1b': 1_100_048_384,
             'mistral-7b': 7_241_732_096, 'smollm2-135m': 134_515_008, 'smollm2-360m': 361_821_120,
             'smollm2-1.7b': 1_711_376_384}
DEFAULT = options.Size('llama', layers=2, width=64, heads=2, vocab=320)


def shaped(*, shape: options.Shape = options.Shape()): ...   # noqa: B008


@pytest.mark.parametrize('name', typing.get_args(Name))
def test_a_size_has_as_many_parameters_as_the_published_model(name):
  shape = options.Shape(size=name)
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh('data:1,model:1')):
    model = shape.decoder(DEFAULT, shape.resolved(DEFAULT).vocab, 1024)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init(jax.random.key(0))))
  assert sum(leaf.size for leaf in leaves) == PUBLISHED[name]


def test_each_number_of_a_size_can_be_replaced():
  assert options.Shape().resolved(DEFAULT) == DEFAULT
  assert options.Shape(layers=3).resolved(DEFAULT) == options.Size('llama', 3, 64, 2, vocab=320)
  shape = options.Shape(size='llama-1b', layers=2, width=64, heads=8, kv_heads=4, hidden=96, tied=False, rope_theta=1e4)
  model = shape.decoder(DEFAULT, 320, 32)
  block = model.layers[0]
  assert (len(model.layers), model.width, model.tied, model.vocab) == (2, 64, False, 320)
  assert (block.attention.heads, block.attention.kv_heads, block.feed_forward.hidden) == (8, 4, 96)
  assert options.Shape(size='llama-1b', architecture='gpt2').resolved(DEFAULT).hidden is None


def test_what_a_shape_does_not_have_is_refused():
  with pytest.raises(flags.Error, match=r'--size=gpt3: expected gpt2-small \| gpt2-medium .* \| smollm2-1.7b'):
    launch.parse([shaped], ['script.py', '--size=gpt3'])
  with pytest.raises(ValueError, match='--kv_heads=2 is for --architecture=llama, and this is gpt2'):
    options.Shape(architecture='gpt2', kv_heads=2).resolved(DEFAULT)
  with pytest.raises(ValueError, match='--model=x gives the shape of the model, and --layers=3 is given too'):
    options.Shape(layers=3).refuse(DEFAULT, '--model=x')
