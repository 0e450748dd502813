"""Pairs and rated answers of random tokens, their batches, and a decoder that reads them."""
import numpy as np

from lm.data.batch import Dialogue, Pair, Rated, Special
from lm.data.rows.packed_records import Packed
from lm.models import transformer

V, T, ROWS = 16, 24, 8

SPECIAL = Special(0, 1, V, ())


class Records(list):
  """Records in memory."""
  @property
  def positions(self):
    return np.array([sum(len(x.tokens) - 1 for x in record if isinstance(x, Dialogue)) for record in self])


def dialogue(rng, prompt, n) -> Dialogue:
  tokens = np.r_[prompt, rng.integers(2, V, n)].astype(np.int32)
  return Dialogue(tokens, np.arange(len(tokens)) >= len(prompt))


def pairs(count=11) -> Records:
  rng, records = np.random.default_rng(0), Records()
  for _ in range(count):
    prompt = np.r_[0, rng.integers(2, V, rng.integers(0, 4))]
    records.append(Pair(*(dialogue(rng, prompt, rng.integers(1, 6)) for _ in range(2))))
  return records


def rated(count=11) -> Records:
  return Records(Rated(pair.chosen, bool(i % 3), pair.rejected) for i, pair in enumerate(pairs(count)))


def packed(records, goal, rows=ROWS, **options) -> Packed:
  return Packed(goal, SPECIAL, T, rows, records=records, repeat=False, **options)


def tiny(width=8):
  return transformer.llama(V, width, 1, heads=2, hidden=8, max_length=T)
