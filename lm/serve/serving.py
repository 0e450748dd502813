"""Serves an application until a signal ends it; answers that are being written are finished first."""
import contextlib
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from lm.data.text.source import require

_LOCAL = ('127.0.0.1', 'localhost', '::1')


def check_packages() -> None:
  """Raises ImportError, which says what to install, where a package of the server is missing."""
  require('uvicorn', 'serve')
  require('starlette.applications', 'serve')
  require('prometheus_client', 'serve')


def listen(host: str, port: int) -> socket.socket:
  """Returns a socket that listens on an address; port 0 takes any that is free.

  Raises OSError, in one clear line, where the port is in use.
  """
  listener = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
    listener.listen(1024)
  except OSError as error:
    listener.close()
    raise OSError(f'cannot listen on {host} port {port} ({error.strerror}); give another --port or --host') from None
  return listener


def hosts(host: str) -> tuple[str, ...]:
  """Returns the names by which a server is addressed that listens on `host`; () for any name, beyond this machine."""
  return _LOCAL if host in _LOCAL else ()


def address(listener: socket.socket) -> str:
  """Returns the URL of a socket that listens."""
  host, port = listener.getsockname()[:2]
  name = socket.gethostname() if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host
  return f'http://{name}:{port}'


def serve(app: Any, listener: socket.socket, drain_seconds: int, running: Callable[[], int]) -> None:
  """Serves an application until SIGTERM or SIGINT.

  It then takes no new connection, and returns when all answers are whole, or after `drain_seconds`, or at once at a
  second signal. `running` returns the number of answers that are being written. Call it in the main thread.
  """
  uvicorn = require('uvicorn', 'serve')
  config = uvicorn.Config(app, log_level='warning', access_log=False, lifespan='off', ws='none', http='h11',
                          server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=drain_seconds)
  server = uvicorn.Server(config)
  server.capture_signals = contextlib.nullcontext   # uvicorn would raise the signal again after a clean end

  def end(*_: Any) -> None:
    if server.should_exit:
      server.force_exit = True
      return
    server.should_exit = True
    if running():
      print(f'{running()} answers are being written; they are finished first, within {drain_seconds} seconds. A second '
            'signal ends the server at once', file=sys.stderr, flush=True)

  former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    server.run(sockets=[listener])
  finally:
    for number, handler in former.items():
      signal.signal(number, handler)
    listener.close()
