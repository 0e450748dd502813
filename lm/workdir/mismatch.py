"""The error for a checkpoint of another run, and its list of differences."""
from collections.abc import Sequence
from typing import Any

from lm.workdir.describe import differences


class Mismatch(ValueError):
  """The checkpoint is intact, but belongs to another model, optimizer or data set."""


def check(stored: Any, current: Any) -> None:
  """Raises Mismatch, with a line for each difference, if two JSON trees differ."""
  lines = differences(stored, current)
  if not lines:
    return
  advice = 'go back to its settings, or use a new folder'
  if all(line.startswith('objective') for line in lines):
    advice += ', or continue with the new objective by --new_objective'
  raise Mismatch(f'the checkpoint is of another run: {advice}{listed(lines)}')


def listed(lines: Sequence[str], most: int = 6) -> str:
  """Returns a colon and the lines, one below the other; of those beyond `most`, only their number."""
  omitted = [f'... and {len(lines) - most} more'] if len(lines) > most else []
  return '\n  '.join([':', *lines[:most], *omitted])
