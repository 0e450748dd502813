"""A decoder whose best learning rate is the same at any width and depth, so that it can be found on a small model.

muP (Yang et al. 2022, arXiv:2203.03466) with the depth scaling of CompleteP (Dey et al. 2025, arXiv:2505.01618,
alpha = 1), for Adam and optimizers with similar steps: an entry changes by about the learning rate, whatever the size
of its gradient. There, a multiplier m on a weight is equivalent to m times its initial values and m times its learning
rate. So there are no multipliers here, only initial standard deviations, in `parametrised`, and factors of the learning
rate, in `rates`. With n = width / base width and d = layers / base layers:

                                       initial std                              learning rate
  embedding                            1                                        the same
  norms                                                                         the same
  query, key, value, gate, up          1 / sqrt(width)                          1 / n
  out and down, of a residual branch   1 / sqrt(width) / sqrt(2 base layers) / d    1 / (n d)
  head, untied                         0                                        1 / n

Attention scores are 8 q k / H for heads of size H, instead of q k / sqrt(H); the two are equal at H = 64.

Decoupled weight decay follows the schedule without these factors: pass them to an optimizer as
`groups.Rates(schedule, updates=rates(...))`. Gradients of matrices shrink with width and depth, so Adam's eps has to be
so small that it is negligible at any shape. The embedding is as large as the outputs of norms, so that residual
branches are small beside it at any depth; it may need a higher learning rate than the matrices at the base shape.
"""
import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.declarations import Role, Weight
from lm.models import stack, transformer


class MupDecoder(transformer.Transformer):
  """A decoder whose head is initialised to zero."""

  @nn.nowrap
  def init(self, key: jax.Array) -> dict:
    params = super().init(key)
    return {**params, 'head': jax.tree.map(jnp.zeros_like, params['head'])}


def parametrised(model: transformer.Transformer, base_width: int, base_layers: int) -> MupDecoder:
  """Returns a `transformer.llama`, or a decoder like it, untied, with the initial values and the scores above."""
  width, layers = model.width, len(model.layers)
  _, d = _ratios(width, layers, base_width, base_layers)
  std = width ** -0.5
  out_std = std / math.sqrt(2 * base_layers) / d

  def scaled(block):
    attention = block.attention
    scores = dataclasses.replace(attention.scores, scale=8 / attention.head_size)
    return block.clone(attention=attention.clone(scores=scores, std=std, out_std=out_std),
                       feed_forward=block.feed_forward.clone(std=std, out_std=out_std))

  fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(MupDecoder) if f.name not in ('parent', 'name')}
  blocks = stack.stacks([scaled(block) for block in model.layers])
  return MupDecoder(**{**fields, 'blocks': blocks, 'tied': False, 'std': 1.})


def rates(width: int, layers: int, base_width: int, base_layers: int
          ) -> tuple[tuple[Callable[[Weight], bool], float], ...]:
  """Returns pairs of a predicate, which selects weights by what they declare, and their factor of the learning rate."""
  n, d = _ratios(width, layers, base_width, base_layers)
  return (_is_head, 1 / n), (_is_matrix, 1 / n), (_adds_to_the_residual, 1 / d)


def _is_head(weight: Weight) -> bool:
  return weight.role is Role.HEAD


def _is_matrix(weight: Weight) -> bool:
  return weight.role in (Role.MATRIX, Role.ROUTER)


def _adds_to_the_residual(weight: Weight) -> bool:
  return weight.role is Role.MATRIX and weight.outputs == 'D'


def _ratios(width: int, layers: int, base_width: int, base_layers: int) -> tuple[float, float]:
  for name, size in {'base_width': base_width, 'base_layers': base_layers}.items():
    if size < 1:
      raise ValueError(f'{name}={size} is not positive; give the shape at which the learning rate was found')
  return width / base_width, layers / base_layers
