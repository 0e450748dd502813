"""A save that fails, on a full disk or by a kill, is one error or none, and loses that save alone."""
import gc
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoint_states import abstract, make_state, same_bytes

from lm.workdir import checkpoint

ROOT = pathlib.Path(__file__).parents[2]


def test_a_failed_save_is_raised_and_harms_nothing(tmp_path, mesh, monkeypatch, capfd):
  """The writing thread fails as it does on a full disk."""
  from orbax.checkpoint._src.serialization import ocdbt_utils
  real, unfinished = ocdbt_utils.merge_ocdbt_per_process_files, tmp_path / '9.orbax-checkpoint-tmp'

  async def full(*args, **kwargs):
    unfinished.mkdir(exist_ok=True)
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28'] "
                     "[tensorstore_spec='{}']")

  state = make_state(mesh)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, {'n': 1})
    checkpoints.wait()
    monkeypatch.setattr(ocdbt_utils, 'merge_ocdbt_per_process_files', full)
    for raiser in checkpoints.wait, lambda: checkpoints.save(3, state, {}), lambda: checkpoints.restore(state):
      checkpoints.save(2, state, {'n': 2})
      with pytest.raises(OSError, match=f'could not be written to {tmp_path}: .*No space left') as caught:
        raiser()
      assert 'tensorstore_spec' not in str(caught.value)
      assert checkpoints.steps() == [1] and not unfinished.exists()
    checkpoints.save(2, state, {'n': 2})
    with pytest.raises(OSError, match='No space left'):
      while True:
        checkpoints.check_for_errors()
    assert same_bytes(checkpoints.restore(abstract(state, mesh)).state, state)
    monkeypatch.setattr(ocdbt_utils, 'merge_ocdbt_per_process_files', real)
    checkpoints.save(2, state, {'n': 2})
  assert checkpoint.Checkpoints(tmp_path).facts() == {'n': 2}
  assert '1' not in os.listdir(tmp_path)
  assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.skipif(os.name != 'posix', reason='limits')
@pytest.mark.filterwarnings('ignore:coroutine .* was never awaited:RuntimeWarning')   # Orbax leaves them
def test_a_full_disk_is_one_error_without_a_traceback(tmp_path, capfd, caplog):
  """A limit on the size of a file stands for it: TensorStore itself fails, at each of many arrays."""
  import resource
  numbers, limits = np.random.default_rng(0).normal(size=(100, 10_000)), resource.getrlimit(resource.RLIMIT_FSIZE)
  state = {'params': dict(zip(map(str, range(100)), numbers))}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step in range(1, 4):
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
      try:
        with pytest.raises(OSError, match='File too large'):
          checkpoints.save(step, state, {})
          checkpoints.wait()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(4, state, {})
  assert checkpoint.Checkpoints(tmp_path).steps() == [4]   # an abandoned write may leave an unfinished folder
  gc.collect()   # what is never retrieved is said when it is removed
  assert 'Traceback' not in capfd.readouterr().err + caplog.text


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_a_kill_during_a_save_loses_that_save_alone(tmp_path):
  program = textwrap.dedent('''
      import os, signal, sys
      import jax, jax.numpy as jnp
      from lm.workdir import checkpoint
      from lm.workdir import describe
      checkpoints = checkpoint.Checkpoints(sys.argv[1])
      checkpoints.save(1, {'x': jnp.arange(8)}, {'n': 1})
      checkpoints.wait()
      checkpoints.save(2, {'x': jax.random.normal(jax.random.key(0), (4096, 4096))}, {'n': 2})
      os.kill(os.getpid(), signal.SIGKILL)
  ''')
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=60)
  assert run.returncode == -signal.SIGKILL, run.stderr.decode()
  assert '2.orbax-checkpoint-tmp' in os.listdir(tmp_path)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore({'x': jax.ShapeDtypeStruct((8,), jnp.int32)})
    assert (restored.step, restored.facts) == (1, {'n': 1})
    np.testing.assert_array_equal(restored.state['x'], np.arange(8))
    checkpoints.save(2, {'x': jnp.arange(4)}, {'n': 'anew'})
  assert checkpoint.Checkpoints(tmp_path).facts(2) == {'n': 'anew'}
