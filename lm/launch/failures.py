"""Reports the error that ends a program: one line where the user can fix it, the traceback where it is a bug."""
import dis
import errno
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import jax

from lm.launch.arguments import to_text


def report(error: Exception, debug: bool = False, values: Mapping[str, Any] | None = None) -> None:
  """Prints an error: one line where the user can fix it; its traceback otherwise, and always with `debug`.

  `values` are the values of the program's flags, which the line writes as flags.
  """
  line = None if debug else explain(error)
  if line is None:
    traceback.print_exception(error)
  else:
    print(f'error: {with_dashes(line, values or {})}  (--debug shows where)', file=sys.stderr, flush=True)


def explain(error: Exception) -> str | None:
  """Returns one line that says what is wrong and what to do; None for a bug, of which the traceback is needed."""
  text = str(error)
  if isinstance(error, jax.errors.JaxRuntimeError) and re.search('(?is)RESOURCE_EXHAUSTED.*memory', text):
    return ('the devices do not have enough memory; take a smaller model or batch, a step accumulated over more parts, '
            f'or more devices ({text.splitlines()[0][:200]})')
  if isinstance(error, MemoryError):
    return f'this machine does not have enough memory; take a smaller model or batch ({text or "MemoryError"})'
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    return f'{full(error)}; free space, or choose another folder'
  if isinstance(error, OSError) and error.filename is not None and error.strerror:   # raised by the system
    return f'{error.filename}: {error.strerror.lower()}'
  if isinstance(error, OSError | ImportError):
    return text
  if isinstance(error, ValueError | FloatingPointError) and not _raised_in_a_library(error):
    return text
  return None


def with_dashes(text: str, values: Mapping[str, Any]) -> str:
  """Returns a message with `--` before each `name=value` that is a flag of the program, as in `heads=3`.

  The functions that raise errors know the names of their arguments, but not whether these are values of flags. A name
  counts as a flag where the value is that of the flag, or where the flag is none and the experiment chose a value.
  """
  def flag(match: re.Match[str]) -> str:
    name, shown = match[1], match[2].rstrip('.')
    if name not in values:
      return match[0]
    value = values[name]
    is_flag = value is None or shown in (str(value), repr(value), to_text(value))
    return f'--{match[0]}' if is_flag else match[0]
  return re.sub(r'(?<![\w.\-])([a-z][a-z_]*)=([^\s,;:()]*)', flag, text)


def full(error: OSError) -> str:
  """Says what is full: the disk, a quota, or a file that may not grow."""
  reasons = {errno.ENOSPC: 'the disk is full', errno.EDQUOT: 'the quota of the disk is used up'}
  reason = reasons.get(error.errno, 'a file has reached the size that is allowed')
  return reason if error.filename is None else f'{reason}: {error.filename} could not be written'


def _raised_in_a_library(error: Exception) -> bool:
  """Whether a library raised an error. A ValueError of JAX or Flax is a bug of ours, not a bad input."""
  if error.__traceback__ is None:
    return False
  last = error.__traceback__
  while last.tb_next is not None:
    last = last.tb_next
  code = last.tb_frame.f_code
  if any('JAX has removed its internal frames' in note for note in getattr(error, '__notes__', ())):
    # The last frame is always ours then; our code raised the error only if its last instruction is a `raise`.
    return code.co_code[last.tb_lasti] != dis.opmap['RAISE_VARARGS']
  is_ours = last.tb_frame.f_globals.get('__name__', '').partition('.')[0] == 'lm'
  return not is_ours and '-packages' in code.co_filename
