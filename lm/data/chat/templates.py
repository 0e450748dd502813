"""Hugging Face chat templates: from messages to text, tokens and a mask of the assistant's messages."""
import dataclasses
import functools
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data import tokenizers
from lm.data.chat.template_process import Renderer
from lm.data.tokenizers import base
from lm.workdir.parsing import read_object_if_any

Records = Sequence[Mapping[str, Any]]
_MARK = f'\ue000{secrets.token_hex(8)}\ue001'


@dataclasses.dataclass(frozen=True)
class JinjaTemplate:
  """A chat template. It is untrusted code, and is rendered in jinja2's sandbox, in a process that can be stopped.

  Attributes:
    source: the text of the template.
    variables: values by name beside the messages: bos_token, eos_token, and options such as enable_thinking.
    seconds: time limit of one rendering.

  All methods raise ValueError if the template is wrong, refuses the messages (`raise_exception`), takes too long or too
  much memory, or writes too much, and if a message lacks its role or content.
  """
  source: str
  variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seconds: float = 5

  @property
  def writes_tools(self) -> bool:
    return re.search(r'\btools\b', self.source) is not None

  def render(self, messages: Records, add_generation_prompt: bool = False, tools: Records | None = None) -> str:
    """Returns the text of messages, which have a role and content, or tool_calls. Tools are JSON schemas."""
    return self._render(messages, add_generation_prompt, tools, False)[0]

  def render_spans(self, messages: Records, add_generation_prompt: bool = False,
                   tools: Records | None = None) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text, and the spans [start, end) of its characters inside {% generation %} blocks: the answers."""
    return self._render(messages, add_generation_prompt, tools, True)

  def encode(self, tokens: tokenizers.Tokenizer, messages: Records, add_generation_prompt: bool = False,
             tools: Records | None = None, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids, int32 [T], and a mask of the assistant's messages, bool [T]; bos and eos are those of the template.

    The mask leaves out messages before `first`. The template's control tokens become tokens; a control token that a
    message spells becomes text, so that a message cannot end its own turn.

    If the template has no {% generation %} blocks, the messages are rendered up to each answer and with it, and the
    difference is the answer. This raises ValueError if the template writes earlier messages differently from the last.
    """
    names = '|'.join(map(re.escape, sorted(tokens.control_names, key=len, reverse=True)))
    marked = functools.partial(re.sub, names, lambda match: f'{_MARK}{match[0]}{_MARK}')
    messages, tools = _mapped(marked, messages), _mapped(marked, tools)
    if re.search(r'\{%[-+]?\s*generation\b', self.source):
      text, spans = self.render_spans(messages, add_generation_prompt, tools)
      before = self.render(messages[:first], False, tools) if first else ''
      spans = [span for span in spans if span[0] >= len(os.path.commonprefix([text, before]))]
    else:
      text = self.render(messages, add_generation_prompt, tools)
      spans = self._answers(text, messages, tools, first, tokens.control_names)
    is_answer = np.zeros(len(text), bool)   # of each character
    for start, end in spans:
      is_answer[start:end] = True
    ids, mask = [np.zeros(0, np.int32)], [np.zeros(0, bool)]

    def add_text(begin: int, stop: int) -> None:
      if begin < stop:
        parsed, token_spans = tokens.parse(text[begin:stop])
        ids.append(parsed)
        mask.append(np.array([is_answer[begin + start:begin + end].any() for start, end in token_spans], bool))

    place = 0
    for match in re.finditer(f'{_MARK}({names}){_MARK}|{_MARK}', text):
      add_text(place, match.start())
      if match[1]:
        ids.append(tokens.encode(match[1]))
        mask.append(np.full(len(ids[-1]), is_answer[match.start(1)]))
      place = match.end()
    add_text(place, len(text))
    return np.concatenate(ids), np.concatenate(mask)

  def _answers(self, text: str, messages: Records, tools: Records | None, first: int, control: Sequence[str]
               ) -> list[tuple[int, int]]:
    """Returns the spans [start, end) in the text of the answers from message `first` on, each with its end token."""
    spans = []
    for i, message in enumerate(messages):
      if i < first or not isinstance(message, Mapping) or message.get('role') != 'assistant':
        continue
      before = self.render(messages[:i], True, tools) if i else None
      after = self.render(messages[:i + 1], False, tools)
      if before is None or not after.startswith(before) or not text.startswith(after):
        raise ValueError(f'the chat template does not show where message {i}, of the assistant, begins and ends; put '
                         '{% generation %} and {% endgeneration %} around the content of such messages in it')
      stripped = after.rstrip()   # a model stops at the end token, and does not write the newline after it
      end = len(stripped) if stripped.endswith(tuple(control)) else len(after)
      spans.append((len(before), max(len(before), end)))
    return spans

  def check(self, tokens: tokenizers.Tokenizer) -> str:
    """Returns a note for the user, or ''.

    The note names the answers whose end no control token marks, and the marks of the template that are plain text.
    """
    exchange = [{'role': role, 'content': role} for role in ('user', 'assistant')]
    text = self.render(exchange)
    try:
      ids, mask = self.encode(tokens, exchange * 2)
    except ValueError:   # the template takes one exchange only, or does not show where earlier answers are
      ids, mask = self.encode(tokens, exchange)
    is_control = np.isin(ids, [tokens.control_id(name) for name in tokens.control_names])
    spans = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    has_end = [bool(is_control[start:end].any()) for start, end in spans]   # of each answer
    notes = []
    if not all(has_end):
      which = 'answers before the last'
      if not any(has_end):
        which = 'answers'
      elif has_end[0]:
        which = 'the last answer'
      notes.append(f'the chat template marks the end of {which} with no token of the tokenizer: the model learns no '
                   'token to stop at there')
    if plain := [name for name in dict.fromkeys(base.MARK.findall(text)) if name not in tokens.control_names]:
      notes.append(f'the chat template writes {", ".join(plain)} as plain text, which a message can spell too')
    return '; '.join(notes)

  def ends(self, tokens: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the control token that the template writes at the end of an answer, or () if there is none."""
    try:
      ids, mask = self.encode(tokens, [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])
    except ValueError:   # the template does not show where an answer is
      return ()
    control = {tokens.control_id(name) for name in tokens.control_names}
    return tuple(i for i in ids[mask][-1:].tolist() if i in control)

  def jinja(self, tokens: tokenizers.Tokenizer) -> str:
    """Returns the text of the template."""
    del tokens
    return self.source

  def _render(self, messages, add_generation_prompt, tools, marks):
    """Returns the text and, if `marks`, the spans of its {% generation %} blocks."""
    if not messages:
      raise ValueError('there are no messages')
    for i, message in enumerate(messages):
      if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
        raise ValueError(f"message {i} has no role, such as 'user': {message!r}")
      if message.get('content') is None and not message.get('tool_calls'):
        raise ValueError(f'message {i} has no content: {message!r}')
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    inputs = {'messages': plain, 'tools': tools, 'documents': None, 'add_generation_prompt': add_generation_prompt}
    try:
      request = json.dumps([{**self.variables, **inputs}, marks])
    except (TypeError, ValueError, RecursionError) as error:
      raise ValueError(f'messages, tools and variables must be plain data, as in JSON: {error}') from None
    return self._renderer.answer(request, self.seconds)

  @functools.cached_property
  def _renderer(self) -> Renderer:
    return Renderer(self.source)

  def __reduce__(self):
    return type(self), (self.source, self.variables, self.seconds)


def refuse_missing(names: Iterable[str], tokens: tokenizers.Tokenizer) -> None:
  """Raises ValueError unless all names are control tokens of the tokenizer."""
  if missing := [name for name in names if name not in tokens.control_names]:
    raise ValueError(f'the chat template writes {", ".join(missing)}, no control token of the tokenizer, which would '
                     f'be read as text; its control tokens are {", ".join(tokens.control_names[:12])}. Use the '
                     'template of this tokenizer, or no template (--plain, of finetune_chat.py and preference.py)')


def sources(folder: str | os.PathLike) -> dict[str, str]:
  """Returns the templates of a Hugging Face folder by name, from *.jinja files or from tokenizer_config.json."""
  folder = pathlib.Path(folder)
  texts = {path.stem: path.read_bytes().decode() for path in sorted(folder.glob('additional_chat_templates/*.jinja'))}
  if (path := folder / 'chat_template.jinja').is_file():
    texts['default'] = path.read_bytes().decode()
  if not texts:
    path = folder / 'tokenizer_config.json'
    legacy = read_object_if_any(path).get('chat_template') or {}
    try:
      texts = {'default': legacy} if isinstance(legacy, str) else {each['name']: each['template'] for each in legacy}
    except (KeyError, TypeError) as error:
      raise ValueError(f'{path}: chat_template is neither text nor a list of named templates: {error!r}') from None
  return texts


def load(folder: str | os.PathLike, name: str = 'default') -> JinjaTemplate:
  """Returns a template of a Hugging Face folder. Raises ValueError, with the existing names, if it has no such one."""
  texts = sources(folder)
  if name not in texts:
    raise ValueError(f'{folder} has no chat template {name!r}, only: {", ".join(texts) or "none"}')
  return JinjaTemplate(texts[name], tokenizers.special_tokens(folder))


def _mapped(function: Any, value: Any) -> Any:
  """Returns a JSON value with the function applied to every string in it, except for keys."""
  if isinstance(value, str):
    return function(value)
  if isinstance(value, Mapping):
    return {key: _mapped(function, each) for key, each in value.items()}
  return [_mapped(function, each) for each in value] if isinstance(value, list | tuple) else value
