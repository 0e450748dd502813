"""Records of ratings: candidate texts with references, and what they were rated.

A record is a line of JSON with `candidate`, `rating`, `reference` or `references`, and optionally `system`, which wrote
the candidate, and `item`, what it was written for; without an item, the first reference stands for it.
"""
import json
import math
import random
from collections.abc import Iterable
from typing import NamedTuple

from lm.data.text import corpora, source
from lm.data.text.source import Source
from lm.workdir.parsing import json_value

KINDS = 'drop', 'swap', 'replace', 'mix'   # the systems of synthetic candidates


class Rating(NamedTuple):
  """A record."""
  references: tuple[str, ...]
  candidate: str
  rating: float
  system: str
  item: str


def read(record: str) -> Rating:
  """Reads a record. Raises ValueError, with the record, if a field is missing or of another type."""
  try:
    values = json_value(record)
    references = values['references'] if 'references' in values else [values['reference']]
    if not isinstance(references, list):
      raise ValueError
    system, item = values.get('system'), values.get('item')   # null stands for nothing
    rating = Rating(tuple(references), values['candidate'], values['rating'], '' if system is None else str(system),
                    references[0] if item is None else str(item))
  except (ValueError, TypeError, KeyError, IndexError):
    rating = None
  if (rating is None or not rating.references
      or not all(isinstance(text, str) for text in (rating.candidate, *rating.references))
      or type(rating.rating) not in (int, float) or not math.isfinite(rating.rating)):
    raise ValueError(f'{record:.200} is no rating; a line has candidate, rating (a number), reference or a list of '
                     'references, and optionally system and item')
  return rating


@source.deferred
def rated(pattern: str, validation: float = 0.1, held_out_systems: tuple[str, ...] = ()) -> Source:
  """Returns the records in files of JSON lines, .gz and .zst too, that match a glob pattern.

  A hash of its item decides whether a record is for 'train', 'validation', which may stop the training, or
  'validation-items', which has no influence on it; each of the latter two has the share `validation`. All records of
  the systems that are held out are in the split 'validation-systems': no candidate of theirs is trained on. Without
  names, a quarter of the systems is held out, chosen by a hash, if there are four or more.
  """
  files = corpora.jsonl(pattern, None, 0.5)
  records = [record for documents in files.splits.values() for record in documents]
  systems = sorted({read(record).system for record in records} - {''}, key=source.digest)
  if missing := [name for name in held_out_systems if name not in systems]:
    raise ValueError(f'--held_out_systems={missing[0]} has no candidate in {pattern}, which has those of '
                     f'{", ".join(sorted(systems)) or "no named system"}')
  chosen = held_out_systems or (systems[:len(systems) // 4] if len(systems) >= 4 else ())
  return _split(pattern, records, validation, chosen, files.fingerprint)


@source.deferred
def synthetic(count: int = 30_000, validation: float = 0.1, seed: int = 0) -> Source:
  """Returns lines of Python's own library and copies with errors, as in the synthetic pre-training of BLEURT.

  The rating is the share of words without an error: 'drop' leaves words out, 'swap' exchanges neighbours, 'replace'
  takes words of other lines, and 'mix', which is held out, does all of these.
  """
  rng, lines = random.Random(seed), []
  documents = list(corpora.python_library().splits['train'])
  rng.shuffle(documents)
  for document in documents:
    candidates = [' '.join(line.split()) for line in document.splitlines() if 6 <= len(line.split()) <= 20]
    lines += rng.sample(candidates, min(len(candidates), 60))
    if len(lines) >= count:
      break
  words = [word for line in lines for word in line.split()]
  records = [json.dumps(_corrupted(line, words, rng)) for line in lines[:count]]
  return _split('python with errors', records, validation, ('mix',), f'synthetic {count} {seed} '
                + source.digest(''.join(records)).hex())


def _corrupted(line: str, vocabulary: list[str], rng: random.Random) -> dict[str, str | float]:
  """Returns a record whose candidate is the line with errors in a random share of its words."""
  words, kind = line.split(), rng.choices(KINDS, weights=(5, 5, 5, 1))[0]
  places = rng.sample(range(len(words)), rng.randint(0, len(words)))
  result: list[str | None] = list(words)
  for place in places:
    change = rng.choice(KINDS[:3]) if kind == 'mix' else kind
    if change == 'drop':
      result[place] = None
    elif change == 'replace':
      result[place] = rng.choice(vocabulary)
    elif place + 1 < len(words):
      result[place], result[place + 1] = result[place + 1], result[place]
  wrong = sum(word != new for word, new in zip(words, result)) / len(words)
  return {'reference': line, 'candidate': ' '.join(word for word in result if word is not None),
          'rating': 1 - wrong, 'system': kind}


def _split(name: str, records: Iterable[str], validation: float, held_out_systems: tuple[str, ...], fingerprint: str
           ) -> Source:
  splits: dict[str, list[str]] = {'train': [], 'validation': [], 'validation-items': [], 'validation-systems': []}
  for record in records:
    rating = read(record)
    share = int.from_bytes(source.digest(rating.item)[:8]) / 2 ** 64
    splits['validation-systems' if rating.system in held_out_systems else
           'validation' if share < validation else
           'validation-items' if share < 2 * validation else 'train'].append(record)
  for split in ('train', 'validation'):
    if not splits[split]:
      raise ValueError(f'{name} has no rating in the split {split}; give more items, or another share to hold out')
  splits = {split: of_split for split, of_split in splits.items() if of_split}
  return Source(name, splits, f'{fingerprint} items {validation} {",".join(held_out_systems)}')
