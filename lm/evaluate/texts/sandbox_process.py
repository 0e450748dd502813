"""Executes one program where it can harm nothing: `program_sandbox.Sandbox` starts this file as a process on Linux.

Three processes follow one another. The first makes new user, mount, pid, network, IPC and UTS namespaces. The second is
process 1 in them: it makes a file system in memory, which has Python and the system's libraries, read-only, and an
empty /tmp, and goes there; where it ends, the kernel kills all that is in the namespaces. The third has limits on its
resources and no rights, and executes the program. It writes to file descriptor 3 how that ended.

This file imports nothing of `lm`. It runs in an empty environment, without site-packages.
"""
import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys

_NOBODY = 65534
_MOUNT, _USER = 0x20000, 0x10000000
_ISOLATED = _MOUNT | _USER | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000   # and pid, network, IPC, UTS
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PARENT_DEATH, _NO_NEW_PRIVILEGES = 1, 38   # of prctl
_PIVOT_ROOT = {'x86_64': 155, 'aarch64': 41}
_MOUNT_ATTRIBUTES, _FROM_HERE = 442, -100
# Reports through file descriptor 3, at the end, since a program may end its process before its tests are through.
_DRIVER = """
import os
def execute():
  try:
    with open('program.py', encoding='utf-8') as file:
      code = compile(file.read(), 'program.py', 'exec')
    exec(code, {'__name__': '__main__'})
  except BaseException as error:
    return f'{type(error).__name__}: {error}'
  return 'passed'
os.write(3, execute()[:300].encode('utf-8', 'replace'))
os._exit(0)
"""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
  """Calls a function of the C library; text becomes bytes. Raises OSError, which names the function."""
  if getattr(_libc, name)(*(value.encode() if isinstance(value, str) else value for value in arguments)) != 0:
    number = ctypes.get_errno()
    raise OSError(number, f'{name}: {os.strerror(number)}')


def _new_namespaces():
  """Isolates this process. Root outside is 0 inside, and nobody is nobody; another user is nobody inside."""
  process, user, group = os.getpid(), os.geteuid(), os.getegid()
  reader, writer = os.pipe()
  helper = os.fork()
  if helper == 0:   # the maps of users are written from outside, where this process has its rights
    status = 1
    try:
      os.close(writer)
      if os.read(reader, 1):
        if user != 0:
          _write(f'/proc/{process}/setgroups', 'deny')
        for kind, outside in ('uid', user), ('gid', group):
          lines = f'0 0 1\n{_NOBODY} {_NOBODY} 1\n' if user == 0 else f'{_NOBODY} {outside} 1\n'
          _write(f'/proc/{process}/{kind}_map', lines)
        status = 0
    finally:
      os._exit(status)
  os.close(reader)
  try:
    _call('unshare', _ISOLATED)
    os.write(writer, b'.')
  finally:
    os.close(writer)
    status = os.waitpid(helper, 0)[1]
  if status != 0:
    raise PermissionError('users of the new namespace cannot be mapped')


def _write(path, text):
  with open(path, 'w') as file:
    file.write(text)


