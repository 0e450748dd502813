"""Which token the loss of an objective makes likelier at each position of a batch, whatever the model is.

The loss is given logits `hidden W` with a fixed random W, at hidden = 0. Its gradient with respect to the hidden state
of a position is then a multiple of mean(W) - W[label]: it tells the label, and is zero where the loss has no target.
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.models import Aux
from lm.models.head import Head
from lm.objectives.objective import Objective

WIDTH = 64   # of hidden states: enough to tell labels apart


class _Outputs(NamedTuple):
  """The outputs of no model: hidden states that are given, and a head."""
  hidden: jax.Array
  head: Head
  cache: None
  aux: Aux
  ahead: tuple[jax.Array, ...]   # of models that predict further tokens


class Labels(NamedTuple):
  """What the loss trains in a batch.

  Attributes:
    batch: the rows, in NumPy.
    trained_BT: whether a position has a gradient.
    directions_BTD: the direction of each gradient, of length 1; zero without a gradient.
    tokens_VD: the direction of each token, as a label.
  """
  batch: Batch
  trained_BT: np.ndarray
  directions_BTD: np.ndarray
  tokens_VD: np.ndarray

  def is_trained_on(self, ids_BT: np.ndarray) -> np.ndarray:
    """Returns whether the loss makes these tokens likelier, or less likely, bool [B, T]."""
    cosine = np.einsum('BTD,BTD->BT', self.directions_BTD, self.tokens_VD[ids_BT])
    return np.abs(cosine) > 0.9


def table(vocab: int) -> np.ndarray:
  """Returns W, float32 [V, D]."""
  return np.random.default_rng(1).choice(np.float32([-1, 1]), (vocab, WIDTH))


def read(batch: Batch, gradient_BTD: np.ndarray, vocab: int) -> Labels:
  """Returns what a gradient with respect to the hidden states says of the labels."""
  size, table_VD = np.linalg.norm(gradient_BTD, axis=-1), table(vocab)
  tokens = table_VD.mean(0) - table_VD
  return Labels(batch, size > 1e-7 * size.max(), gradient_BTD / np.maximum(size, 1e-30)[..., None],
                tokens / np.linalg.norm(tokens, axis=-1, keepdims=True))


def gradient(objective: Objective, depths: int) -> Callable[[jax.Array, Batch, Mapping[str, Any]], jax.Array]:
  """Returns a function `(W, batch, constants) -> gradient [B, T, D]`, to be compiled; `depths` is that of the model."""
  def of_hidden(table_VD, batch, constants):
    def loss(hidden):
      head = Head(sharding.gather(jnp.asarray(table_VD), 'VD'), vocab=len(table_VD))

      def apply(params, batch, **kwargs):
        del params, batch, kwargs
        return _Outputs(hidden, head, None, Aux(), (hidden,) * depths)
      return objective.loss(apply, dict(constants), batch, None)[0]

    zero = sharding.constrain(jnp.zeros((*batch.tokens.shape, WIDTH)), 'BTD')
    return sharding.constrain(jax.grad(loss)(zero), '---')   # every process reads all rows
  return of_hidden
