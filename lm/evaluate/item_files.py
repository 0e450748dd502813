"""Evaluation items, and scores of items, from files of JSON lines."""
import math
import pathlib
from collections.abc import Sequence

from lm.evaluate.contamination import Item
from lm.evaluate.texts import text_files


def read_items(file: pathlib.Path, keys: Sequence[str]) -> list[Item]:
  """Returns the items of a file, whose texts are those of the fields `keys`, joined by line ends.

  A field may be a list of texts, such as choices. An item without `id` has the number of its line.

  Raises ValueError, which names the file and the line.
  """
  items = []
  records = _read(file)
  for i, record in enumerate(records.lines):
    texts = []
    for key in keys:
      value = record.get(key)
      value = value if isinstance(value, list) else [value]
      if not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f'{records.where(i)} has no text in {key!r}; it has the fields {", ".join(record)}, of which '
                         '--item_keys takes one or several')
      texts += value
    items.append(Item(records.name(i), '\n'.join(texts)))
  return items


def read_scores(file: pathlib.Path, key: str) -> dict[str, float]:
  """Returns the scores of items by id; otherwise as `read_items`."""
  scores, records = {}, _read(file)
  for i, record in enumerate(records.lines):
    score = record.get(key)
    if not isinstance(score, int | float) or not math.isfinite(score):   # true and false are 1 and 0
      raise ValueError(f'{records.where(i)} has no finite number in {key!r}; it has the fields {", ".join(record)}, '
                       'and --score_key names the one with the score')
    scores[records.name(i)] = float(score)
  return scores


def _read(file: pathlib.Path) -> text_files.Records:
  """Returns the lines of a file, whose ids differ."""
  records = text_files.read(file)
  text_files.check_unique(records)
  return records
