"""Messages to tokens without Jinja: the chat template of the tokenizers that are trained here, or none at all.

A template, as `chat.Template` is one, has `encode`, `check` and `ends`; see there.
"""
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lm.data.chat import templates
from lm.data.tokenizers.folder import Tokenizer

Messages = Sequence[Mapping[str, Any]]   # each with a role, 'system', 'user' or 'assistant', and its content


class Template(Protocol):
  """How messages become tokens."""

  def encode(self, tokens: Tokenizer, messages: Messages, add_generation_prompt: bool = False, *, first: int = 0
             ) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [T], and which of them are to be learned, bool [T]: what the assistant said from message `first` on,
    and the token that ends it. With `add_generation_prompt`, up to where the assistant is to speak next. These are all
    the ids: no bos is put in front of them."""

  def check(self, tokens: Tokenizer) -> str:
    """What is to be known of the template with a tokenizer, in a line; ValueError where they do not go together."""

  def ends(self, tokens: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer, beside the tokenizer's `eos_ids`."""

  def jinja(self, tokens: Tokenizer) -> str:
    """The template as Hugging Face folders have it: what `encode` writes, as text."""


@dataclasses.dataclass(frozen=True)
class Turns:
  """<s><|user|>hello<|end|><|assistant|>hi<|end|>, with control tokens of `vocabulary.CONTROL`: no text can spell them.

  It begins with bos where a text of the tokenizer does.
  """
  end: str = '<|end|>'

  def encode(self, tokens: Tokenizer, messages: Messages, add_generation_prompt: bool = False, *, first: int = 0
             ) -> tuple[np.ndarray, np.ndarray]:
    ids, said = _begin(tokens)
    for i, (role, content) in enumerate(map(_read, messages)):
      written = tokens.encode(content)
      ids += [[tokens.control_id(f'<|{role}|>')], written, [tokens.control_id(self.end)]]
      said += [[False], np.full(len(written) + 1, role == 'assistant' and i >= first)]
    if add_generation_prompt:
      ids, said = [*ids, [tokens.control_id('<|assistant|>')]], [*said, [False]]
    return np.concatenate(ids).astype(np.int32), np.concatenate(said).astype(bool)

  def check(self, tokens: Tokenizer) -> str:
    templates.refuse_missing([*(f'<|{role}|>' for role in _ROLES), self.end], tokens)
    return ''

  def ends(self, tokens: Tokenizer) -> tuple[int, ...]:
    return (tokens.control_id(self.end),)

  def jinja(self, tokens: Tokenizer) -> str:
    turn = f"{{{{ '<|' + message['role'] + '|>' + message['content'] + {json.dumps(self.end)} }}}}"
    return (f'{_bos(tokens)}{{% for message in messages %}}{turn}{{% endfor %}}'
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


@dataclasses.dataclass(frozen=True)
class Plain:
  """No template: what is said is text, with `between` after each message that the assistant did not write, else eos.

  It begins with bos where a text of the tokenizer does.
  """
  between: str = ''

  def encode(self, tokens: Tokenizer, messages: Messages, add_generation_prompt: bool = False, *, first: int = 0
             ) -> tuple[np.ndarray, np.ndarray]:
    del add_generation_prompt   # there is none
    ids, said = _begin(tokens)
    for i, (role, content) in enumerate(map(_read, messages)):
      answer = role == 'assistant'
      written = tokens.encode(content if answer else content + self.between)
      ids += [written, [tokens.eos_id] if answer else []]
      said.append(np.full(len(written) + answer, answer and i >= first))
    return np.concatenate(ids).astype(np.int32), np.concatenate(said).astype(bool)

  def check(self, tokens: Tokenizer) -> str:
    return ''

  def ends(self, tokens: Tokenizer) -> tuple[int, ...]:
    return ()

  def jinja(self, tokens: Tokenizer) -> str:
    end = f"(eos_token if message['role'] == 'assistant' else {json.dumps(self.between)})"
    return f"{_bos(tokens)}{{% for message in messages %}}{{{{ message['content'] + {end} }}}}{{% endfor %}}"


_ROLES = ('system', 'user', 'assistant')


def _begin(tokens: Tokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
  bos = [tokens.bos_id] if tokens.adds_bos else []
  return [np.int32(bos)], [np.zeros(len(bos), bool)]


def _bos(tokens: Tokenizer) -> str:
  return '{{ bos_token }}' if tokens.adds_bos else ''


def _read(message: Mapping[str, Any]) -> tuple[str, str]:
  role, content = message.get('role'), message.get('content')
  if role not in _ROLES or not isinstance(content, str):
    raise ValueError(f'a message has a role of {", ".join(_ROLES)}, and a content that is text: {message!r}'[:400])
  return role, content


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A tokenizer for `generate`, to which a prompt is what the user says, or messages, and the answer comes next."""
  tokenizer: Tokenizer
  template: Template

  adds_bos = False   # the template writes it, or not

  def encode_batch(self, prompts: Sequence[str | Messages]) -> list[np.ndarray]:
    """Ids up to where the assistant speaks, bos included where the template begins with it."""
    said = [[{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    return [self.template.encode(self.tokenizer, messages, add_generation_prompt=True)[0] for messages in said]

  @functools.cached_property
  def eos_ids(self) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*self.tokenizer.eos_ids, *self.template.ends(self.tokenizer))))

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__') or name == 'tokenizer':
      raise AttributeError(name)
    return getattr(self.tokenizer, name)
