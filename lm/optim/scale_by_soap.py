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
  """The eigenbasis of one side of a stack of matrices.

  Attributes:
    second_moment: the running mean of G G^T for the left side, of G^T G for the right one, [..., n, n].
    vectors: its eigenvectors as columns, as of their last update, [..., n, n].
  """
  second_moment: jax.Array
  vectors: jax.Array


class SoapState(NamedTuple):
  """The state of SOAP.

  Attributes:
    count: the number of updates.
    mean: the running mean of the gradient.
    square: the running mean of the square of the gradient in the eigenbasis.
    bases: a pair (left, right) for each parameter; None for a side that is not rotated.
  """
  count: jax.Array
  mean: Any
  square: Any
  bases: Any


def scale_by_soap(weights: Any, b1: float, b2: float, eps: float, precondition_every: int, max_dim: int
                  ) -> optax.GradientTransformation:
  """Returns a transformation by SOAP for the matrices inside layers, and by Adam for other parameters.

  Let G be the gradient of a matrix [m, n] of one layer or expert, L and R the running means of G G^T and G^T G with the
  decay `b2`, and Q_L and Q_R their eigenvectors. The update is Q_L Adam(Q_L^T G Q_R) Q_R^T, where the mean of Adam is
  kept outside the basis. Every `precondition_every` steps, the eigenvectors are updated by a step of the power method,
  Q = qr(L Q). As in the authors' code, the first gradient only initialises the bases, and parameters stay as they are.

  The mean and the square are sharded as the parameters. Each device holds L, R and their eigenvectors whole, which are
  2 m^2 + 2 n^2 numbers for each matrix, and whole gradients of the matrices.

  Args:
    weights: the declarations of the parameters.
    b1: the decay of the mean of the gradient.
    b2: the decay of the mean of its square, and of L and R.
    eps: is added to the root of the mean square.
    precondition_every: steps between updates of the eigenvectors.
    max_dim: a side with more rows or columns is not rotated.
  """
  def init(params):
    return SoapState(jnp.int32(0), optax.tree.zeros_like(params), optax.tree.zeros_like(params),
                     jax.tree.map(functools.partial(_empty_bases, max_dim), weights, params))

  def update(updates, state, params=None):
    del params
    # 0: this is the first gradient; 1: the eigenvectors are updated after this step; 2: they stay.
    stage = jnp.where(state.count == 0, 0, jnp.where(state.count % precondition_every == 0, 1, 2))
    mean = optax.tree.where(state.count == 0, state.mean, optax.tree.update_moment(updates, state.mean, b1, 1))
    steps = jnp.maximum(state.count, 1).astype(jnp.float32)
    correction = jnp.sqrt(1 - b2 ** steps) / (1 - b1 ** steps)

    def leaf(weight, grad, mean, square, bases):
      form = functools.partial(_as_matrices, weight) if any(bases) else lambda x: x
      g, m, v = form(grad), form(mean), form(square)
      v = jnp.where(state.count == 0, v, b2 * v + (1 - b2) * jnp.square(_rotate(g, bases)))
      step = _rotate(m, bases) * correction / (jnp.sqrt(v) + eps * jnp.sqrt(1 - b2 ** steps))
      step = jnp.where(state.count == 0, 0., _rotate_back(step, bases))
      sides = zip(bases, (g, g.mT)) if any(bases) else ()
      bases = tuple(basis and _update_basis(basis, x, b2, stage) for basis, x in sides) or bases
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


def _empty_bases(max_dim: int, weight: Weight, param: jax.Array) -> tuple[Basis | None, Basis | None]:
  """Returns bases of zeros for the sides of a parameter that are rotated."""
  if not groups.is_hidden(weight):
    return None, None
  *leading, rows, columns = jax.eval_shape(functools.partial(_as_matrices, weight), param).shape
  return tuple(None if n > max_dim else Basis(*jnp.zeros((2, *leading, n, n))) for n in (rows, columns))


def _as_matrices(weight: Weight, x: jax.Array) -> jax.Array:
  """Returns an array of the shape of a parameter as [layers, ..., inputs, outputs], whole on each device."""
  first, output = weight.matrix_axes
  return groups.replicated(x).reshape(*x.shape[:first], math.prod(x.shape[first:output]), math.prod(x.shape[output:]))


def _like(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns an array with the shape and the sharding of another one."""
  return groups.laid_out_like(x.reshape(like.shape) if x.shape != like.shape else x, like)


def _rotate(x: jax.Array, bases: tuple[Basis | None, Basis | None]) -> jax.Array:
  """Returns matrices in the bases: Q_L^T X Q_R."""
  rows, columns = bases
  x = x if rows is None else _multiply(rows.vectors.mT, x)
  return x if columns is None else _multiply(x, columns.vectors)


def _rotate_back(x: jax.Array, bases: tuple[Basis | None, Basis | None]) -> jax.Array:
  """Returns matrices that are given in the bases: Q_L X Q_R^T."""
  rows, columns = bases
  x = x if rows is None else _multiply(rows.vectors, x)
  return x if columns is None else _multiply(x, columns.vectors.mT)


def _update_basis(basis: Basis, x: jax.Array, decay: float, stage: jax.Array) -> Basis:
  """Returns the basis after a gradient [..., n, m]; the stages are those of `scale_by_soap`."""
  moment = decay * basis.second_moment + (1 - decay) * _multiply(x, x.mT)
  # In descending order of the eigenvalues, in which the power method keeps them.
  eigenvectors = lambda x: jnp.linalg.eigh(x).eigenvectors[:, ::-1]
  orthogonalised = lambda x: jnp.linalg.qr(x).Q
  return Basis(moment, jax.lax.switch(stage, (
      lambda: _one_by_one(eigenvectors, moment),
      lambda: _one_by_one(orthogonalised, _multiply(moment, basis.vectors)),
      lambda: basis.vectors)))


def _one_by_one(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """Applies a function to each matrix in a loop: on CPU, batches of these functions in JAX 0.10 can wait for ever.

  JAX 0.10 runs a batch on the threads that its devices run in, and several devices can block one another.
  """
  return jax.lax.map(function, x.reshape(-1, *x.shape[-2:])).reshape(x.shape)
