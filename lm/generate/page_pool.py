"""Which texts use which pages of a pool, and the pages of prefixes that later prompts can use again."""
import collections
import hashlib
from collections.abc import Sequence

import numpy as np


def prefix_keys(ids: np.ndarray, size: int, adapter: int = 0) -> list[bytes]:
  """Returns a key for each full page of a prompt, a hash of the number of its adapter and of all tokens up to its end.
  """
  keys, key = [], np.int32(adapter).tobytes()
  for end in range(size, len(ids) + 1, size):
    key = hashlib.sha256(key + np.int32(ids[end - size:end]).tobytes()).digest()
    keys.append(key)
  return keys


class PagePool:
  """The pages 1 to `pages` - 1 of a pool, each free, used by one or more texts, or idle.

  An idle page has the keys and values of a prefix and no user. When pages are needed, the least recently used ones are
  taken.
  """

  def __init__(self, pages: int):
    self._free = list(range(pages - 1, 0, -1))
    self._users: collections.Counter[int] = collections.Counter()
    self._page_of: dict[bytes, int] = {}
    self._key_of: dict[int, bytes] = {}
    self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()   # the least recently used first
    self.total = pages - 1

  @property
  def used(self) -> int:
    """The number of pages that texts use."""
    return self.total - len(self._free) - len(self._idle)

  def find(self, keys: Sequence[bytes]) -> list[int]:
    """Returns the page that is stored for each key; 0 where there is none."""
    return [self._page_of.get(key, 0) for key in keys]

  def has(self, keys: Sequence[bytes], count: int) -> bool:
    """Returns whether there are enough pages to take."""
    pages = self.find(keys)
    idle = sum(page in self._idle for page in pages)
    return pages.count(0) + count <= len(self._free) + len(self._idle) - idle

  def take(self, keys: Sequence[bytes], count: int) -> tuple[list[int], list[bool]]:
    """Takes pages for a text: one for each key, and then `count` without keys, which the pool has to have.

    Returns the pages, and for each key whether its page is stored already. The others have to be written at once,
    because they are found from then on.
    """
    pages = self.find(keys)
    is_stored = [page > 0 for page in pages]
    for page in pages:
      self._idle.pop(page, None)
    for i, key in enumerate(keys):
      if not is_stored[i]:
        pages[i] = self._next()
        self._page_of[key], self._key_of[pages[i]] = pages[i], key
    pages += [self._next() for _ in range(count)]
    self._users.update(pages)
    return pages, is_stored

  def _next(self) -> int:
    """Returns a free page, or the idle one that was used least recently, whose prefix is forgotten."""
    if self._free:
      return self._free.pop()
    page, _ = self._idle.popitem(last=False)
    del self._page_of[self._key_of.pop(page)]
    return page

  def release(self, pages: Sequence[int]) -> None:
    """Ends the use of pages by a text. Those of a prefix stay until others need them, its last page first."""
    for page in reversed(pages):
      self._users[page] -= 1
      if self._users[page]:
        continue
      del self._users[page]
      if page in self._key_of:
        self._idle[page] = None
      else:
        self._free.append(page)
