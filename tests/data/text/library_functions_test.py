"""The library's own code passes the problems that are made of it, and code that does nothing fails them."""
import pytest

from lm.data.text import library_functions


def passes(case, middle):
  names = {}
  exec(compile(case.setup + case.before + middle + case.after, case.name, 'exec'), names)
  try:
    exec(case.test, names)
  except Exception:   # the code after a hole may fail in any way
    return False
  return True


@pytest.mark.parametrize('make, nothing', [(library_functions.body, '    return NotImplemented\n'),
                                           (library_functions.line, 'return NotImplemented')])
def test_the_library_passes_and_nothing_else(make, nothing):
  for name in library_functions.CALLS:
    case = make(name)
    assert case.before.startswith('def ') and case.middle.strip()
    assert passes(case, case.middle) and not passes(case, nothing), name
    assert not passes(case, nothing.replace('return NotImplemented', 'pass')), name   # as where the line is left out
    if make is library_functions.line:
      assert '\n' not in case.middle and case.before.endswith((' ', '\t')) and case.after.startswith('\n')
    else:
      assert case.before.endswith('\n') and not case.after
