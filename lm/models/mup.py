"""A decoder whose best learning rate holds over width and depth, so that it is found on a small one.

muP (Yang et al. 2022, arXiv:2203.03466) with the depth of CompleteP (Dey et al. 2025, arXiv:2505.01618, alpha = 1), for
Adam and what steps as Adam does: an entry moves by about the rate, however large its gradient is. A multiplier m on
such a weight is the same as m times its initial values at m times its rate, so that there are none here: only initial
sizes, in `parametrised`, and factors of the learning rate, in `rates`. With n = width / base width and d = layers /
base layers:

                                       initial size                             rate
  embedding                            1                                        the same
  norms                                                                         the same
  query, key, value, gate, up          1 / sqrt(width)                          1 / n
  out and down, of a residual branch   1 / sqrt(width) / sqrt(2 base layers) / d    1 / (n d)
  head, untied                         0                                        1 / n

Attention's scores are 8 q k / H, of heads of size H, and not q k / sqrt(H); at H = 64 the two are the same.

Weight decay that is decoupled goes on at the rate of the schedule, without the factors: give these to an optimizer as
`groups.Rates(schedule, updates=rates(...))`. The gradients of matrices fall with width and depth, and Adam's eps, which
would have to fall with them, is best so small that it does not count. The embedding is as large as what norms give, so
that residual branches are small beside it at any depth; it may need a larger rate than the matrices at the base shape.
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
  """A decoder whose head starts at zero."""

  @nn.nowrap
  def init(self, key: jax.Array) -> dict:
    params = super().init(key)
    return {**params, 'head': jax.tree.map(jnp.zeros_like, params['head'])}


def parametrised(model: transformer.Transformer, base_width: int, base_layers: int) -> MupDecoder:
  """A `transformer.llama`, or a decoder like it, untied, with the initial sizes and the scores above."""
  width, layers = model.width, len(model.layers)
  _, d = _ratios(width, layers, base_width, base_layers)
  std = width ** -0.5
  out_std = std / math.sqrt(2 * base_layers) / d

  def scaled(block):
    attention = block.attention
    scores = dataclasses.replace(attention.scores, scale=8 / attention.head_size)
    return block.clone(attention=attention.clone(scores=scores, std=std, out_std=out_std),
                       feed_forward=block.feed_forward.clone(std=std, out_std=out_std))

  fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ('parent', 'name')}
  blocks = stack.stacks([scaled(block) for block in model.layers])
  return MupDecoder(**{**fields, 'blocks': blocks, 'tied': False, 'std': 1.})


def rates(width: int, layers: int, base_width: int, base_layers: int
          ) -> tuple[tuple[Callable[[Weight], bool], float], ...]:
  """The factors of the learning rate above, each with the weights that it is for, by what they declare."""
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
      raise ValueError(f'{name}={size} is not positive; give the shape that the learning rate is known for')
  return width / base_width, layers / base_layers
