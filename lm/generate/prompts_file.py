"""Prompts in a file of JSON lines, each with settings of its own, and the file of their answers.

  {"prompt": "Once upon a time"}
  {"id": "a7", "prompt": "def ", "temperature": 0.2, "max_tokens": 40, "n": 2, "stop": ["\\n\\n"]}
  {"messages": [{"role": "user", "content": "Reverse abcd"}]}

A line of the answers has the id, the prompt, all settings and the answers of a prompt. So a file of answers that was
interrupted is continued: its lines are kept, if their prompts and settings are still the same.
"""
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from lm import seeds
from lm.data.tokenizers.base import utf8
from lm.generate.sampling import Sampling
from lm.workdir.parsing import json_value

_MOST_NAMED = 5   # bad lines that a message names
_BEGINNING = b'{"id": "'   # of each line of answers

# The settings of a sampling that are numbers, with their types.
_NUMBERS = {field.name: field.type for field in dataclasses.fields(Sampling) if field.type in (int, float)}


@dataclasses.dataclass(frozen=True)
class PromptLine:
  """A prompt, with settings that have passed all checks which need no model.

  Attributes:
    number: of its line, from 1.
    id: the name of its answer; the number of the line where the line has none.
    prompt: a text, or messages of a conversation.
    settings: the values by which it is answered, in JSON's types.
  """
  number: int
  id: str
  prompt: str | list[dict[str, str]]
  settings: Mapping[str, Any]

  @property
  def sampling(self) -> Sampling:
    return Sampling(**{name: self.settings[name] for name in _NUMBERS})


class Prompts(NamedTuple):
  """The prompts of a file."""
  path: pathlib.Path
  lines: Sequence[PromptLine]


def settings_of(sampling: Sampling, max_tokens: int | None, seed: int, n: int, stop: Iterable[str]) -> dict[str, Any]:
  """Returns settings in JSON's types, for lines that do not name them."""
  return {**{name: getattr(sampling, name) for name in _NUMBERS}, 'max_tokens': max_tokens, 'seed': seed, 'n': n,
          'stop': list(stop)}


def raise_all(problems: Iterable[tuple[int, str]], path: pathlib.Path) -> None:
  """Raises ValueError if there are problems, pairs of the number of a line and what is wrong with it."""
  lines = [f'line {number}: {problem}' for number, problem in problems]
  if lines:
    others = f'\n  and {len(lines) - _MOST_NAMED} lines more' if len(lines) > _MOST_NAMED else ''
    raise ValueError(f'{path} has {len(lines)} bad lines; correct them, nothing has been computed:\n  '
                     + '\n  '.join(lines[:_MOST_NAMED]) + others)


def read_prompts(path: pathlib.Path, defaults: Mapping[str, Any], is_chat: bool) -> Prompts:
  """Returns the prompts of a file; empty lines are skipped.

  A line without a seed has one that follows from that of `defaults` and its id.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not UTF-8, or has no prompts, or has bad lines, which the message names.
  """
  lines, problems, numbers = [], [], {}
  try:
    rows = path.read_text(encoding='utf-8').split('\n')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8: {error}; convert the file') from None
  for number, text in enumerate(rows, 1):
    if not text.strip():
      continue
    try:
      line = _line(number, text, defaults, is_chat)
      if line.id in numbers:
        raise ValueError(f'id={line.id!r} is also that of line {numbers[line.id]}; give each its own')
      numbers[line.id] = number
      lines.append(line)
    except ValueError as error:
      problems.append((number, str(error)))
  raise_all(problems, path)
  if not lines:
    raise ValueError(f'{path} has no prompts; write one a line, such as {{"prompt": "Once upon a time"}}')
  return Prompts(path, lines)


