"""A cache whose rows have their keys and values in pages of a common pool, so that rows can share those of a prefix.

A pool is the cache of a model with pages in the place of rows: `model.init_cache(pages, size)`. Page 0 belongs to no
text; rows without a text write there. A row's slots are those of its pages, in the order of `Cache.pages_BM`, which has
M of them. Layers with a window have a pool of their own, and a table of their own, `Cache.window_pages_BM`, so that
their pages can be given back when they are behind the window. A layer without keys and values for each slot, such as a
recurrent one, has a row of its own as before.

A text is read into a cache of one row without pages, and then copied into pages; its next tokens go into the pages.
Shapes: the legend in `transformer.py`, P pages, S slots of a page, C entries of a latent.
"""
from collections.abc import Callable
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


def _from_pages(pool: jax.Array, pages_M: jax.Array, first: jax.Array, count: jax.Array, axis: int) -> jax.Array:
  """Returns a row of as many slots as the pages have, [1, ...], with the contents of pages `first` to `count` - 1."""
  shape = list(pool.shape[1:])
  size = shape[axis - 1]
  shape[axis - 1] *= len(pages_M)

  def copy(i, row):
    return jax.lax.dynamic_update_slice_in_dim(row, pool[pages_M[i]], i * size, axis - 1)

  return jax.lax.fori_loop(first, count, copy, jnp.zeros(shape, pool.dtype))[None]


def _on_shards(function: Callable[..., Any], like: Any, *args: Any) -> Any:
  """Calls a function whose result is laid out as `like`. On a mesh, each shard computes with its own heads."""
  if sharding.spec('B') is None:
    return function(*args)
  layout = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
  return jax.shard_map(function, out_specs=layout, check_vma=False)(*args)


class LayerPages(NamedTuple):
  """Keys and values of one layer, in pages."""
  k_PKSH: jax.Array
  v_PKSH: jax.Array

  def attend(self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: Visible, scores: AttentionScores,
             sinks_N: jax.Array | None = None) -> tuple[jax.Array, 'LayerPages']:
    """Like `LayerCache.attend`."""
    def local(cache, q, k, v, visible, sinks):
      pages, slots = _places(visible, k.shape[1], cache.k_PKSH.shape[2])
      cache = LayerPages(*(pool.at[pages, :, slots].set(new.astype(pool.dtype)) for pool, new in zip(cache, (k, v))))
      return kernels.paged(q, *cache, visible, scores, sinks), cache

    return _on_shards(local, (q_BTNH, self), self, q_BTNH, k_BTKH, v_BTKH, visible, sinks_N)

  def copy_in(self, row: LayerCache, pages_M: jax.Array) -> 'LayerPages':
    """Returns pages with the keys and values of a row."""
    return LayerPages(*(_into_pages(pool, x, pages_M, 2) for pool, x in zip(self, row)))

  def copy_out(self, pages_M: jax.Array, first: jax.Array, count: jax.Array) -> LayerCache:
    """Returns a row with the keys and values of its pages `first` to `count` - 1."""
    return LayerCache(*(_from_pages(pool, pages_M, first, count, 2) for pool in self))


class WindowPages(NamedTuple):
  """Keys and values of one layer with a window, in pages of the pool of such layers."""
  pages: LayerPages

  def attend(self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: Visible, scores: AttentionScores,
             sinks_N: jax.Array | None = None) -> tuple[jax.Array, 'WindowPages']:
    """Like `LayerCache.attend`."""
    visible = visible._replace(pages_BM=visible.window_pages_BM)
    y, pages = self.pages.attend(q_BTNH, k_BTKH, v_BTKH, visible, scores, sinks_N)
    return y, WindowPages(pages)

  def copy_in(self, row: LayerCache, pages_M: jax.Array) -> 'WindowPages':
    """Returns pages with the keys and values of a row."""
    return WindowPages(self.pages.copy_in(row, pages_M))

  def copy_out(self, pages_M: jax.Array, first: jax.Array, count: jax.Array) -> LayerCache:
    """Returns a row with the keys and values of its pages `first` to `count` - 1."""
    return self.pages.copy_out(pages_M, first, count)


class LatentPages(NamedTuple):
  """Latents of one layer, in pages."""
  latent_PSC: jax.Array

  def attend(self, q_BTNC: jax.Array, latent_BTC: jax.Array, visible: Visible, scores: AttentionScores
             ) -> tuple[jax.Array, 'LatentPages']:
    """Like `LatentCache.attend`."""
    def local(cache, q, latent, visible):
      pages, slots = _places(visible, latent.shape[1], cache.latent_PSC.shape[1])
      cache = LatentPages(cache.latent_PSC.at[pages, slots].set(latent.astype(cache.latent_PSC.dtype)))
      latents_P1SC = cache.latent_PSC[:, None]
      return kernels.paged(q, latents_P1SC, latents_P1SC, visible, scores), cache

    return _on_shards(local, (q_BTNC, self), self, q_BTNC, latent_BTC, visible)

  def copy_in(self, row: LatentCache, pages_M: jax.Array) -> 'LatentPages':
    """Returns pages with the latents of a row."""
    return LatentPages(_into_pages(self.latent_PSC, row.latent_BSC, pages_M, 1))

  def copy_out(self, pages_M: jax.Array, first: jax.Array, count: jax.Array) -> LatentCache:
    """Returns a row with the latents of its pages `first` to `count` - 1."""
    return LatentCache(_from_pages(self.latent_PSC, pages_M, first, count, 1))


