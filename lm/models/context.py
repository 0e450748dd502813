"""The inputs that all blocks share in a forward pass, and their auxiliary outputs. Shape legend: `transformer.py`."""
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.models.kernels import Visible

# A function of a named activation and of the number of its layer, a traced scalar: `(x, layer) -> (new x, reading)`.
# The new x replaces x. The model returns the readings that are not None, stacked over the layers.
Tap = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]
Taps = tuple[tuple[str, Tap], ...]   # (name, tap)


class Aux(NamedTuple):
  """The auxiliary output of a block.

  `loss`, such as a router's load-balancing loss, is summed over layers and added to the mean loss of training.
  `metrics` are logged: name -> (sum, count). Both are added over layers, parts of a batch and devices before the sum is
  divided by the count.
  """
  loss: jax.Array | None = None
  metrics: Mapping[str, tuple[jax.Array, jax.Array]] = {}

  def plus(self, other: 'Aux') -> 'Aux':
    """Returns the sum of both."""
    metrics = dict(self.metrics)
    for name, pair in other.metrics.items():
      metrics[name] = tuple(map(jnp.add, metrics[name], pair)) if name in metrics else pair
    losses = [loss for loss in (self.loss, other.loss) if loss is not None]
    return Aux(sum(losses[1:], losses[0]) if losses else None, metrics)


class EncodedSource(NamedTuple):
  """The encoder's output, None if a cache has its keys and values, and which of its positions each query sees."""
  memory_BSD: jax.Array | None
  visible: Visible


@functools.partial(jax.tree_util.register_dataclass, meta_fields=['taps', 'readings'],
                   data_fields=['positions_BT', 'visible', 'key', 'source', 'layer'])
@dataclasses.dataclass(frozen=True)
class Context:
  """The inputs of a block other than the hidden states.

  Args:
    positions_BT: the position of each token in its document; None if blocks do not use positions (T5).
    visible: which keys each query sees. Its `segments_BT` number the documents of a row; 0 is padding.
    key: the block's key for dropout; None without dropout.
    source: the encoder's output, for a decoder that reads one.
    layer: the number of the layer; None without taps.
    taps: (name, function) of activations that are read or replaced.
    readings: the readings of this layer's taps so far, by name.
  """
  positions_BT: jax.Array | None
  visible: Visible
  key: jax.Array | None = None
  source: EncodedSource | None = None
  layer: jax.Array | None = None
  taps: Taps = ()
  readings: dict[str, Any] | None = None

  def keys(self, count: int) -> tuple[jax.Array | None, ...]:
    """Splits the block's key into `count` keys; each is None without dropout."""
    return (None,) * count if self.key is None else tuple(jax.random.split(self.key, count))

  def with_key(self, key: jax.Array | None) -> 'Context':
    return dataclasses.replace(self, key=key)

  def rows(self) -> tuple[Any, ...]:
    """Returns what is led by the rows of a batch."""
    return self.positions_BT, self.visible._replace(bias_NTS=None), self.source

  def with_rows(self, rows: tuple[Any, ...]) -> 'Context':
    """Returns the context with other rows in the place of `rows()`."""
    positions_BT, visible, source = rows
    visible = visible._replace(bias_NTS=self.visible.bias_NTS)
    return dataclasses.replace(self, positions_BT=positions_BT, visible=visible, source=source)

  def tap(self, name: str, x: jax.Array) -> jax.Array:
    """Passes the activation `name` through the taps of that name, and stores their readings."""
    for tapped, function in self.taps:
      if tapped == name:
        x, self.readings[name] = function(x, self.layer)
    return x

  def name(self, name: str, x: jax.Array) -> jax.Array:
    """Like `tap`, and names the activation for rematerialisation, whose policies choose what to keep by name."""
    return checkpoint_name(self.tap(name, x), name)


def read(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A tap that reads an activation without changing it."""
  del layer
  return x, x
