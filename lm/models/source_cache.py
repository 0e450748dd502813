"""The cache of an encoder-decoder: keys and values of its tokens, and of its source. Shapes: see `transformer.py`."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.models.attention import LayerCache


class DecoderCache(NamedTuple):
  """The cache of a layer of the decoder: keys and values of its tokens, and of the source after it was read."""
  tokens: LayerCache
  source: LayerCache | None


class EncoderDecoderCache(NamedTuple):
  """The cache, like `transformer.Cache`. A batch with a source starts a text; a batch without one continues it."""
  layers: tuple[DecoderCache, ...]
  segments_BS: jax.Array
  source_segments_BS: jax.Array | None
  index: jax.Array

  def widened(self, width: int) -> 'EncoderDecoderCache':
    """Returns the cache with room for sources of `width` tokens. Raises ValueError if it has a wider one."""
    needed = self.source_segments_BS.shape[1]
    if needed > width:
      raise ValueError(f'a source of {needed} tokens (padded) does not fit a cache for sources of {width}; make the '
                       'cache of a longer source')

    def widen(x: Any, axis: int) -> Any:
      return jnp.pad(x, [(0, width - needed if i == axis else 0) for i in range(x.ndim)])

    layers = tuple(DecoderCache(layer.tokens, LayerCache(*(widen(x, 2) for x in layer.source)))
                   for layer in self.layers)
    return self._replace(layers=layers, source_segments_BS=widen(self.source_segments_BS, 1))