_PAGES_OF = {LayerCache: LayerPages, LatentCache: LatentPages}
_PAGED = LayerPages, LatentPages, WindowPages


def obstacle(model: Any) -> str | None:
  """Returns why a cache of the model cannot have pages; None if it can."""
  if sharding.parts('B') > 1:
    return 'the mesh splits rows; one that splits heads alone, such as tensor:2, can have pages'
  if not isinstance(jax.eval_shape(lambda: model.init_cache(1, 1)), Cache):
    return f'the cache of {type(model).__name__} is not that of a decoder'
  return None


def windows(model: Any) -> tuple[int | None, ...]:
  """Returns the window of each layer of a decoder whose keys and values can be in `WindowPages`; None for others."""
  layers = jax.eval_shape(lambda: model.init_cache(1, 1)).layers
  blocks = getattr(model, 'layers', ())
  if len(blocks) != len(layers):   # it wraps another model
    return (None,) * len(layers)
  scores = [getattr(getattr(block, 'attention', None), 'scores', None) for block in blocks]
  return tuple(None if own is None or type(layer) is not LayerCache else own.window
               for own, layer in zip(scores, layers))


def init_cache(model: Any, rows: int, pages: tuple[int, int], size: int, blocks: int) -> Cache:
  """Returns an empty cache of rows with `blocks` pages each, of `size` slots.

  `pages` are those of the pools of layers without and with a window; 0 for a pool that no layer needs.

  Raises:
    ValueError: the cache cannot have pages.
  """
  reason = obstacle(model)
  if reason:
    raise ValueError(f'pages={max(pages)} are not possible: {reason}. Give pages=0')
  own = model.init_cache(rows, blocks * size)
  pool, window_pool = (model.init_cache(max(count, 1), size) for count in pages)

  def new(window, own, pages, window_pages):
    if window is not None:
      return WindowPages(LayerPages(*window_pages))
    return _PAGES_OF[type(pages)](*pages) if type(pages) in _PAGES_OF else own

  layers = tuple(map(new, windows(model), own.layers, pool.layers, window_pool.layers))
  table = sharding.constrain(jnp.zeros((rows, blocks), jnp.int32), 'B-')
  return own._replace(layers=layers, pages_BM=table, window_pages_BM=table if pages[1] else None)


def has_all_in_pages(cache: Cache) -> bool:
  """Returns whether all that a cache knows of a text is in its pages, so that a prefix can be shared."""
  return all(isinstance(layer, _PAGED) for layer in cache.layers)


def _without_tables(cache: Cache) -> Cache:
  return cache._replace(pages_BM=None, window_pages_BM=None)


def _of_layer(layer: Any, values_G: jax.Array) -> jax.Array:
  """Returns the value for the pool of a layer."""
  return values_G[int(isinstance(layer, WindowPages))]


def insert(cache: Cache, new: Cache, row: jax.Array, pages_GM: jax.Array, is_new_GM: jax.Array) -> Cache:
  """Returns `cache` with a row replaced by the only row of `new`, a cache without pages.

  `pages_GM` are the pages of the row, in the pool of layers without a window, and in that of layers with one if there
  are any. Those of which `is_new_GM` is not true have their keys and values already, or need none.
  """
  def local(cache, new, row, pages_GM, is_new_GM):
    targets_GM, layers = jnp.where(is_new_GM, pages_GM, _NONE), []
    for layer, new_layer in zip(cache.layers, new.layers):
      if isinstance(layer, _PAGED):
        layers.append(layer.copy_in(new_layer, _of_layer(layer, targets_GM)))
      else:
        layers.append(sharding.insert_rows(layer, new_layer, row[None]))
    rows = sharding.insert_rows(_without_tables(cache)._replace(layers=()), new._replace(layers=()), row[None])
    tables = [None if table is None else table.at[row].set(pages_M)
              for table, pages_M in zip((cache.pages_BM, cache.window_pages_BM), (pages_GM[0], pages_GM[-1]))]
    return rows._replace(layers=tuple(layers), pages_BM=tables[0], window_pages_BM=tables[1])

  return _on_shards(local, cache, cache, new, row, pages_GM, is_new_GM)


def read_prefix(cache: Cache, pages_GM: jax.Array, first_G: jax.Array, count: jax.Array) -> Cache:
  """Returns a cache of one row without pages, with the contents of the first `count` of these pages.

  Of a layer, the pages before `first_G`, which are behind its window, are left out.
  """
  def local(cache, pages_GM, first_G, count):
    slots = jnp.arange(cache.segments_BS.shape[1])[None]
    filled = count * (slots.size // pages_GM.shape[1])
    layers = tuple(layer.copy_out(_of_layer(layer, pages_GM), _of_layer(layer, first_G), count)
                   for layer in cache.layers)
    return Cache(layers, (slots < filled).astype(jnp.int32), slots, jnp.reshape(filled, (1,)))

  row_of = {LayerPages: LayerCache, LatentPages: LatentCache}
  layers = [layer.pages if isinstance(layer, WindowPages) else layer for layer in cache.layers]
  rows = tuple(row_of[type(layer)](*layer) for layer in layers)
  return _on_shards(local, _without_tables(cache)._replace(layers=rows), cache, pages_GM, first_G, count)


def release(cache: Cache, is_free_B: jax.Array) -> Cache:
  """Returns the cache with rows that have no pages any more."""
  tables = [None if table is None else jnp.where(is_free_B[:, None], 0, table)
            for table in (cache.pages_BM, cache.window_pages_BM)]
  return cache._replace(pages_BM=tables[0], window_pages_BM=tables[1])
