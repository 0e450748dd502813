"""A conversation in the terminal: what is remembered, what is forgotten, and Ctrl-C."""
import io
import os
import signal

import pytest
from helpers.decoders import make

from lm import seeds
from lm.data.chat.conversation import Conversation, Plain
from lm.data.tokenizers import Bytes
from lm.generate import Request, Sampling, batch_answers, written_requests
from lm.generate.chat_session import ChatSession

CHAT = Conversation(Bytes(()), Plain('\n'))


@pytest.fixture(scope='module')
def scheduler():
  model, params = make(kv_heads=2, tied=False)
  return batch_answers.make_scheduler(model, params, CHAT, 128, 3)   # of the shapes of prompts_test


def alone(scheduler, messages, count, seed=0):
  """Returns the answer to messages as a request by itself."""
  ids = CHAT.encode_batch([messages])[0]
  request = Request(ids, Sampling(), count, seeds.derive(0, f'answer {seed}'))
  return ''.join(piece.text for _, piece in written_requests.pieces(
      scheduler, CHAT, [written_requests.TextRequest(request)]))


def test_answers_follow_the_whole_conversation_and_a_prefix_is_read_once(scheduler):
  session = ChatSession(scheduler, CHAT, max_tokens=8)
  first = ''.join(session.answer('a question of more than sixty-four bytes, which fill the first page'))
  before = scheduler.shared_tokens
  second = ''.join(session.answer('b'))
  assert scheduler.shared_tokens == before + 64
  assert [message['content'] for message in session.messages[1::2]] == [first, second]
  assert first == alone(scheduler, session.messages[:1], 8) and second == alone(scheduler, session.messages[:3], 8, 1)


def test_the_oldest_messages_are_forgotten_and_a_message_that_is_too_long_changes_nothing(scheduler, capsys):
  session = ChatSession(scheduler, CHAT, max_tokens=20)
  for message in 'a' * 60, 'b' * 60, 'c':
    assert len(session.messages) <= 4
    ''.join(session.answer(message))
  assert [message['content'][0] for message in session.messages[::2]] == ['b', 'c']
  assert 'the oldest 2 messages do not fit the context of 128 tokens' in capsys.readouterr().err
  before = list(session.messages)
  with pytest.raises(ValueError, match='max_tokens=20 are more than the 128'):
    ''.join(session.answer('d' * 120))
  assert session.messages == before
  with pytest.raises(ValueError, match='max_tokens=128 leaves no room for a message in the context of 128'):
    ChatSession(scheduler, CHAT, max_tokens=128)


def test_ctrl_c_stops_an_answer_and_not_the_program(scheduler, monkeypatch, capsys):
  lines = iter(['first', '', 'second', ' /reset ', 'third'])
  monkeypatch.setattr('sys.stdin', io.StringIO())
  session = ChatSession(scheduler, CHAT, max_tokens=40)
  plain, former, conversations = session.answer, signal.getsignal(signal.SIGINT), []

  def answer(message, is_stopped):
    for count, text in enumerate(plain(message, is_stopped)):
      if message == 'second' and count == 3:
        os.kill(os.getpid(), signal.SIGINT)
      yield text
    conversations.append([each['content'] for each in session.messages])

  def read(prompt):
    line = next(lines, None)
    if line is None:
      raise EOFError
    return line

  monkeypatch.setattr('builtins.input', read)
  session.answer = answer
  session.run()
  first, second, third = conversations
  assert second[:2] == first and third[0] == 'third' and len(third) == 2
  whole = alone(scheduler, [{'role': role, 'content': content} for role, content in zip(
      ('user', 'assistant', 'user'), second)], 40, 1)
  assert whole.startswith(second[3]) and len(second[3]) < len(whole)
  assert not scheduler.is_busy or not scheduler.running
  output = capsys.readouterr()
  assert output.out == ''.join(f'{conversation[-1]}\n' for conversation in conversations)
  assert 'Ctrl-C stops an answer' in output.err and signal.getsignal(signal.SIGINT) is former

  def interrupted(prompt):
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError('the line is not read any more')

  monkeypatch.setattr('builtins.input', interrupted)   # what is no terminal has nobody who goes on
  with pytest.raises(KeyboardInterrupt):
    session.run()
