"""The strictest setting: eight host devices, warnings are errors, no silent rank promotion."""
import collections
import gc
import os
import pathlib
import signal
import warnings

from helpers import as_shipped

# Before JAX starts: flags are read once.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + f' --xla_force_host_platform_device_count=8 {as_shipped.QUICK}')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tiny programs run once: they take longer to optimise than to run. Programs that tests start inherit this.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
# The threads of PyTorch wait for one another in a loop, which takes the cores from other workers.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

hypothesis.settings.register_profile('fixed', derandomize=True)   # every run draws the same examples
hypothesis.settings.load_profile('fixed')
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tracing makes many objects that live on, among which the usual thresholds look for garbage again and again.
gc.set_threshold(100_000, 10, 10)


def pytest_addoption(parser):
  parser.addoption('--rows', action='store_true', help='print the differences measured for each Hugging Face family')


def pytest_terminal_summary(terminalreporter, config):
  """Prints a table of the largest difference that the tests of each family recorded, when `--rows` is passed."""
  if config.getoption('--rows'):
    columns, table = ['logits', 'loss', 'packed', 'cached', 'back'], collections.defaultdict(dict)
    for report in terminalreporter.getreports('passed'):
      for name, value in report.user_properties:
        row, _, column = name.partition('/')
        table[row][column] = max(value, table[row].get(column, value))
    terminalreporter.write_line(f'{"":34}' + ''.join(f'{column:>10}' for column in columns))
    for row, worst in table.items():
      cells = [worst.get(column, '-') for column in columns]
      terminalreporter.write_line(f'{row:34}' + ''.join(
          f'{cell:>10}' if isinstance(cell, str) else f'{cell:10.1e}' for cell in cells))


@pytest.fixture(scope='module', autouse=True)
def bounds_memory():
  """Forgets what JAX has compiled, after a module, once there is much of it.

  Linux allows a process 65,530 memory maps, a compiled program has several, and the garbage collector reads what
  programs keep alive.
  """
  yield
  if pathlib.Path('/proc/self/maps').exists() and pathlib.Path('/proc/self/maps').read_bytes().count(b'\n') > 10_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='module')
def transformers():
  """Returns the library, and skips the tests where it is not installed, or PyTorch."""
  pytest.importorskip('torch')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def browser():
  from helpers import browsers  # which skips the tests where there is none
  yield from browsers.chromium()


@pytest.fixture
def hears_hangup():
  """SIGHUP has its usual effect, also where the tests were started by `nohup`, which makes programs ignore it."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope='module')
def compiled_once(tmp_path_factory):
  """Caches compiled programs on disk for the tests of a module, many of which run the same program."""
  options = {'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('cache')),
             'jax_persistent_cache_min_compile_time_secs': 0., 'jax_persistent_cache_min_entry_size_bytes': -1}
  before = {name: getattr(jax.config, name) for name in options}
  for values in (options, before):
    compilation_cache.reset_cache()
    for name, value in values.items():
      jax.config.update(name, value)
    if values is options:
      yield


@pytest.fixture
def stopped(tmp_path, monkeypatch):
  """Returns a function that trains `helpers.runs.RUN` up to a step and returns its workdir.

  The run ends by a request to stop after that step, or, with `dead=True`, by an exception as if it had been killed.
  """
  from helpers.runs import go, steps_kept

  from lm.train.interrupt import Interrupt

  def stop(last_step, dead=False, **changes):
    def stop_requested(self, step):
      if dead and step == last_step:
        raise InterruptedError('as if killed')
      return step == last_step
    with monkeypatch.context() as patch:
      patch.setattr(Interrupt, 'should_stop', stop_requested)
      if dead:
        with pytest.raises(InterruptedError):
          go(tmp_path, **changes)
      else:
        result = go(tmp_path, **changes)
        assert not result.finished and result.step == last_step == steps_kept(tmp_path)[-1]
    return tmp_path
  return stop


@pytest.fixture
def script(tmp_path):
  """Returns the path of a script with a small experiment, whose runs take a second."""
  from helpers.study_script import SCRIPT
  path = tmp_path / 'small.py'
  path.write_text(SCRIPT)
  return path


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Returns a function that trains a script `small.py`, beside a module that it imports: `program(workdir, **knobs)`.
  """
  from helpers import script_runs
  yield from script_runs.program(tmp_path, monkeypatch)
