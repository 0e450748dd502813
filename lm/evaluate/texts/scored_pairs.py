"""Texts with their references, one after another, with a line of progress where that takes long."""
import sys
import time
from collections.abc import Callable, Iterator, Sequence

References = Sequence[Sequence[str]]   # of each text, one or more
_SECONDS = 3.   # between two lines


def pairs(name: str, candidates: Sequence[str], references: References | None,
          clock: Callable[[], float] = time.monotonic) -> Iterator[tuple[str, Sequence[str]]]:
  """Yields each candidate with its references. Prints to stderr how many are done, every few seconds.

  Raises ValueError, which names the metric, without candidates, or where a candidate has no references.
  """
  check(name, candidates, references)
  last = clock()
  for i, pair in enumerate(zip(candidates, references)):
    if clock() - last > _SECONDS:
      print(f'{name}: {i:,} of {len(candidates):,} texts', file=sys.stderr, flush=True)
      last = clock()
    yield pair


def check(name: str, candidates: Sequence[str], references: References | None) -> None:
  """Raises ValueError, which names the metric, without candidates, or where a candidate has no references."""
  if isinstance(candidates, str) or not len(candidates):
    raise ValueError(f'{name} is of a list of texts, and there are none')
  if references is None:
    raise ValueError(f'{name} compares texts with references, and there are none; give references, or leave it out')
  if len(references) != len(candidates):
    raise ValueError(f'{name} has {len(candidates)} texts and references of {len(references)}; give as many')
  for i, several in enumerate(references):
    if isinstance(several, str) or not len(several):
      raise ValueError(f'{name}: text {i + 1} of {len(candidates)} has no list of references; give each at least one')


def count(references: References) -> str:
  """Returns how many references a text has, `var` where that differs, as the signatures of sacrebleu have it."""
  counts = {len(several) for several in references}
  return str(*counts) if len(counts) == 1 else 'var'
