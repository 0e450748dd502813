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
from lm.workdir.parsing import json_value

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

  def render(self, messages: Records, add_generation_prompt: bool = False, tools: Records | None = None) -> str:
    """Messages have a role and content, or tool_calls; tools are JSON schemas."""
    return self._render(messages, add_generation_prompt, tools, False)[0]

  def render_spans(self, messages: Records, add_generation_prompt: bool = False,
                   tools: Records | None = None) -> tuple[str, list[tuple[int, int]]]:
    """The text, and its characters [start, end) inside {% generation %} blocks: what the assistant said."""
    return self._render(messages, add_generation_prompt, tools, True)

  def encode(self, tokens: tokenizers.Tokenizer, messages: Records, add_generation_prompt: bool = False,
             tools: Records | None = None, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids, int32 [T], and a mask of the assistant's messages, bool [T]; bos and eos are those of the template.

    The mask leaves out messages before `first`. The template's control tokens become tokens; a control token that a
    message spells becomes text, so that a message cannot end its own turn.

    The answers of a template without {% generation %} blocks are found by rendering the messages up to each answer, and
    with it. This raises ValueError if the template writes earlier messages in another way than the last one.
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
    said = np.zeros(len(text), bool)
    for start, end in spans:
      said[start:end] = True
    ids, mask, place = [np.zeros(0, np.int32)], [np.zeros(0, bool)], 0
    for match in [*re.finditer(f'{_MARK}({names}){_MARK}|{_MARK}', text), None]:
      if part := text[place:match.start() if match else None]:
        parsed, token_spans = tokens.parse(part)
        ids.append(parsed)
        mask.append(np.array([said[place + start:place + end].any() for start, end in token_spans], bool))
      if match and match[1]:
        ids.append(tokens.encode(match[1]))
        mask.append(np.full(len(ids[-1]), said[match.start(1)]))
      place = match.end() if match else place
    return np.concatenate(ids), np.concatenate(mask)

  def _answers(self, text: str, messages: Records, tools: Records | None, first: int, control: Sequence[str]
               ) -> list[tuple[int, int]]:
    """Where the text has the answers of the assistant from message `first` on, up to the token that ends each."""
    spans = []
    for i, message in enumerate(messages):
      if i < first or not isinstance(message, Mapping) or message.get('role') != 'assistant':
        continue
      before = self.render(messages[:i], True, tools) if i else None
      after = self.render(messages[:i + 1], False, tools)
      if before is None or not after.startswith(before) or not text.startswith(after):
        raise ValueError(f'the chat template does not show where message {i}, which the assistant said, begins and '
                         'ends; put {% generation %} and {% endgeneration %} around what the assistant says in it')
      shown = after.rstrip()   # a newline after the end of a turn is never written by a model
      spans.append((len(before), max(len(before), len(shown if shown.endswith(tuple(control)) else after))))
    return spans

  def check(self, tokens: tokenizers.Tokenizer) -> str:
    """What is to be known of the template with a tokenizer: which ends of answers no token marks, and which marks are
    plain text; nothing where all are tokens. ValueError where it cannot be rendered."""
    talk = [{'role': role, 'content': role} for role in ('user', 'assistant')]
    text = self.render(talk)
    try:
      ids, said = self.encode(tokens, talk * 2)
    except ValueError:   # of one turn, or it does not show where earlier answers are
      ids, said = self.encode(tokens, talk)
    control = np.isin(ids, [tokens.control_id(name) for name in tokens.control_names])
    starts, ends = (np.flatnonzero(np.diff(said, prepend=False, append=False)).reshape(-1, 2).T)
    marked = [bool(control[start:end].any()) for start, end in zip(starts, ends)]   # of each answer
    notes = []
    if not all(marked):
      which = 'answers' if not any(marked) else 'the last answer' if marked[0] else 'answers before the last'
      notes.append(f'the chat template marks the end of {which} with no token of the tokenizer: the model learns no '
                   'token to stop at there')
    if plain := [name for name in dict.fromkeys(base.MARK.findall(text)) if name not in tokens.control_names]:
      notes.append(f'the chat template writes {", ".join(plain)} as plain text, which a message can spell too')
    return '; '.join(notes)

  def ends(self, tokens: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The control token that the template writes at the end of an answer; none where it writes or shows none."""
    try:
      ids, said = self.encode(tokens, [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])
    except ValueError:   # as it does not show where an answer is
      return ()
    control = {tokens.control_id(name) for name in tokens.control_names}
    return tuple(i for i in ids[said][-1:].tolist() if i in control)

  def jinja(self, tokens: tokenizers.Tokenizer) -> str:
    """The template as Hugging Face folders have it."""
    del tokens
    return self.source

  def _render(self, messages, add_generation_prompt, tools, marks):
    if not messages:
      raise ValueError('there are no messages')
    for i, message in enumerate(messages):
      if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
        raise ValueError(f"message {i} has no role, such as 'user': {message!r}")
      if message.get('content') is None and not message.get('tool_calls'):
        raise ValueError(f'message {i} has no content: {message!r}')
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    given = {'messages': plain, 'tools': tools, 'documents': None, 'add_generation_prompt': add_generation_prompt}
    try:
      request = json.dumps([{**self.variables, **given}, marks])
    except (TypeError, ValueError, RecursionError) as error:
      raise ValueError(f'messages, tools and variables must be plain data, as in JSON: {error}') from None
    return self._renderer.answer(request, self.seconds)

  @functools.cached_property
  def _renderer(self) -> Renderer:
    return Renderer(self.source)

  def __reduce__(self):
    return type(self), (self.source, self.variables, self.seconds)


def refuse_missing(names: Iterable[str], tokens: tokenizers.Tokenizer) -> None:
  """ValueError unless all are control tokens of the tokenizer."""
  if missing := [name for name in names if name not in tokens.control_names]:
    raise ValueError(f'the chat template writes {", ".join(missing)}, no control token of the tokenizer, which would '
                     f'be read as text; its control tokens are {", ".join(tokens.control_names[:12])}. Take the '
                     'template of this tokenizer, or write texts without one (--plain, of finetune_chat.py and '
                     'preference.py)')


def sources(folder: str | os.PathLike) -> dict[str, str]:
  """Returns the templates of a Hugging Face folder by name, from *.jinja files or from tokenizer_config.json."""
  folder = pathlib.Path(folder)
  texts = {path.stem: path.read_bytes().decode() for path in sorted(folder.glob('additional_chat_templates/*.jinja'))}
  if (path := folder / 'chat_template.jinja').is_file():
    texts['default'] = path.read_bytes().decode()
  if not texts and (path := folder / 'tokenizer_config.json').is_file():
    try:
      legacy = json_value(path.read_bytes()).get('chat_template') or {}
      texts = {'default': legacy} if isinstance(legacy, str) else {each['name']: each['template'] for each in legacy}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(f'{path}: chat_template is neither text nor a list of named ones: {error!r}') from None
  return texts


def load(folder: str | os.PathLike, name: str = 'default') -> JinjaTemplate:
  """Returns a template of a Hugging Face folder. Raises ValueError, with the existing names, if the name is none."""
  texts = sources(folder)
  if name not in texts:
    raise ValueError(f'{folder} has no chat template {name!r}, only: {", ".join(texts) or "none"}')
  return JinjaTemplate(texts[name], tokenizers.special_tokens(folder))


def _mapped(function: Any, value: Any) -> Any:
  """The value with the function applied to every string in it that is no key."""
  if isinstance(value, str):
    return function(value)
  if isinstance(value, Mapping):
    return {key: _mapped(function, each) for key, each in value.items()}
  return [_mapped(function, each) for each in value] if isinstance(value, list | tuple) else value