def _line(number: int, text: str, defaults: Mapping[str, Any], is_chat: bool) -> PromptLine:
  """Returns a line that has been read. Raises ValueError, which says what is wrong."""
  try:
    fields = json_value(text)
  except ValueError as error:
    raise ValueError(f'it is no JSON: {error}') from None
  utf8(json.dumps(fields, ensure_ascii=False))   # all of it is written with the answer
  if not isinstance(fields, dict):
    raise ValueError('it is no object, such as {"prompt": "Once upon a time"}')
  name = fields.pop('id', number)
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise ValueError(f'id={name!r} must be a text or a whole number')
  settings = {**defaults, 'seed': seeds.derive(defaults['seed'], str(name))}
  prompts = {field: fields.pop(field) for field in ('prompt', 'messages') if field in fields}
  if len(prompts) != 1:
    raise ValueError('it needs one of "prompt" and "messages"')
  (field, prompt), = prompts.items()
  if field == 'prompt' and not isinstance(prompt, str):
    raise ValueError(f'prompt={prompt!r:.100} must be a text')
  if field == 'messages':
    if not is_chat:
      raise ValueError('"messages" are for a chat; give --chat, or a "prompt"')
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, dict) for message in prompt):
      raise ValueError(f'messages={prompt!r:.100} must be a list of objects with a role and a content')
  unknown = [field for field in fields if field not in settings]
  if unknown:
    raise ValueError(f'{unknown[0]!r} is no setting; there are id, prompt, messages, {", ".join(settings)}')
  line = PromptLine(number, str(name), prompt, {**settings, **fields})
  _check(line)
  return line


def _check(line: PromptLine) -> None:
  """Raises ValueError where a setting of a line is bad."""
  settings = line.settings
  for name, kind in {**_NUMBERS, 'max_tokens': int, 'seed': int, 'n': int}.items():
    value = settings[name]
    is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not is_number and (name, value) != ('max_tokens', None):
      raise ValueError(f'{name}={value!r} must be a {"whole " if kind is int else ""}number')
  sampling, n, stop = line.sampling, settings['n'], settings['stop']
  seeds.check(settings['seed'])
  for name in 'n', 'max_tokens':
    if settings[name] is not None and settings[name] < 1:
      raise ValueError(f'{name}={settings[name]} must be at least 1')
  if n > 1 and sampling.greedy:
    raise ValueError(f'all n={n} answers would be equal with temperature={sampling.temperature:g}; leave one out')
  if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
    raise ValueError(f'stop={stop!r} must be a list of texts, none of them empty')
  if stop and sampling.min_tokens:
    raise ValueError(f'min_tokens={sampling.min_tokens} holds for tokens that end a text, and not for the texts of '
                     'stop; leave one out')


class AnswersFile:
  """The file of answers, to which each is added as one line when it is whole."""

  def __init__(self, path: pathlib.Path, prompts: Prompts, model: Mapping[str, Any]):
    """Reads the answers that are there already. A last line that was cut off is removed, to be computed again.

    Args:
      path: of the file, which need not exist.
      prompts: those that are to be answered.
      model: what the settings of all lines say of the model, in JSON's types.

    Raises:
      ValueError: a line is no answer, or it answers one of `prompts` with another prompt or other settings. The file is
        then as it was.
    """
    self.path, self.finished, self._model = path, set(), model
    by_id = {line.id: line for line in prompts.lines}
    data = path.read_bytes() if path.exists() else b''
    whole = data[:data.rfind(b'\n') + 1]
    lines = whole.decode('utf-8', 'replace').split('\n')[:-1]
    for number, text in enumerate(lines, 1):
      self._read(number, text, by_id)
    if not _BEGINNING.startswith(data[len(whole):][:len(_BEGINNING)]):
      self._refuse(len(lines) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('ab') as file:
      file.truncate(len(whole))

  def _read(self, number: int, text: str, by_id: Mapping[str, PromptLine]) -> None:
    try:
      answer = json_value(text)
      name, settings = answer['id'], answer['settings']
      old = {'prompt': answer['prompt'], **settings}
      line = by_id.get(name)
    except (ValueError, KeyError, TypeError):
      self._refuse(number)
    if line is None:
      return   # the answer to a prompt that the file of prompts no longer has is kept
    new = {'prompt': line.prompt, **line.settings, **self._model}
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
      key = changed[0]
      raise ValueError(f'id={name!r} in line {number} of {self.path} was answered with {key}={old.get(key)!r:.100}, '
                       f'and now it has {key}={new.get(key)!r:.100}; give another --out, or delete the line')
    self.finished.add(name)

  def _refuse(self, number: int) -> NoReturn:
    raise ValueError(f'line {number} of {self.path} is no answer that this program wrote; give another --out')

  def add(self, line: PromptLine, answers: list[Mapping[str, Any]]) -> None:
    """Adds the answers to a prompt."""
    record = {'id': line.id, 'prompt': line.prompt, 'settings': {**line.settings, **self._model}, 'answers': answers}
    with self.path.open('a', encoding='utf-8') as file:
      file.write(json.dumps(record, ensure_ascii=False) + '\n')
    self.finished.add(line.id)
