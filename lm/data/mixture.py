"""Corpora mixed by weight, exactly."""
import collections
import fractions
import functools
import math
from collections.abc import Sequence

import numpy as np

from lm.data import source
from lm.data.source import Source


def mixture(parts: Sequence[tuple[Source, float]]) -> Source:
  """Sources interleaved in exact proportion to their weights: of the first n documents of a split, each source has
  given its share to within less than one document, for every n (Tijdeman, "The chairman assignment problem", 1980).

  A split ends where a source would have to give a document that it does not have, as Grain's `MapDataset.mix` does;
  none is repeated. It has the splits that all sources have.
  """
  if not parts or any(not weight > 0 or math.isinf(weight) for _, weight in parts):
    raise ValueError(f'mixture: weights {[weight for _, weight in parts]} must be positive, one source at least')
  exact = [fractions.Fraction(weight).limit_denominator(10**9) for _, weight in parts]  # 0.7 is 7/10, 1/3 is 1/3
  scale = math.lcm(*(weight.denominator for weight in exact))
  weights = [int(weight * scale) for weight in exact]
  weights = [weight // math.gcd(*weights) for weight in weights]
  if not all(weights):
    raise ValueError(f'mixture: weights {[weight for _, weight in parts]} differ by more than a factor of a billion')
  return _interleaved([part for part, _ in parts], weights)


@source.lazy
def _interleaved(parts, weights):
  counts, notes = collections.Counter(), []

  def interleave(split, sequences):  # -> a sequence of (source, document)
    sizes, period = [len(s) for s in sequences], sum(weights)
    counts.clear()
    for part in parts:
      counts.update(part.counts)
      notes.extend(note for note in part.notes if note not in notes)
    # One period repeats for ever; of a longer one only as much is made as the sources last.
    limit = min(period, *(-(-(size + 1) * period // weight) for size, weight in zip(sizes, weights)))
    order, ranks = _schedule(weights, limit)
    cycles = min(size // weight for size, weight in zip(sizes, weights))
    left = np.array([size - cycles * weight for size, weight in zip(sizes, weights)])
    over = np.flatnonzero(ranks >= left[order])
    rest = int(over[0]) if len(over) else limit
    length = cycles * period + rest
    for part, weight, size, more in zip(parts, weights, sizes, np.bincount(order[:rest], minlength=len(parts))):
      notes.append(f'{split}: used {cycles * weight + more:,} of {size:,} documents of {part.name}')

    def address(n):
      cycle, n = divmod(n, period)
      return order[n], cycle * weights[order[n]] + ranks[n]
    return source.Documents(lambda: range(length), address)

  splits = {}
  for split in [s for s in parts[0].splits if all(s in part.splits for part in parts)]:
    sequences = [part.splits[split] for part in parts]
    splits[split] = source.Documents(functools.partial(interleave, split, sequences),
                                    lambda at, s=sequences: s[at[0]][at[1]])
  identity = repr([('mixture', part.fingerprint, weight) for part, weight in zip(parts, weights)])
  return Source('+'.join(part.name for part in parts), splits, source.digest(identity).hex(),
                ', '.join(dict.fromkeys(part.license for part in parts)), counts, notes)


def _schedule(weights: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
  """(which source, which of its documents) at each position. Document j of a source with share w is due in the window
  [floor(j/w), ceil((j+1)/w)): the earliest due goes first, which keeps every window, as the shares sum to one."""
  period, taken = sum(weights), [0] * len(weights)
  order, ranks = np.empty(length, np.int32), np.empty(length, np.int64)
  for n in range(length):
    _, i = min((-(-(taken[i] + 1) * period // weight), i)
               for i, weight in enumerate(weights) if taken[i] * period < (n + 1) * weight)
    order[n], ranks[n] = i, taken[i]
    taken[i] += 1
  return order, ranks
