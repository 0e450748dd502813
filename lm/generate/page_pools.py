"""The pages that a row takes: for layers that see the whole text, and for layers with a window, which have fewer.

A block is a part of a text that fills a page. Layers without a window need a page for each block. Layers with a window
have a pool of their own, and need fewer pages, because no later token sees a block that is behind the window:

* Pages of the prompt that are behind the window are given back as soon as the prompt is in them. Later prompts can use
  them until they are needed for something else.
* The pages of what the row writes are a ring: when the first of them is behind the window, the next block overwrites
  it. A mask hides what such a page still has of the earlier block.
"""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.generate.engine import CHUNK
from lm.generate.page_pool import PagePool


class Prefix(NamedTuple):
  """The pages of a stored prefix in each of the G pools; 0 where a block has no page."""
  count: int             # of its blocks
  pages_GM: np.ndarray   # of each block
  first_G: np.ndarray    # the first block whose page is needed by what follows


class RowPages(NamedTuple):
  """The pages of a row in each of the G pools; 0 where a block has no page."""
  pages_GM: np.ndarray           # of each block
  is_new_GM: np.ndarray          # whether the page has to be written from the prompt
  used_pages: tuple[list[int], ...]   # the pages that the row uses until it ends


def ring(window: int, size: int) -> int:
  """Returns the most pages that a row needs for what it writes under a window, up to CHUNK tokens at a time."""
  return -(-(window - 1 + max(size, CHUNK)) // size)


class PagePools:
  """The pool of layers that see the whole text, and that of layers with a window.

  Args:
    pages: the number of pages of each of the two; 0 for one that is not needed. Page 0 of each belongs to no text.
    window: the largest window of a layer; None if there is none.
    size: the number of slots of a page.
    blocks: the number of blocks of the longest text.
  """

  def __init__(self, pages: tuple[int, int], window: int | None, size: int, blocks: int):
    self._windows = (None,) if window is None else (None, window)
    self._pools = [PagePool(count) if count else None for count in pages[:len(self._windows)]]
    self._size, self._blocks = size, blocks

  @property
  def used(self) -> int:
    """The number of pages that rows use."""
    return sum(pool.used for pool in self._pools if pool is not None)

  @property
  def total(self) -> int:
    """The number of pages."""
    return sum(pool.total for pool in self._pools if pool is not None)

  @property
  def longest(self) -> int:
    """The number of tokens of the longest text that has room in the pages of layers without a window."""
    pool, *_ = self._pools
    return (self._blocks if pool is None else min(self._blocks, pool.total)) * self._size

  def _first(self, window: int | None, position: int) -> int:
    """Returns the first block that a token at this position sees."""
    return 0 if window is None else max(position - window + 1, 0) // self._size

  def _written(self, window: int | None, blocks: int) -> int:
    """Returns the number of pages for blocks that a row writes."""
    return blocks if window is None else min(blocks, ring(window, self._size))

  def check(self, full: int, length: int, total: int) -> None:
    """Raises ValueError if a text of `total` tokens needs more pages than there are.

    Its prompt has `length` tokens and `full` pages with keys.
    """
    for pool, window in zip(self._pools, self._windows):
      needed = full - min(self._first(window, length), full)
      needed += self._written(window, -(-total // self._size) - full)
      if pool is not None and needed > pool.total:
        raise ValueError(f'{length} tokens of a prompt and {total - length} new ones need {needed} pages, and there '
                         f'are {pool.total}; shorten one of them, or give more pages')

  def find(self, keys: Sequence[bytes]) -> Prefix:
    """Returns the longest prefix that is stored in all pools, given the keys of the full pages of a prompt."""
    stored = [[1] * len(keys) if pool is None else pool.find(keys) for pool in self._pools]
    count, first_G = len(keys), []
    while True:
      first_G = [self._first(window, count * self._size) for window in self._windows]
      if all(all(pages[first:count]) for pages, first in zip(stored, first_G)):
        break
      count -= 1
    pages_GM = np.zeros((len(stored), self._blocks), np.int32)
    for pool, row_M, pages, first in zip(self._pools, pages_GM, stored, first_G):
      if pool is not None:
        row_M[first:count] = pages[first:count]
    return Prefix(count, pages_GM, np.int32(first_G))

  def take(self, keys: Sequence[bytes], first_G: Sequence[int], length: int, total: int) -> RowPages | None:
    """Takes the pages of a row, for a text of `total` tokens with a prompt of `length`.

    The full pages of the prompt have `keys`, and the prompt is known from block `first_G` on. Returns None, and takes
    none, if there are too few.
    """
    full, end = len(keys), -(-total // self._size)
    parts = []   # of each pool: the first block with a page, the first that is needed, and the number that are written
    for pool, window, first in zip(self._pools, self._windows, first_G):
      needed, count = min(self._first(window, length), full), self._written(window, end - full)
      # Blocks before those that are needed are stored for later prompts, if there is room.
      starts = [start for start in (first, needed) if pool is None or pool.has(keys[start:], count)]
      if not starts:
        return None
      parts.append((starts[0], needed, count))
    pages_GM = np.zeros((len(self._pools), self._blocks), np.int32)
    is_new_GM, used_pages = pages_GM > 0, []
    for pool, window, (start, needed, count), row_M, is_new_M in zip(self._pools, self._windows, parts, pages_GM,
                                                                     is_new_GM):
      if pool is None:
        used_pages.append([])
        continue
      pages, is_stored = pool.take(keys[start:], count)
      row_M[start:full] = pages[:full - start]
      row_M[full:end] = np.resize(pages[full - start:], end - full)
      is_new_M[start:full] = np.logical_not(is_stored)
      written = max(full, self._first(window, length))
      # Pages after the prompt are written too, so that nothing of another text is in them.
      is_new_M[written:min(written + count, end)] = True
      pool.release(pages[:needed - start])
      used_pages.append(pages[needed - start:])
    return RowPages(pages_GM, is_new_GM, tuple(used_pages))

  def release(self, used_pages: Sequence[Sequence[int]]) -> None:
    """Ends the use of pages of each pool by a row."""
    for pool, pages in zip(self._pools, used_pages):
      if pool is not None:
        pool.release(pages)
