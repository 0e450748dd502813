"""Executes programs that nobody has read, such as those of a model, in processes that can harm nothing."""
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

_START = 30.   # seconds that starting may take beside the program


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Executes Python programs on Linux, each in namespaces of its own: see `sandbox_process`.

  A program sees no network, no other process, no environment, and no file but Python, the system's libraries and an
  empty /tmp in memory. Its process group is killed after the time. What a program cannot be kept from is to pretend:
  its report needs a random token, but it and its tests are one process, whose memory it can search for that.

  Attributes:
    seconds: of time by the clock, and of the processor for each process.
    memory: bytes of addresses of each process.
    disk: bytes in files.
    open_files: of each process.
    processes: and threads.
    isolated: whether namespaces are required. Without them, a program has limits, an empty environment and no rights
      of root, but reads the files that everyone may read, and has the network.
  """
  seconds: float = 10.
  memory: int = 512 << 20
  disk: int = 16 << 20
  open_files: int = 32
  processes: int = 8
  isolated: bool = True

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.name != 'isolated' and not 0 < getattr(self, field.name) < math.inf:
        raise ValueError(f'{field.name}={getattr(self, field.name)} of a sandbox must be above 0, and finite')

  def check(self) -> None:
    """Raises OSError, which says what is missing, unless an empty program can be executed here."""
    result = self.run('')
    if result != 'passed':
      raise OSError(f'no program can be executed here: an empty one {result}'
                    + ('' if self.isolated or os.geteuid() else '; nobody has to be able to read the folder of Python'))

  def run(self, program: str, test: str = '') -> str:
    """Returns 'passed' where the program, and then its test, came to the end, and else why not: exception, or limit.

    Raises OSError where the process cannot be isolated; the program is not executed then.
    """
    if not sys.platform.startswith('linux'):
      raise OSError(f'generated programs are executed on Linux alone, and this is {sys.platform}')
    limits = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != 'isolated'}
    request = {'program': program, 'test': test, 'limits': limits, 'isolated': self.isolated, 'folders': _folders(),
               'python': os.path.realpath(sys.executable)}
    with tempfile.TemporaryDirectory() as folder:
      if os.geteuid() == 0 and not self.isolated:
        os.chmod(folder, 0o777)   # the program is executed as nobody
      answer = self._answer(json.dumps(request), folder)
    if answer is None:
      return f'took more than {self.seconds:g} s, or killed the processes that watch it'
    if 'error' in answer:
      raise OSError(f'this machine does not let a program be isolated ({answer["error"]}), and so none is executed; '
                    'allow user namespaces, or where nothing is to be lost, give --allow_no_isolation, which has '
                    'limits alone')
    return answer['result']

  def _answer(self, request: str, folder: str) -> dict[str, str] | None:
    script = str(pathlib.Path(__file__).with_name('sandbox_process.py'))
    process = subprocess.Popen([os.path.realpath(sys.executable), '-I', '-S', script], cwd=folder, env={},
                               start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, encoding='utf-8', errors='surrogatepass')
    output = ''
    try:
      output, _ = process.communicate(request, self.seconds + _START)
    except subprocess.TimeoutExpired:
      pass
    finally:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)   # also what the program has started, where it is not isolated
      process.communicate()
    return json.loads(output) if output else None


def _folders() -> list[str]:
  """Returns what a program needs of the file system: Python and the system's libraries."""
  names = ['/usr', '/lib', '/lib64', '/etc/ld.so.cache', os.path.realpath(sys.base_prefix)]
  return [name for name in names if os.path.exists(name) and (name == '/usr' or not name.startswith('/usr/'))]
