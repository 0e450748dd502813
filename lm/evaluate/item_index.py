"""Words of texts, and an index of the words of evaluation items in which those of training text are looked up.

The memory that it takes depends on the items alone. A word is what the 13-word rule of GPT-3 (arXiv:2005.14165,
appendix C) compares: lower case, without punctuation, and between white space. In scripts that put no spaces between
words, such as Chinese, Japanese and Thai, each character is a word.
"""
import functools
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 500     # words up to which a match is counted
BLOCK = 1 << 20   # characters of a document that are looked up at once
_NO_SPACES = ('\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0edf\u1000-\u1049\u1780-\u17d3'   # Thai to Khmer
              '\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d'   # kana
              '\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff')   # Chinese characters
_PIECE = re.compile(f'[{_NO_SPACES}]|[^\\s{_NO_SPACES}]+')
_IS_UNSPACED = re.compile(f'[{_NO_SPACES}]')
_SPACE = re.compile(r'\s')
_UNKNOWN = -1     # of a word that no item has


@functools.cache
def _deletions() -> dict[int, None]:
  """Returns the characters that are no part of words: punctuation, symbols, and those that are not shown."""
  return {code: None for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in 'PS'
          or unicodedata.category(chr(code)) == 'Cf'}


def words(text: str) -> list[str]:
  """Returns the words of a text, as they are compared."""
  text = text if text.isascii() else unicodedata.normalize('NFC', text)
  text = text.casefold().translate(_deletions())
  return _PIECE.findall(text) if _IS_UNSPACED.search(text) else text.split()


def places(text: str) -> list[tuple[str, int, int]]:
  """Returns each word of a text, which has to be in the form NFC, with its first character and the one after it."""
  pieces = ((piece[0].casefold().translate(_deletions()), *piece.span()) for piece in _PIECE.finditer(text))
  return [piece for piece in pieces if piece[0]]


class Counts(NamedTuple):
  """What the documents so far had of the items, changed in place; a search that stops goes on from it."""
  documents: np.ndarray   # [grams]: documents that have a gram
  longest: np.ndarray     # [words of all items]: words of the longest match recorded at a suffix, by rank


