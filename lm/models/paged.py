"""A cache whose rows have their keys and values in pages of a common pool, so that rows can share those of a prefix.

A pool is the cache of a model with pages in the place of rows: `model.init_cache(pages, size)`. Page 0 belongs to no
text; rows without a text write there. A row's slots are those of its pages, in the order of `Cache.pages_BM`, which has
M of them. A layer without keys and values for each slot, such as a recurrent one, has a row of its own as before.

A text is read into a cache of one row without pages, and then copied into pages; its next tokens go into the pages.
Shapes: the legend in `transformer.py`, P pages, S slots of a page, C entries of a latent.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import sharding
from lm.models import kernels
from lm.models.attention import LayerCache
from lm.models.kernels import AttentionScores, Visible
from lm.models.latent import LatentCache
from lm.models.transformer import Cache

_NONE = 2 ** 30   # the number of no page


def _places(visible: Visible, time: int, size: int) -> tuple[jax.Array, jax.Array]:
  """Returns the page and the slot in it of each of the next tokens of rows, both [B, T]."""
  slots = visible.start[:, None] + jnp.arange(time)[None]
  pages = jnp.take_along_axis(visible.pages_BM, jnp.minimum(slots // size, visible.pages_BM.shape[1] - 1), axis=1)
  return pages, slots % size


def _into_pages(pool: jax.Array, row: jax.Array, pages_M: jax.Array, axis: int) -> jax.Array:
  """Returns the pool with the slots of `row`, along its `axis`, in these pages; a page that it has not is left out."""
  parts = jnp.stack(jnp.split(row[0], len(pages_M), axis - 1))
  return pool.at[pages_M].set(parts, mode='drop')


def _from_pages(pool: jax.Array, pages_M: jax.Array, count: jax.Array, axis: int) -> jax.Array:
  """Returns a row of as many slots as the pages have, [1, ...], with the contents of the first `count` pages."""
  shape = list(pool.shape[1:])
  size = shape[axis - 1]
  shape[axis - 1] *= len(pages_M)

  def copy(i, row):
    return jax.lax.dynamic_update_slice_in_dim(row, pool[pages_M[i]], i * size, axis - 1)

  return jax.lax.fori_loop(0, count, copy, jnp.zeros(shape, pool.dtype))[None]


class LayerPages(NamedTuple):
  """Keys and values of one layer, in pages."""
  k_PKSH: jax.Array
  v_PKSH: jax.Array

  def attend(self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: Visible, scores: AttentionScores,
             sinks_N: jax.Array | None = None) -> tuple[jax.Array, 'LayerPages']:
    """Like `LayerCache.attend`."""
    pages, slots = _places(visible, k_BTKH.shape[1], self.k_PKSH.shape[2])
    cache = LayerPages(*(pool.at[pages, :, slots].set(new.astype(pool.dtype))
                         for pool, new in zip(self, (k_BTKH, v_BTKH))))
    return kernels.paged(q_BTNH, *cache, visible, scores, sinks_N), cache

  def copy_in(self, row: LayerCache, pages_M: jax.Array) -> 'LayerPages':
    """Returns pages with the keys and values of a row."""
    return LayerPages(*(_into_pages(pool, x, pages_M, 2) for pool, x in zip(self, row)))

  def copy_out(self, pages_M: jax.Array, count: jax.Array) -> LayerCache:
    """Returns a row with the keys and values of the first `count` of its pages."""
    return LayerCache(*(_from_pages(pool, pages_M, count, 2) for pool in self))


class LatentPages(NamedTuple):
  """Latents of one layer, in pages."""
  latent_PSC: jax.Array

  def attend(self, q_BTNC: jax.Array, latent_BTC: jax.Array, visible: Visible, scores: AttentionScores
             ) -> tuple[jax.Array, 'LatentPages']:
    """Like `LatentCache.attend`."""
    pages, slots = _places(visible, latent_BTC.shape[1], self.latent_PSC.shape[1])
    cache = LatentPages(self.latent_PSC.at[pages, slots].set(latent_BTC.astype(self.latent_PSC.dtype)))
    latents_P1SC = cache.latent_PSC[:, None]
    return kernels.paged(q_BTNC, latents_P1SC, latents_P1SC, visible, scores), cache

  def copy_in(self, row: LatentCache, pages_M: jax.Array) -> 'LatentPages':
    """Returns pages with the latents of a row."""
    return LatentPages(_into_pages(self.latent_PSC, row.latent_BSC, pages_M, 1))

  def copy_out(self, pages_M: jax.Array, count: jax.Array) -> LatentCache:
    """Returns a row with the latents of the first `count` of its pages."""
    return LatentCache(_from_pages(self.latent_PSC, pages_M, count, 1))


_PAGES_OF = {LayerCache: LayerPages, LatentCache: LatentPages}


def init_cache(model: Any, rows: int, pages: int, size: int, blocks: int) -> Cache:
  """Returns an empty cache of rows with `blocks` pages each, from a pool of `pages` pages of `size` slots.

  Raises:
    ValueError: the mesh splits rows, or the model's cache is of another kind.
  """
  pool, own = model.init_cache(pages, size), model.init_cache(rows, blocks * size)
  if not isinstance(own, Cache):
    raise ValueError(f'a cache of class {type(own).__name__} cannot have pages; leave out pages')
  if sharding.parts('B') > 1:
    raise ValueError('the pages of a cache belong to all rows, and the mesh splits the rows; leave out pages')
  layers = tuple(_PAGES_OF[type(layer)](*layer) if type(layer) in _PAGES_OF else row
                 for layer, row in zip(pool.layers, own.layers))
  return own._replace(layers=layers, pages_BM=jnp.zeros((rows, blocks), jnp.int32))


def has_all_in_pages(cache: Cache) -> bool:
  """Returns whether all that a cache knows of a text is in its pages, so that a prefix can be shared."""
  return all(isinstance(layer, tuple(_PAGES_OF.values())) for layer in cache.layers)


def insert(cache: Cache, new: Cache, row: jax.Array, pages_M: jax.Array, is_new_M: jax.Array) -> Cache:
  """Returns `cache` with a row replaced by the only row of `new`, a cache without pages.

  `pages_M` are the pages of the row. Those of which `is_new_M` is not true have their keys and values already.
  """
  targets = jnp.where(is_new_M, pages_M, _NONE)
  layers = []
  for layer, new_layer in zip(cache.layers, new.layers):
    if isinstance(layer, tuple(_PAGES_OF.values())):
      layers.append(layer.copy_in(new_layer, targets))
    else:
      layers.append(sharding.insert_rows(layer, new_layer, row[None]))
  rows = sharding.insert_rows(cache._replace(layers=(), pages_BM=None), new._replace(layers=()), row[None])
  return rows._replace(layers=tuple(layers), pages_BM=cache.pages_BM.at[row].set(pages_M))


def read_prefix(cache: Cache, pages_M: jax.Array, count: jax.Array) -> Cache:
  """Returns a cache of one row without pages, with the contents of the first `count` of these pages."""
  slots = jnp.arange(cache.segments_BS.shape[1])[None]
  filled = count * (slots.size // len(pages_M))
  layers = tuple(layer.copy_out(pages_M, count) for layer in cache.layers)
  return Cache(layers, (slots < filled).astype(jnp.int32), slots, jnp.reshape(filled, (1,)))


def release(cache: Cache, is_free_B: jax.Array) -> Cache:
  """Returns the cache with rows that have no pages any more."""
  return cache._replace(pages_BM=jnp.where(is_free_B[:, None], 0, cache.pages_BM))
