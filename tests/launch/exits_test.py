"""A program ends with an exit code, and with one line at most where it fails."""
import os
import pathlib
import signal
import subprocess
import sys

import pytest

SCRIPT = """'''A script.'''
import os, signal, sys
from lm import launch
def function(*, n: int = 1):
  if n == 0: raise ValueError('n is 0')
  if n == 3: print('a line'); os.kill(os.getpid(), signal.SIGINT)
  import jax
  print(n, jax.config.jax_compilation_cache_dir, jax.distributed.is_initialized())
if __name__ == '__main__': launch.tool(function)
"""


@pytest.mark.parametrize('argument, code, out, err', [
    ('--n=2', 0, '2 CACHE/lm/jax False', ''), ('--n=0', 1, '', 'error: n is 0'),
    ('--m=0', 2, '', 'error: unknown flag'), ('--n=3', 130, 'a line', '\ninterrupted'),
])
def test_programs_exit_with_a_code_and_one_line(tmp_path, argument, code, out, err):
  (tmp_path / 'script.py').write_text(SCRIPT)
  root = str(pathlib.Path(__file__).parents[2])
  environment = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_COMPILATION', 'PYTHONUNBUFFERED'))}
  environment |= {'PYTHONPATH': root, 'XDG_CACHE_HOME': str(tmp_path)}
  process = subprocess.run([sys.executable, '-W', 'error', str(tmp_path / 'script.py'), argument], env=environment,
                           capture_output=True, text=True)
  assert process.returncode == code and process.stdout.strip() == out.replace('CACHE', str(tmp_path))
  assert process.stderr.startswith(err) and process.stderr.strip().count('\n') == 0


def test_a_program_whose_output_nobody_reads_ends_quietly(tmp_path):
  (tmp_path / 'script.py').write_text(SCRIPT)
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
  environment['PYTHONPATH'] = str(pathlib.Path(__file__).parents[2])
  read, write = os.pipe()
  os.close(read)   # as `head` does
  process = subprocess.run([sys.executable, str(tmp_path / 'script.py'), '--help'], env=environment, stdout=write,
                           stderr=subprocess.PIPE)
  os.close(write)
  assert process.returncode == 128 + signal.SIGPIPE and process.stderr == b''
