"""SOAP (Vyas et al. 2024, arXiv:2409.11321): Adam in the eigenbasis of Shampoo's preconditioner."""
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.declarations import Weight
from lm.optim import groups


class Basis(NamedTuple):
  """Of one side of a stack of matrices: [..., n, n] both."""
  second_moment: jax.Array   # the running mean of G G^T, or of G^T G
  vectors: jax.Array         # its eigenvectors, as columns, as they were last computed


class SoapState(NamedTuple):
  count: jax.Array
  mean: Any     # of the gradient
  square: Any   # of the square of the gradient, in the basis
  bases: Any    # for each parameter (left, right); None for a side that stays as it is


def scale_by_soap(weights: Any, b1: float, b2: float, eps: float, precondition_every: int, max_dim: int
                  ) -> optax.GradientTransformation:
  """SOAP for the matrices inside layers, of each layer, expert by expert; Adam for all else.

  `weights` are the declarations of the parameters.

  With G the gradient of a matrix [m, n], L = mean of G G^T, R = mean of G^T G (both running, of decay `b2`), Q_L and
  Q_R their eigenvectors: the update is Q_L Adam(Q_L^T G Q_R) Q_R^T, where Adam's mean is kept outside the basis. The
  eigenvectors follow by a step of the power method, Q = qr(L Q), every `precondition_every` steps. A side of more than
  `max_dim` keeps the identity. As in the authors' code, the first gradient makes the bases alone, and nothing moves.

  The mean and the square are laid out as the parameters. L, R and their eigenvectors, 2 m^2 + 2 n^2 numbers a matrix,
  are whole on each device, as is the gradient of the matrices.
  """
  def init(params):
    return SoapState(jnp.int32(0), optax.tree.zeros_like(params), optax.tree.zeros_like(params),
                     jax.tree.map(functools.partial(_no_bases, max_dim), weights, params))

  def update(updates, state, params=None):
    del params
    # 0: the first gradient; 1: the basis follows after this step; 2: it stays.
    stage = jnp.where(state.count == 0, 0, jnp.where(state.count % precondition_every == 0, 1, 2))
    mean = optax.tree.where(state.count == 0, state.mean, optax.tree.update_moment(updates, state.mean, b1, 1))
    steps = jnp.maximum(state.count, 1).astype(jnp.float32)
    correction = jnp.sqrt(1 - b2 ** steps) / (1 - b1 ** steps)

    def leaf(weight, grad, mean, square, bases):
      whole = functools.partial(_as_matrices, weight) if any(bases) else lambda x: x
      g, m, v = whole(grad), whole(mean), whole(square)
      v = jnp.where(state.count == 0, v, b2 * v + (1 - b2) * jnp.square(_rotated(g, bases)))
      step = _rotated(m, bases) * correction / (jnp.sqrt(v) + eps * jnp.sqrt(1 - b2 ** steps))
      step = jnp.where(state.count == 0, 0., _rotated_back(step, bases))
      sides = zip(bases, (g, g.mT)) if any(bases) else ()
      bases = tuple(basis and _followed(basis, x, b2, stage) for basis, x in sides) or bases
      return _Leaf(_like(step, grad), _like(v, square), bases)

    leaves = jax.tree.map(leaf, weights, updates, mean, state.square, state.bases)
    pick = lambda name: jax.tree.map(lambda x: getattr(x, name), leaves, is_leaf=lambda x: isinstance(x, _Leaf))
    return pick('step'), SoapState(state.count + 1, mean, pick('square'), pick('bases'))

  return optax.GradientTransformation(init, update)


class _Leaf(NamedTuple):
  step: jax.Array
  square: jax.Array
  bases: tuple[Basis | None, Basis | None]


_multiply = functools.partial(jnp.matmul, precision='highest')   # bases have to stay orthogonal


def _no_bases(max_dim: int, weight: Weight, param: jax.Array) -> tuple[Basis | None, Basis | None]:
  if not groups.is_hidden(weight):
    return None, None
  *leading, rows, columns = jax.eval_shape(functools.partial(_as_matrices, weight), param).shape
  return tuple(None if n > max_dim else Basis(*jnp.zeros((2, *leading, n, n))) for n in (rows, columns))


def _as_matrices(weight: Weight, x: jax.Array) -> jax.Array:
  """A parameter, or what is of its shape, as [layers, ..., inputs, outputs], whole on each device."""
  first, output = weight.matrix_axes
  return groups.whole(x).reshape(*x.shape[:first], math.prod(x.shape[first:output]), math.prod(x.shape[output:]))


def _like(x: jax.Array, like: jax.Array) -> jax.Array:
  return groups.laid_out_like(x.reshape(like.shape) if x.shape != like.shape else x, like)


def _rotated(x: jax.Array, bases: tuple[Basis | None, Basis | None]) -> jax.Array:
  left, right = bases
  x = x if left is None else _multiply(left.vectors.mT, x)
  return x if right is None else _multiply(x, right.vectors)


def _rotated_back(x: jax.Array, bases: tuple[Basis | None, Basis | None]) -> jax.Array:
  left, right = bases
  x = x if left is None else _multiply(left.vectors, x)
  return x if right is None else _multiply(x, right.vectors.mT)


def _followed(basis: Basis, x: jax.Array, decay: float, stage: jax.Array) -> Basis:
  """The basis after a gradient [..., n, m]: the first, one that follows, or the same."""
  moment = decay * basis.second_moment + (1 - decay) * _multiply(x, x.mT)
  # The largest first, to which the power method goes.
  first = lambda x: jnp.linalg.eigh(x).eigenvectors[:, ::-1]
  following = lambda x: jnp.linalg.qr(x).Q
  return Basis(moment, jax.lax.switch(stage, (
      lambda: _one_by_one(first, moment), lambda: _one_by_one(following, _multiply(moment, basis.vectors)),
      lambda: basis.vectors)))


def _one_by_one(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """As a loop: on CPU, JAX 0.10 gives a batch to the threads that its devices run in, and several wait forever."""
  return jax.lax.map(function, x.reshape(-1, *x.shape[-2:])).reshape(x.shape)
