"""A server in a process of its own: it finishes answers when it is stopped, and refuses a port that is in use."""
import http.client
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import serve as script

from lm import serve
from lm.models import transformer

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')

PROGRAM = '''
import sys, time, types
sys.path.insert(0, sys.argv[1])
from helpers.scripted_engine import ScriptedEngine, application, text_script
from lm import serve
listener = serve.listen('127.0.0.1', 0)
engine = ScriptedEngine(text_script('x' * 40), wait=lambda: time.sleep(.02))
with application(engine, model=(types.SimpleNamespace(reads_source=False), None)) as (app, thread):
  print(serve.address(listener), flush=True)
  serve.serve(app, listener, int(sys.argv[2]), lambda: thread.count)
'''


@pytest.fixture
def server():
  """Returns a function that starts a server, and returns its process and its port."""
  processes = []

  def start(drain):
    helpers = pathlib.Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, '-c', PROGRAM, str(helpers), str(drain)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    processes.append(process)
    return process, int(process.stdout.readline().rpartition(':')[2])

  yield start
  for process in processes:
    process.kill()
    process.communicate()


def ask(port, **fields):
  """Returns a connection whose request has begun to be answered, and its response."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  body = json.dumps({'prompt': 'a', 'max_tokens': 60, 'stream': True, **fields})
  connection.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
  return connection, connection.getresponse()


@pytest.mark.slow
def test_sigterm_finishes_what_is_being_written_and_takes_no_more(server):
  process, port = server(30)
  connection, response = ask(port)
  first = response.read(10)
  process.send_signal(signal.SIGTERM)
  with pytest.raises(ConnectionRefusedError):
    for _ in range(100):   # the signal is handled between two events of its loop
      with socket.create_connection(('127.0.0.1', port), 60):
        time.sleep(.05)
  text = (first + response.read()).decode()
  assert text.count('"text":"x"') == 40 and text.endswith('data: [DONE]\n\n')
  response.close()
  connection.close()
  assert process.wait(60) == 0
  assert 'answers are being written; they are finished first' in process.stderr.read()


def test_a_port_in_use_is_one_clear_line():
  with socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(OSError, match=f'cannot listen on 127.0.0.1 port {port} .*another --port'):
      serve.listen('127.0.0.1', port)


def test_only_a_server_of_this_machine_alone_checks_the_name_of_its_host():
  assert serve.hosts('127.0.0.1') and not serve.hosts('0.0.0.0')


def test_a_context_that_the_model_does_not_read_at_once_is_refused():
  model = transformer.llama(8, 8, 1, 1, max_length=128)
  assert [script._slots(model, context) for context in (None, 2, 128)] == [128, 2, 128]
  with pytest.raises(ValueError, match='context=129 is more than the 128 tokens'):
    script._slots(model, 129)
