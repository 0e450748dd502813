"""Renders chat templates, each in its own process: `Renderer` starts this file as a program.

A template can loop forever in C code (a long product, sorting, lipsum), take all memory or overflow the stack. Counting
iterations, tracing and signals do not stop that on every thread and platform; killing a process does. Templates are
rendered as in transformers (utils/chat_template_utils.py).
"""
import contextlib
import datetime
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

_MEMORY = 2 * 2**30     # limit of the process, in bytes
_CHARACTERS = 2**25     # limit of one rendering
# Random marks around the text of {% generation %} blocks during rendering, which no template and no message can guess.
_OPEN, _CLOSE = (f'\ue000{secrets.token_hex(8)}\ue001' for _ in range(2))


class Renderer:
  """The process of one template. It is started at the first request, and again after it was stopped. Thread-safe."""

  def __init__(self, template: str):
    self._template, self._lock, self._process, self._owner = template, threading.Lock(), None, 0

  def answer(self, request: str, seconds: float) -> tuple[str, list[tuple[int, int]]]:
    """Returns the result of `rendered`.

    Args:
      request: the arguments of `rendered` after the template, as JSON.
      seconds: the time limit.

    Raises ValueError if the template fails, or exceeds a limit.
    """
    with self._lock:
      if self._process is None or self._owner != os.getpid():   # a forked process must not share the pipes
        self._start()
      process, late = self._process, threading.Event()
      self._process = None   # after an interrupt, the next request must not read the answer to this one
      answer = self._send(process, request, seconds, late)
      if answer and not late.is_set():
        self._process = process
      else:
        self._stop()
        reason = f'takes more than {seconds} seconds' if late.is_set() else 'takes too much memory or nesting'
        raise ValueError(f'the chat template {reason}')
    answer = json.loads(answer)
    if isinstance(answer, str):
      raise ValueError(f'chat template: {answer}')
    text, spans = answer
    return text, [(start, end) for start, end in spans]

  def _send(self, process: subprocess.Popen, request: str, seconds: float, late: threading.Event) -> str:
    """Returns the process's answer, a line; '' if it died. After `seconds`, sets `late` and kills the process."""
    def stop() -> None:
      late.set()
      process.kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
      process.stdin.write(request + '\n')
      process.stdin.flush()
      return process.stdout.readline()
    except OSError:
      return ''
    except BaseException:
      process.kill()
      raise
    finally:
      timer.cancel()
      timer.join()

  def _start(self):
    from lm.data.text import source  # not at the top, because the program below must not import this package
    source.require('jinja2', 'hf')
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    self._process = subprocess.Popen(
        [sys.executable, '-P', __file__], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding='ascii')
    self._owner = os.getpid()
    self._stop = weakref.finalize(self, _end, self._process, self._owner)
    if not self._send(self._process, json.dumps(self._template), 60, threading.Event()):
      raise ValueError('the process that renders chat templates does not start')


def _end(process: subprocess.Popen, owner: int) -> None:
  if os.getpid() == owner:
    process.kill()
    process.wait()
  process.stdin.close()
  process.stdout.close()


def environment() -> Any:
  """Returns the sandbox of jinja2, with the functions and blocks that templates of transformers may use."""
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} around what the assistant writes."""
    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
      return jinja2.nodes.CallBlock(self.call_method('_marked'), [], [], body).set_lineno(line)

    def _marked(self, caller):
      return f'{_OPEN}{caller()}{_CLOSE}' if self.environment.marks else caller()

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  result = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, 'jinja2.ext.loopcontrols'])
  result.filters['tojson'] = tojson
  result.globals.update(raise_exception=raise_exception,
                        strftime_now=lambda form: datetime.datetime.now().strftime(form))
  return result


def rendered(template: Any, variables: dict[str, Any], marks: bool) -> tuple[str, list[tuple[int, int]]]:
  """Returns the text and, if `marks`, the spans [start, end) of its characters inside generation blocks."""
  template.environment.marks = marks
  blocks, size = [], 0
  for block in template.generate(variables):
    blocks.append(block)
    size += len(block)
    if size > _CHARACTERS:
      raise ValueError(f'it writes more than {_CHARACTERS} characters')
  text, spans, depth, size, start = [], [], 0, 0, 0
  for part in re.split(f'({_OPEN}|{_CLOSE})', ''.join(blocks)):
    if part == _OPEN:
      start = start if depth else size
      depth += 1
    elif part == _CLOSE:
      depth -= 1
      if depth == 0 and size > start:
        spans.append((start, size))
    else:
      text.append(part)
      size += len(part)
  return ''.join(text), spans


def main() -> None:
  """Reads the template, as JSON, from the first line of the input, and answers each following line with a line."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for the process that started this one
  sandbox = environment()
  with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  source, template = json.loads(sys.stdin.readline()), None
  print('{}', flush=True)
  for line in sys.stdin:
    try:
      template = template or sandbox.from_string(source)
      answer = rendered(template, *json.loads(line))
    except Exception as error:   # a template may raise any exception
      kind = '' if type(error).__name__ in ('TemplateError', 'TemplateRuntimeError') else f'{type(error).__name__}: '
      where = f'line {error.lineno}: ' if getattr(error, 'lineno', None) else ''
      answer = f'{where}{kind}{error}'[:2000]
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
