"""Evaluation items, and scores of items, from files of JSON lines."""
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from lm.evaluate.contamination import Item
from lm.evaluate.texts import text_files


def read_items(file: pathlib.Path, keys: Sequence[str]) -> list[Item]:
  """Returns the items of a file, whose texts are those of the fields `keys`, joined by line ends.

  A field may be a list of texts, such as choices. An item without `id` has the number of its line.

  Raises ValueError, which names the file and the line.
  """
  items = []
  for where, id, record in _records(file):
    texts = []
    for key in keys:
      value = record.get(key)
      value = value if isinstance(value, list) else [value]
      if not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f'{where} has no text in {key!r}; it has the fields {", ".join(record)}, of which '
                         '--item_keys takes one or several')
      texts += value
    items.append(Item(id, '\n'.join(texts)))
  return items


def read_scores(file: pathlib.Path, key: str) -> dict[str, float]:
  """Returns the scores of items by id; otherwise as `read_items`."""
  scores = {}
  for where, id, record in _records(file):
    score = record.get(key)
    if not isinstance(score, int | float) or not math.isfinite(score):   # true and false are 1 and 0
      raise ValueError(f'{where} has no finite number in {key!r}; it has the fields {", ".join(record)}, and '
                       '--score_key names the one with the score')
    scores[id] = float(score)
  return scores


def _records(file: pathlib.Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """Yields (place, id, record) of each line."""
  ids, has_ids = set(), None
  for number, line in enumerate(text_files.content(file).split('\n'), 1):
    if not line.strip():
      continue
    where = f'{file} line {number}'
    record = text_files.json_object(line, where)
    if has_ids not in (None, 'id' in record):
      raise ValueError(f'{where} has {"an" if "id" in record else "no"} id, unlike the lines before; give every line '
                       'an id, or none')
    has_ids = 'id' in record
    id = str(record.get('id', number))
    if id in ids:
      raise ValueError(f'{where} has the id {id} again; an id stands once in a file')
    ids.add(id)
    yield where, id, record