class ItemIndex:
  """Words of items: their n-grams, and a suffix array in which the longest match at a place is looked up.

  Args:
    texts: the items.
    gram: words of the n-grams that are counted.
    shortest: words of the shortest match that is looked for.
  """

  def __init__(self, texts: Sequence[str], gram: int, shortest: int):
    self.texts = [unicodedata.normalize('NFC', text) for text in texts]
    self.places = [places(text) for text in self.texts]
    self.gram, self.shortest = gram, shortest
    vocabulary: dict[str, int] = {}
    ids, self.starts = [], []
    for i, item in enumerate(self.places):
      self.starts.append(len(ids))
      ids += [vocabulary.setdefault(word, len(vocabulary)) for word, _, _ in item]
      ids.append(-2 - i)   # ends the item, and equals no word and no other end
    self._vocabulary = vocabulary
    self._ids = np.array(ids)
    self._order, self._rank = _suffix_array(self._ids)
    # For plain loops, which are faster on lists.
    self._id_list, self._order_list = ids, self._order.tolist()
    self._codes = np.random.default_rng(0).integers(1 << 63, size=len(vocabulary) + 1, dtype=np.uint64)
    hashes = self._hashes(np.maximum(self._ids, -1), gram)
    self._grams, self._gram_places, self.gram_numbers = np.unique(hashes, return_index=True, return_inverse=True)
    self._seeds = np.unique(self._hashes(np.maximum(self._ids, -1), shortest))

  def counts(self) -> Counts:
    """Returns counts of no documents."""
    return Counts(np.zeros(len(self._grams), np.int64), np.zeros(len(self._ids), np.int64))

  def add(self, document: str, counts: Counts) -> None:
    """Adds what a document has of the items."""
    before, grams = np.zeros(0, np.int64), []
    for block in _blocks(document):
      new = map(self._vocabulary.get, words(block), itertools.repeat(_UNKNOWN))
      ids = np.concatenate([before, np.fromiter(new, np.int64)])
      before = ids[-LONGEST:]   # a match may begin there
      grams.append(self._grams_of(ids))
      starts = self._matches(ids, self.shortest, self._seeds)[0]
      plain = [*ids.tolist(), _UNKNOWN]
      for start in starts.tolist():
        place, length = self._longest_at(plain, start)
        counts.longest[place] = max(counts.longest[place], length)
    counts.documents[np.unique(np.concatenate(grams))] += 1

  def longest_matches(self, counts: Counts) -> np.ndarray:
    """Returns the words of the longest match that begins at each word of all items, [words]; see `starts`.

    0 where it has fewer than `shortest` words, of which not all are known.
    """
    common = _common_prefixes(self._id_list, self._order_list, self._rank.tolist())
    lengths = counts.longest.tolist()
    for ranks in range(1, len(lengths)), range(len(lengths) - 2, -1, -1):
      step = ranks.step
      for rank in ranks:   # neighbours in the order of suffixes share a match up to their common prefix
        lengths[rank] = max(lengths[rank], min(lengths[rank - step], common[max(rank, rank - step)]))
    lengths = np.array(lengths)[self._rank]
    return np.where(lengths < self.shortest, 0, lengths)

  def _grams_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns the numbers of the grams of items that words have; each match of hashes is checked word by word."""
    places, numbers = self._matches(ids, self.gram, self._grams)
    window = np.arange(self.gram)
    same = (ids[places[:, None] + window] == self._ids[self._gram_places[numbers][:, None] + window]).all(1)
    return numbers[same]

  def _matches(self, ids: np.ndarray, size: int, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where words have a gram whose hash is in `hashes`, which are sorted, and its number there."""
    if len(ids) < size:
      return np.zeros(0, np.int64), np.zeros(0, np.int64)
    unknown = np.concatenate([[0], np.cumsum(ids == _UNKNOWN)])
    starts = np.flatnonzero(unknown[size:] == unknown[:-size])
    own = self._hashes(ids, size)[starts]
    numbers = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
    hit = hashes[numbers] == own
    return starts[hit], numbers[hit]

  def _hashes(self, ids: np.ndarray, size: int) -> np.ndarray:
    """Returns a 64-bit hash of the gram that begins at each place, also where it is cut off at the end, [places]."""
    codes = np.concatenate([self._codes[ids], np.zeros(size, np.uint64)])
    hashes = np.zeros(len(ids), np.uint64)
    for i in range(size):
      hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i:i + len(ids)]
    return hashes

  def _longest_at(self, words: list[int], start: int) -> tuple[int, int]:
    """Returns the rank of a suffix of an item that shares the most words with those from `start` on, and how many.

    Bisection in the suffix array; what the words share with both ends, they share with all between.
    """
    ids, order = self._id_list, self._order_list
    low, high, low_shared, high_shared = -1, len(order), 0, 0
    while high - low > 1:
      middle = (low + high) // 2
      shared, place = min(low_shared, high_shared), order[middle]
      while words[start + shared] == ids[place + shared]:
        shared += 1
        if shared == LONGEST:
          return middle, shared
      if words[start + shared] < ids[place + shared]:
        high, high_shared = middle, shared
      else:
        low, low_shared = middle, shared
    return (low, low_shared) if low_shared > high_shared else (high, high_shared)


def _blocks(document: str) -> Iterator[str]:
  """Yields parts of a document, cut at white space where there is some near."""
  start = 0
  while len(document) - start > BLOCK:
    space = _SPACE.search(document, start + BLOCK, start + BLOCK + 10_000)
    end = space.start() if space else start + BLOCK
    yield document[start:end]
    start = end
  yield document[start:]


def _suffix_array(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the suffixes of `ids` in order, and the rank of each (prefix doubling, Manber and Myers 1990)."""
  rank, width = np.unique(ids, return_inverse=True)[1], 1
  while True:
    following = np.full(len(ids), -1)
    following[:-width] = rank[width:]
    order = np.lexsort((following, rank))
    pairs = np.stack([rank[order], following[order]])
    new = np.concatenate([[0], np.cumsum((pairs[:, 1:] != pairs[:, :-1]).any(0))])
    rank = np.empty(len(ids), np.int64)
    rank[order] = new
    if new[-1] == len(ids) - 1:
      return order, rank
    width *= 2


def _common_prefixes(ids: list[int], order: list[int], rank: list[int]) -> list[int]:
  """Returns how many words each suffix, by rank, shares with the one before it in order (Kasai et al. 2001)."""
  common, shared = [0] * len(ids), 0
  for place, own in enumerate(rank):
    if own == 0:
      shared = 0
      continue
    other = order[own - 1]
    while ids[place + shared] == ids[other + shared]:   # ends of items differ
      shared += 1
    common[own] = shared
    shared = max(shared - 1, 0)
  return common
