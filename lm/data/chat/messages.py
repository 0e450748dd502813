"""JSON records to messages: a prompt and the answers to it. Records may have any of these shapes.

  {"prompt": "...", "completion": "..."}                       also with messages in place of the strings
  {"messages": [{"role": "user", "content": "..."}, ...]}      also {"from": "human", "value": "..."}
                                                               and {"speaker": "user", "text": "..."}
  {"prompt": "...", "chosen": "...", "rejected": "..."}
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}     transcripts, or messages; both begin alike
  {"prompt": "\\n\\nHuman: ...\\n\\nAssistant:", "completion": "..."}     a transcript up to the answer
  {"prompt": "...", "completion": "...", "label": true}        also {"messages": ..., "label": true}

A prompt that begins with "Human:" is a transcript only if it ends where the assistant answers; the two sides of a pair
are transcripts only if both are, and the pair has no prompt. Any other text that begins with "Human:" is plain text.
"""
import dataclasses
import json
import re
from typing import Any, NamedTuple

from lm.data.batch import Dialogue, Pair, Rated
from lm.data.text import source
from lm.data.text.source import Source
from lm.workdir.parsing import json_value

Messages = list[dict[str, str]]
_ROLES = {'human': 'user', 'gpt': 'assistant', 'system': 'system', 'user': 'user', 'assistant': 'assistant'}


@dataclasses.dataclass(frozen=True)
class Keys:
  """The names of the fields of records."""
  prompt: str = 'prompt'
  completion: str = 'completion'
  messages: str = 'messages'
  chosen: str = 'chosen'
  rejected: str = 'rejected'
  label: str = 'label'


class Record(NamedTuple):
  """A prompt and answers to it.

  Attributes:
    prompt: may be empty.
    answers: one answer, or the chosen and the rejected one.
    good: the rating of the answer; None if the record has no label.
  """
  prompt: Messages
  answers: tuple[Messages, ...]
  good: bool | None = None


def read(record: str, kind: type, keys: Keys = Keys()) -> Record:
  """Parses a JSON record of a `kind` of data: `Dialogue`, `Pair` or `Rated`.

  Raises ValueError, with the record, if it has another shape.
  """
  try:
    row = json_value(record)
    if not isinstance(row, dict):
      raise ValueError('it is not a record {...}')
    return {Dialogue: _dialogue, Pair: _pair, Rated: _rated}[kind](row, keys)
  except ValueError as error:
    raise ValueError(f'{error}; in the record {record[:200]}{"..." if len(record) > 200 else ""}') from None


def _dialogue(row: dict, keys: Keys) -> Record:
  if keys.messages in row:
    return Record([], (_messages(row, keys.messages),))
  if keys.completion not in row:
    raise ValueError(f'there is neither messages={keys.messages!r} nor completion={keys.completion!r} among its fields '
                     f'({", ".join(row)}); name the field that holds the answer')
  return Record(_messages(row, keys.prompt, 'user'), (_messages(row, keys.completion, 'assistant'),))


def _pair(row: dict, keys: Keys) -> Record:
  sides = keys.chosen, keys.rejected
  chosen, rejected = transcripts = [_transcript(row.get(key)) for key in sides]
  if keys.prompt in row or not all(transcripts):
    chosen, rejected = (_messages(row, key, 'assistant') for key in sides)
  if chosen and rejected and chosen[0]['role'] == rejected[0]['role'] == 'assistant' and keys.prompt in row:
    return Record(_messages(row, keys.prompt, 'user'), (chosen, rejected))
  # Both are whole conversations. The messages that they share are the prompt; at least the last is an answer.
  longest = min(len(chosen), len(rejected)) - 1
  shared = next((i for i in range(longest) if chosen[i] != rejected[i]), max(longest, 0))
  if not shared:
    raise ValueError(f'{keys.chosen!r} and {keys.rejected!r} do not begin with the same message, and there is no '
                     f'prompt={keys.prompt!r} among its fields ({", ".join(row)}); name the prompt')
  return Record(chosen[:shared], (chosen[shared:], rejected[shared:]))


def _rated(row: dict, keys: Keys) -> Record:
  good = row.get(keys.label)
  if not isinstance(good, bool):
    raise ValueError(f'label={keys.label!r} must be true or false, and it is {json.dumps(good)}; its fields are '
                     f'{", ".join(row)}')
  record = _dialogue(row, keys)
  if record.prompt:
    return record._replace(good=good)
  dialogue, = record.answers
  return Record(dialogue[:-1], (dialogue[-1:],), good)


def _messages(row: dict, key: str, role: str | None = None) -> Messages:
  """Returns the messages in a field, which holds messages, a transcript or, with a `role`, the text of one message.

  The text of the user may be a transcript that ends where the assistant answers.
  """
  value: Any = row.get(key)
  transcript = _transcript(value)
  if role is None and transcript:
    return transcript
  if role == 'user' and transcript and transcript[-1] == {'role': 'assistant', 'content': ''}:
    return transcript[:-1]
  if isinstance(value, str) and role:
    return [{'role': role, 'content': value}]
  if not isinstance(value, list) or not value:
    expected = 'messages' if role is None else 'text, nor messages'
    raise ValueError(f'{key!r} holds no {expected}; its fields are {", ".join(row)}')
  return [_message(message, key) for message in value]


def _transcript(value: Any) -> Messages:
  """Returns the messages in "Human: ...\n\nAssistant: ..."; an empty list if the value is not such a text."""
  if not isinstance(value, str) or not re.match(r'\s*Human:', value) or '\n\nAssistant:' not in value:
    return []
  _, *parts = re.split(r'(?:^\s*|\n\n)(Human|Assistant): ?', value)
  return [{'role': {'Human': 'user', 'Assistant': 'assistant'}[who], 'content': text.strip()}
          for who, text in zip(parts[::2], parts[1::2])]


def _message(message: Any, key: str) -> dict[str, str]:
  if isinstance(message, dict) and 'from' in message:
    message = {'role': _ROLES.get(message['from'], message['from']), 'content': message.get('value')}
  if isinstance(message, dict) and 'speaker' in message:
    message = {'role': _ROLES.get(message['speaker'], message['speaker']), 'content': message.get('text')}
  if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ('role', 'content')):
    raise ValueError(f"a message in {key!r} is not {{'role': 'user', 'content': 'text'}}: {json.dumps(message)[:100]}")
  return message


@source.deferred
def unpaired(pairs: Source, keys: Keys = Keys()) -> Source:
  """Returns the answers of pairs as rated dialogues: first all chosen answers, then all rejected ones.

  Neighbouring records thus answer different prompts, as KTO's baseline needs it.
  """
  def read_one(address: tuple) -> str:
    documents, i, side = address
    record = read(documents[i], Pair, keys)
    return json.dumps({keys.prompt: record.prompt, keys.completion: record.answers[side], keys.label: not side},
                      ensure_ascii=False)

  def split(documents: Any) -> source.Documents:
    return source.Documents(lambda: _Sides(documents), read_one)

  return Source(f'{pairs.name}, unpaired', {name: split(documents) for name, documents in pairs.splits.items()},
                f'unpaired {pairs.fingerprint} {keys}', pairs.license, pairs.counts)


@dataclasses.dataclass(frozen=True)
class _Sides:
  """The addresses of all answers: (documents, i, side), with side 0 for the chosen answer of pair i."""
  documents: Any

  def __len__(self) -> int:
    return 2 * len(self.documents)

  def __getitem__(self, i: int) -> tuple:
    return self.documents, i % len(self.documents), i // len(self.documents)
