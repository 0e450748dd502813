"""Executes one program where it can harm nothing: `program_sandbox.Sandbox` starts this file as a process on Linux.

Three processes follow one another. The first makes new user, mount, pid, network, IPC and UTS namespaces. The second is
process 1 in them: it makes a file system in memory, which has Python and the system's libraries, read-only, and an
empty /tmp, and goes there; where it ends, the kernel kills all that is in the namespaces. The third has limits on its
resources and no rights, and executes the program. It writes to file descriptor 3 how that ended, after a random token
that came through descriptor 4, so that what a program writes there is no report.

This file imports nothing of `lm`. It runs in an empty environment, without site-packages.
"""
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import signal
import struct
import sys

_NOBODY = 65534
_MOUNT, _USER = 0x20000, 0x10000000
_ISOLATED = _MOUNT | _USER | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000   # and pid, network, IPC, UTS
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PARENT_DEATH, _SECCOMP, _NO_NEW_PRIVILEGES = 1, 22, 38   # of prctl
_PIVOT_ROOT = {'x86_64': 155, 'aarch64': 41}
_MOUNT_ATTRIBUTES, _FROM_HERE = 442, -100
# System calls that no program needs, by their numbers: shared memory, messages and semaphores that outlast their
# process and count for no limit; files in memory alone; keyrings, which are the same outside; new namespaces; and those
# that give more of the kernel than a program needs.
_DENIED = {
    'x86_64': {'shmget': 29, 'semget': 64, 'msgget': 68, 'ptrace': 101, 'mq_open': 240, 'add_key': 248,
               'request_key': 249, 'keyctl': 250, 'unshare': 272, 'perf_event_open': 298, 'setns': 308,
               'memfd_create': 319, 'bpf': 321, 'userfaultfd': 323, 'io_uring_setup': 425, 'memfd_secret': 447},
    'aarch64': {'unshare': 97, 'ptrace': 117, 'mq_open': 180, 'msgget': 186, 'semget': 190, 'shmget': 194,
                'add_key': 217, 'request_key': 218, 'keyctl': 219, 'perf_event_open': 241, 'setns': 268,
                'memfd_create': 279, 'bpf': 280, 'userfaultfd': 282, 'io_uring_setup': 425, 'memfd_secret': 447}}
_ARCHITECTURE = {'x86_64': 0xC000003E, 'aarch64': 0xC00000B7}   # as filters of system calls name it
_CLONE, _CLONE3 = {'x86_64': 56, 'aarch64': 220}, 435
# Reports at the end, since a program may end its process before its tests are through, and by its own names, since a
# program may replace those of modules. The program is no '__main__', as in the evaluation of Chen et al.
_DRIVER = """
import os
def main(write, leave):
  token = os.read(4, 100)
  os.close(4)
  result = b'passed'
  try:
    # Apart, so that the end of a program cannot take its tests in, and before it can write to their file.
    codes = [compile(open(name, encoding='utf-8').read(), name, 'exec') for name in ('program.py', 'test.py')]
    scope = {}
    for code in codes:
      exec(code, scope)
  except BaseException as error:
    result = f'{type(error).__name__}: {error}'[:300].encode('utf-8', 'replace')
  write(3, token + result)
  leave(0)
main(os.write, os._exit)
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


def _filter_calls():
  """Lets the kernel refuse the system calls of _DENIED, and those of other architectures, to this process."""
  machine = platform.machine()
  if machine not in _DENIED:
    return
  load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
  allow, refuse, absent, kill = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000
  lines = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURE[machine]), (answer, 0, 0, kill),
           (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]   # the last are the x32 calls
  for number in _DENIED[machine].values():
    lines += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
  # clone3 has its flags in memory, where no filter sees them; the C library takes clone where it is absent.
  lines += [(equal, 0, 1, _CLONE3), (answer, 0, 0, absent), (equal, 0, 3, _CLONE[machine]), (load, 0, 0, 16),
            (any_bit, 0, 1, _USER), (answer, 0, 0, refuse), (answer, 0, 0, allow)]
  program = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *line) for line in lines))
  _call('prctl', _SECCOMP, 2, ctypes.create_string_buffer(struct.pack('HP', len(lines), ctypes.addressof(program))))


def _execute(request, report, token):
  """Becomes the program: in a session of its own where it is isolated, without rights, and with limits."""
  # Copies from 5 on, so that neither is 3 or 4 already, which would keep it from being inherited.
  report, token = (fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 5) for descriptor in (report, token))
  for descriptor in range(3):
    os.dup2(os.open('/dev/null', os.O_RDWR), descriptor)
  os.dup2(report, 3)
  os.dup2(token, 4)
  if request['isolated']:
    os.setsid()   # so that signals to its group do not reach the processes before
  _limit(request['limits'])
  if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
  _call('prctl', _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  _filter_calls()
  os.execve(request['python'], [request['python'], '-I', '-S', '-c', _DRIVER], {})


def _supervise(request):
  """Executes the program and returns how that ended: 'passed', or why not."""
  if request['isolated']:
    _new_root(request['folders'], request['limits']['disk'])
  try:
    for name in 'program', 'test':
      with open(f'{name}.py', 'w', encoding='utf-8', errors='surrogatepass') as file:
        file.write(request[name])
  except OSError as error:
    return f'cannot be written: {error.strerror}'
  reader, writer = os.pipe()
  token, (token_reader, token_writer) = os.urandom(16).hex(), os.pipe()
  os.write(token_writer, token.encode())
  program = os.fork()
  if program == 0:
    try:
      _execute(request, writer, token_reader)
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
  if status == 0 and report.startswith(token):
    return report.removeprefix(token)
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
