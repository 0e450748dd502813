"""The option for bit-reproducible programs is set before the backend starts, where there may be a GPU."""
import importlib.util
import os
import subprocess
import sys

import pytest

from lm.sharding import determinism

FLAG = '--xla_gpu_deterministic_ops'


def required(monkeypatch, flags, has_gpu):
  find_spec = lambda name: object() if has_gpu and name == 'jax_plugins.xla_cuda12' else None
  with monkeypatch.context() as patch:
    patch.setattr(importlib.util, 'find_spec', find_spec)
    patch.setenv('XLA_FLAGS', flags)
    determinism.require()
    return os.environ['XLA_FLAGS']


@pytest.mark.parametrize('flags, has_gpu, expected', [
    ('', True, f'{FLAG}=true'), ('--a=1', True, f'--a=1 {FLAG}=true'), (f'{FLAG}=true', True, f'{FLAG}=true'),
    (FLAG, True, FLAG), ('--a=1', False, '--a=1')])
def test_the_flag_is_added_where_there_may_be_a_gpu(monkeypatch, flags, has_gpu, expected):
  assert required(monkeypatch, flags, has_gpu) == expected


def test_a_flag_that_says_otherwise_is_refused(monkeypatch):
  with pytest.raises(ValueError, match=f'XLA_FLAGS has {FLAG}=false; leave one of them out'):
    required(monkeypatch, f'{FLAG}=false', True)


def test_the_cost_is_said_on_gpus_and_elsewhere_that_there_is_no_effect():
  assert 'may take longer' in determinism.describe('gpu') and 'without effect on tpu' in determinism.describe('tpu')


def test_xla_knows_the_flag():
  """A flag that XLA does not know ends the process when the backend starts."""
  for flags, code in ((f'{FLAG}=true', True), ('--xla_gpu_deterministic_opz=true', False)):
    process = subprocess.run([sys.executable, '-c', 'import jax; jax.devices()'], capture_output=True,
                             env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'})
    assert (process.returncode == 0) == code
