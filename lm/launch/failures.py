"""What a program says when it fails: one line for its user, or the traceback of a bug."""
import dis
import errno
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import jax

from lm.launch.arguments import written


def report(error: Exception, debug: bool = False, values: Mapping[str, Any] | None = None) -> None:
  """Prints an error: in one line where its user can mend it, else, and always with `debug`, with its traceback.

  `values` are those of the flags of the program, which the line names as flags.
  """
  line = None if debug else explain(error)
  if line is None:
    traceback.print_exception(error)
  else:
    print(f'error: {with_dashes(line, values or {})}  (--debug shows where)', file=sys.stderr, flush=True)


def explain(error: Exception) -> str | None:
  """One line that says what is wrong and what to do; None for a bug, whose traceback has to be seen."""
  text = str(error)
  if isinstance(error, jax.errors.JaxRuntimeError) and re.search('(?is)RESOURCE_EXHAUSTED.*memory', text):
    return ('the devices have no memory for this; a smaller model or batch, a step accumulated over more parts, or '
            f'more devices need less ({text.splitlines()[0][:200]})')
  if isinstance(error, MemoryError):
    return f'this machine has no memory for this; a smaller model or batch needs less ({text or "MemoryError"})'
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    return f'{full(error)}; free space, or choose another folder'
  if isinstance(error, OSError | ImportError):
    return text
  if isinstance(error, ValueError | FloatingPointError) and not _raised_in_a_library(error):
    return text
  return None


def with_dashes(text: str, values: Mapping[str, Any]) -> str:
  """Returns a message with `--` before each `name=value` that is a flag of the program, as in `heads=3`.

  Functions name their arguments, and do not know whether a flag gave them. A name counts as the flag where the value
  is that of the flag, or the flag is none: then the experiment chose the value for it.
  """
  def flag(match: re.Match[str]) -> str:
    name, shown = match[1], match[2].rstrip('.')
    if name not in values:
      return match[0]
    value = values[name]
    is_flag = value is None or shown in (str(value), repr(value), written(value))
    return f'--{match[0]}' if is_flag else match[0]
  return re.sub(r'(?<![\w.\-])([a-z][a-z_]*)=([^\s,;:()]*)', flag, text)


def full(error: OSError) -> str:
  """What has no room left: the disk, a quota, or a file that may not grow."""
  what = {errno.ENOSPC: 'the disk is full', errno.EDQUOT: 'the quota of the disk is used up'}.get(
      error.errno, 'a file has reached the size that is allowed')
  return what if error.filename is None else f'{what}: {error.filename} could not be written'


def _raised_in_a_library(error: Exception) -> bool:
  """A ValueError out of JAX or Flax is a bug here, not a bad input."""
  if error.__traceback__ is None:
    return False
  *_, last = _entries(error)
  code = last.tb_frame.f_code
  if any('JAX has removed its internal frames' in note for note in getattr(error, '__notes__', ())):
    # The last frame is ours either way: ours raised the error only if its last instruction is a `raise`.
    return code.co_code[last.tb_lasti] != dis.opmap['RAISE_VARARGS']
  ours = last.tb_frame.f_globals.get('__name__', '').partition('.')[0] == 'lm'
  return not ours and '-packages' in code.co_filename


def _entries(error: Exception):
  entry = error.__traceback__
  while entry is not None:
    yield entry
    entry = entry.tb_next
