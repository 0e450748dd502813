"""Which evaluation items occur in training text, and whether scores on them differ.

Two signs, for each item, with words as `item_index` has them:

* the 13-word rule of GPT-3 (arXiv:2005.14165, appendix C): an item is dirty if any 13 of its words in a row occur in a
  training document. Those that occur in more than 10 documents are ignored, since these are mostly common phrases. An
  item of fewer than 13 words is neither clean nor dirty, but short;
* the longest match: how many words in a row, 8 at least, occur in a training document, and how many characters that is.
"""
import io
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import statistics
from lm.data.text import source
from lm.evaluate.item_index import LONGEST, Counts, ItemIndex
from lm.evaluate.measures import Measure
from lm.workdir import atomic

SHORTEST = 8     # words of a match that is worth a mention; GPT-3's smallest n
EVERY = 30       # seconds between two saves


class Item(NamedTuple):
  """An evaluation item."""
  id: str
  text: str


class Occurrence(NamedTuple):
  """What the training text has of an item."""
  id: str
  words: int         # of the item
  status: str        # clean, dirty or short
  matches: int       # n-grams of the item that occur, without those that are ignored
  ignored: int       # n-grams of the item that occur in too many documents
  longest: int       # words of the longest match; 0 where it has fewer than SHORTEST
  characters: int    # of the longest match, in the item
  excerpt: str       # the longest match, as the item has it


def search(items: Sequence[Item], documents: Sequence[str], words: int = 13, most_documents: int | None = 10,
           partial: pathlib.Path | None = None, key: Any = None, show: Callable[[int, int], None] = lambda *_: None
           ) -> list[Occurrence]:
  """Returns what documents have of each item. The documents are read once, in order, and not kept.

  Args:
    items: with different ids.
    documents: the training text.
    words: of the n-grams of the rule.
    most_documents: an n-gram in more documents than this is ignored; None: none is.
    partial: a file for what a search has done so far, so that it goes on there after a stop; it is deleted at the end.
    key: names the documents: a search of others does not go on from `partial`.
    show: called with the documents done, and all.

  Raises ValueError where there are no items, or a setting is below 1.
  """
  if not items:
    raise ValueError('there are no evaluation items, and so nothing to look for')
  if words < 1 or (most_documents is not None and most_documents < 1):
    raise ValueError(f'words={words} and most_documents={most_documents} have to be 1 or more (most_documents=none '
                     'ignores no n-gram)')
  index = ItemIndex([item.text for item in items], words, min(words, SHORTEST))
  identity = json.dumps([key, words, source.digest(json.dumps(index.texts)).hex()], sort_keys=True)
  first, counts = _load(partial, identity, index)
  saved = time.monotonic()
  for i in range(first, len(documents)):
    index.add(documents[i], counts)
    if time.monotonic() - saved > EVERY:
      show(i + 1, len(documents))
      if partial:
        _save(partial, identity, i + 1, counts)
      saved = time.monotonic()
  occurrences = _occurrences(items, index, counts, most_documents)
  if partial:
    partial.unlink(missing_ok=True)
  return occurrences


def _load(file: pathlib.Path | None, identity: str, index: ItemIndex) -> tuple[int, Counts]:
  if file and file.is_file():
    with np.load(file) as stored:
      if str(stored['identity']) == identity:
        return int(stored['first']), Counts(stored['documents'], stored['longest'])
  return 0, index.counts()


def _save(file: pathlib.Path, identity: str, first: int, counts: Counts) -> None:
  content = io.BytesIO()
  np.savez(content, identity=identity, first=first, **counts._asdict())
  atomic.write(file, content.getvalue())


def _occurrences(items: Sequence[Item], index: ItemIndex, counts: Counts, most_documents: int | None
                 ) -> list[Occurrence]:
  longest, occurrences = index.longest_matches(counts), []
  for item, text, places, start in zip(items, index.texts, index.places, index.starts):
    size = len(places)
    documents = counts.documents[index.gram_numbers[start:start + max(size - index.gram + 1, 0)]]
    ignored = 0 if most_documents is None else int((documents > most_documents).sum())
    matches = int((documents > 0).sum()) - ignored
    status = 'short' if size < index.gram else 'dirty' if matches else 'clean'
    lengths = longest[start:start + size]
    begin = int(lengths.argmax()) if size else 0
    length = int(lengths[begin]) if size else 0
    excerpt = text[places[begin][1]:places[begin + length - 1][2]] if length else ''
    occurrences.append(Occurrence(item.id, size, status, matches, ignored, length, len(excerpt), excerpt))
  return occurrences


