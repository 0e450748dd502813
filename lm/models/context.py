"""What the blocks of a model share in a forward pass, and what they report. Shape legend: `transformer.py`."""
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.models.kernels import Visible

# A function of a named activation and of the number of its layer, a traced scalar: `(x, layer) -> (new x, reading)`.
# The new x takes the place of x; a reading that is not None is returned by the model, stacked over the layers.
Tap = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]
Taps = tuple[tuple[str, Tap], ...]   # (name, tap)


class Aux(NamedTuple):
  """What a block reports beside its output.

  `loss` is added to the mean loss of training, summed over layers: of a router, say, that balances its experts.
  `metrics` are logged: name -> (sum, count), added over layers, parts of a batch and devices before they are divided.
  """
  loss: jax.Array | None = None
  metrics: Mapping[str, tuple[jax.Array, jax.Array]] = {}

  def plus(self, other: 'Aux') -> 'Aux':
    """What both report."""
    metrics = dict(self.metrics)
    for name, pair in other.metrics.items():
      metrics[name] = tuple(map(jnp.add, metrics[name], pair)) if name in metrics else pair
    losses = [loss for loss in (self.loss, other.loss) if loss is not None]
    return Aux(sum(losses[1:], losses[0]) if losses else None, metrics)


class EncodedSource(NamedTuple):
  """What a decoder's block reads of the encoder: its output, None where a cache has it, and which of it is seen."""
  memory_BSD: jax.Array | None
  visible: Visible


@functools.partial(jax.tree_util.register_dataclass, meta_fields=['taps', 'readings'],
                   data_fields=['positions_BT', 'visible', 'key', 'source', 'layer'])
@dataclasses.dataclass(frozen=True)
class Context:
  """What a block is given beside its input.

  Args:
    positions_BT: the place of each token in its document; None where the model has no positions in its blocks (T5).
    visible: which keys a query sees; its `segments_BT` say where documents begin, 0 being padding.
    key: for dropout, of this block; None without dropout.
    source: what a decoder reads of an encoder.
    layer: the number of the layer, where there are taps.
    taps: (name, function) of activations that are read or replaced.
    readings: what the taps of this layer have read so far.
  """
  positions_BT: jax.Array | None
  visible: Visible
  key: jax.Array | None = None
  source: EncodedSource | None = None
  layer: jax.Array | None = None
  taps: Taps = ()
  readings: dict[str, Any] | None = None

  def keys(self, count: int) -> tuple[jax.Array | None, ...]:
    """As many keys, split from the block's; None each without dropout."""
    return (None,) * count if self.key is None else tuple(jax.random.split(self.key, count))

  def with_key(self, key: jax.Array | None) -> 'Context':
    return dataclasses.replace(self, key=key)

  def tap(self, name: str, x: jax.Array) -> jax.Array:
    """The activation `name`, as the taps of that name leave it."""
    for tapped, function in self.taps:
      if tapped == name:
        x, self.readings[name] = function(x, self.layer)
    return x

  def name(self, name: str, x: jax.Array) -> jax.Array:
    """As `tap`, of an activation that rematerialisation may keep by its name."""
    return checkpoint_name(self.tap(name, x), name)


def read(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The tap that returns an activation and leaves it as it is."""
  del layer
  return x, x
