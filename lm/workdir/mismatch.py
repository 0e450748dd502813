"""Comparison of a checkpoint with a run, and the error that lists their differences."""
from collections.abc import Mapping, Sequence
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
  raise Mismatch(f'the checkpoint is of another run: {advice}{_listed(lines)}')


def check_arrays(path: Any, stored: Mapping[str, Any], requested: Mapping[str, Any], with_dtypes: bool) -> None:
  """Raises Mismatch if the arrays of a checkpoint, by name, differ from the requested ones in names, shapes or dtypes.

  Dtypes are compared only if `with_dtypes` is true. `path` is that of the checkpoint, for the message.
  """
  def described(leaves):
    return {name: f'{leaf.dtype if with_dtypes else ""}{list(leaf.shape)}' for name, leaf in leaves.items()}

  lines = differences(described(stored), described(requested))
  if lines and all(line.startswith('opt_state.') for line in lines):
    raise Mismatch(f'checkpoint {path} holds the state of another optimizer ({len(lines)} arrays differ): continue '
                   'with the same optimizer, or start another run from its parameters (--init)')
  if lines:
    raise Mismatch(f'checkpoint {path} does not fit' + _listed(lines))


def _listed(lines: Sequence[str], most: int = 6) -> str:
  """Returns a colon and the lines, one below the other; of those beyond `most`, only their number."""
  omitted = [f'... and {len(lines) - most} more'] if len(lines) > most else []
  return '\n  '.join([':', *lines[:most], *omitted])