class Split(NamedTuple):
  """A metric on all items, on clean and on dirty ones, and dirty minus clean; None where there is no such item."""
  metric: str
  all: statistics.Interval
  clean: statistics.Interval | None
  dirty: statistics.Interval | None
  difference: statistics.Interval | None
  counts: tuple[int, int, int]   # of items: all, clean, dirty

  def to_json(self) -> dict[str, Any]:
    """Returns the numbers; null where there is none, or it is not finite."""
    numbers = {name: value and {key: number if math.isfinite(number) else None
                                for key, number in value._asdict().items()}
               for name, value in zip(self._fields[1:5], self[1:5])}
    return {**numbers, 'items': dict(zip(('all', 'clean', 'dirty'), self.counts))}


def split(measure: Measure, statuses: Sequence[str]) -> Split:
  """Returns a metric on clean and on dirty items beside each other; row i of the measure is of the item of status i.

  The items of the two groups are different ones, which are drawn independently for the interval of the difference.
  """
  statuses = np.asarray(statuses)
  groups = [measure._replace(rows=measure.rows[statuses == status]) for status in ('clean', 'dirty')]
  clean, dirty = (group.interval() if len(group.rows) else None for group in groups)
  difference = None
  if clean and dirty:
    drawn = [group.value(statistics.resampled_sums(group.rows, 2000, seed)) for seed, group in enumerate(groups)]
    values = drawn[1] - drawn[0]
    low, high = np.nanquantile(values, [0.025, 0.975]) if np.isfinite(values).any() else (np.nan, np.nan)
    if min(len(group.rows) for group in groups) == 1:   # one item says nothing of others
      low, high = -np.inf, np.inf
    difference = statistics.Interval(dirty.value - clean.value, float(low), float(high))
  return Split(measure.name, measure.interval(), clean, dirty, difference,
               (len(measure.rows), *(len(group.rows) for group in groups)))


def summary(occurrences: Sequence[Occurrence], words: int, most_documents: int | None) -> list[str]:
  """Returns lines for a reader: how many items are dirty, and what the longest matches are."""
  by_status = {status: [one for one in occurrences if one.status == status] for status in ('clean', 'dirty', 'short')}
  sizes = np.array([one.words for one in occurrences])
  limit = f', in {most_documents} documents at most' if most_documents else ''
  lines = [f'{len(by_status["dirty"]):,} of {len(occurrences):,} items are dirty: {words} of their words in a row '
           f'occur in the training text{limit}.']
  ignored = sum(one.ignored > 0 and one.status == 'clean' for one in occurrences)
  if ignored:
    lines.append(f'{ignored:,} clean items have only matches that occur in more than {most_documents} documents.')
  if by_status['short']:
    fifth = int(np.clip(np.percentile(sizes, 5), SHORTEST, 13))
    lines.append(f'{len(by_status["short"]):,} items have fewer than {words} words, and are neither clean nor dirty; '
                 f"GPT-3's own count would take {fifth} words here (the 5th percentile, within {SHORTEST} and 13).")
  longest = sorted(occurrences, key=lambda one: -one.longest)[:3]
  for one in longest:
    if one.longest:
      length = f'{LONGEST} or more' if one.longest == LONGEST else one.longest
      lines.append(f'Item {one.id}: {length} of {one.words} words in a row occur: {one.excerpt[:100]!r}')
  return lines


def scores_table(splits: Mapping[str, Split]) -> str:
  """Returns a table of scores on all, clean and dirty items."""
  header = ('metric', 'all', 'clean', 'dirty', 'dirty - clean')
  cells = [(f'{name} ({one.counts[0]:,}, {one.counts[1]:,}, {one.counts[2]:,} items)',
            *('-' if value is None else str(value) for value in one[1:5])) for name, one in splits.items()]
  widths = [max(map(len, column)) for column in zip(header, *cells)]
  lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *cells]]
  return '\n'.join([*lines, '', 'Intervals (95 %) are by bootstrap over items. Clean and dirty items are different '
                    'ones, and may differ in difficulty: a difference does not prove that items were memorised, and '
                    'without one, they may have been.'])