def _new_root(folders, disk):
  """Makes a file system with the folders and files, read-only, an empty /tmp of `disk` bytes, and no other."""
  with contextlib.suppress(OSError):   # /proc is read-only in many containers
    _write('/proc/sys/user/max_user_namespaces', '0')   # of those inside this one, which would have no further rights
  _call('mount', 'none', '/', None, _RECURSIVE | _PRIVATE, None)
  root = os.open('/', os.O_PATH)
  _call('mount', 'tmpfs', '/tmp', 'tmpfs', _NO_SETUID, f'size={disk + (1 << 20)},mode=755')
  for path in [*folders, '/dev/null', '/dev/urandom']:
    os.fchdir(root)   # of the old file system, in which /tmp is not yet hidden
    source, target = path.lstrip('/'), '/tmp' + path
    if os.path.islink(path):
      os.symlink(os.readlink(path), target)
      continue
    os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
    if not os.path.isdir(path):
      os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _call('mount', source, target, None, _BIND | _RECURSIVE, None)
    _read_only(target, devices=path.startswith('/dev/'))
  os.makedirs('/tmp/tmp')
  _call('mount', 'tmpfs', '/tmp/tmp', 'tmpfs', _NO_SETUID | _NO_DEVICES, f'size={disk},nr_inodes=1000,mode=777')
  os.chdir('/tmp')
  pivot_root = _PIVOT_ROOT.get(platform.machine())
  if pivot_root is None:
    raise OSError(f'pivot_root is not known for {platform.machine()}')
  _call('syscall', pivot_root, b'.', b'.')
  _call('umount2', '.', _DETACH)
  _call('mount', None, '/', None, _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID, None)
  os.chdir('/tmp')


def _read_only(path, devices):
  """Makes a mount and those below it read-only."""
  attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SETUID | (0 if devices else _NO_DEVICES), 0, 0, 0)
  _call('syscall', _MOUNT_ATTRIBUTES, _FROM_HERE, path, 0x8000, ctypes.byref(attributes), 32)


def _limit(limits):
  processes = limits['processes'] + 2   # and the two before
  for kind, value in ((resource.RLIMIT_CPU, int(limits['seconds']) + 1), (resource.RLIMIT_AS, limits['memory']),
                      (resource.RLIMIT_FSIZE, limits['disk']), (resource.RLIMIT_NOFILE, limits['open_files']),
                      (resource.RLIMIT_NPROC, processes), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (value, value))


def _execute(request, report):
  """Becomes the program: in a session of its own where it is isolated, without rights, and with limits."""
  for descriptor in range(3):
    os.dup2(os.open('/dev/null', os.O_RDWR), descriptor)
  os.dup2(report, 3)
  os.set_inheritable(3, True)   # also where it was 3 already
  if request['isolated']:
    os.setsid()   # so that signals to its group do not reach the processes before
  _limit(request['limits'])
  if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
  _call('prctl', _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  os.execve(request['python'], [request['python'], '-I', '-S', '-c', _DRIVER], {})


def _supervise(request):
  """Executes the program and returns how that ended: 'passed', or why not."""
  if request['isolated']:
    _new_root(request['folders'], request['limits']['disk'])
  _write('program.py', request['program'])
  reader, writer = os.pipe()
  program = os.fork()
  if program == 0:
    try:
      _execute(request, writer)
    finally:
      os._exit(1)

  def stop(*_):
    raise TimeoutError
  signal.signal(signal.SIGALRM, stop)
  try:
    signal.setitimer(signal.ITIMER_REAL, request['limits']['seconds'])
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0)
  except TimeoutError:
    os.kill(program, signal.SIGKILL)
    return f'took more than {request["limits"]["seconds"]:g} s'
  os.set_blocking(reader, False)
  try:
    report = os.read(reader, 1000).decode('utf-8', 'replace')
  except BlockingIOError:
    report = ''
  if status == 0 and report:
    return report
  return (f'was killed by signal {-status}' if status < 0 else
          f'ended with exit code {status} before its tests were through')


def main():
  """Reads a request, JSON, from stdin, and writes one object to stdout: a `result`, or the `error` of isolation."""
  _call('prctl', _PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
  request = json.load(sys.stdin)
  try:
    if request['isolated']:
      _new_namespaces()
      _call('prctl', _PARENT_DEATH, signal.SIGKILL, 0, 0, 0)   # new rights cleared it
      child = os.fork()
      if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
      _call('prctl', _PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    answer = {'result': _supervise(request)}
  except OSError as error:
    answer = {'error': error.strerror or str(error)}
  os.write(1, json.dumps(answer).encode())
  os._exit(0)


if __name__ == '__main__':
  main()
