"""Chat templates that need no Jinja, and the tokenizer of a conversation."""
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
  """The interface of a chat template, which turns messages into tokens.

  Attributes:
    writes_tools: whether `encode` has a further keyword argument, `tools`, for the functions that a model may call.
  """
  writes_tools: bool

  def encode(self, tokens: Tokenizer, messages: Messages, add_generation_prompt: bool = False, *, first: int = 0
             ) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids, int32 [T], and which of them are to be learned, bool [T].

    To be learned are the assistant's messages from message number `first` on, each with the token that ends it. With
    `add_generation_prompt`, the ids end where the assistant's next message begins. No bos is put before these ids.
    """

  def check(self, tokens: Tokenizer) -> str:
    """Returns a note for the user on the template with this tokenizer, or ''. Raises ValueError if they do not fit."""

  def ends(self, tokens: Tokenizer) -> tuple[int, ...]:
    """Returns ids that end an answer, in addition to the tokenizer's `eos_ids`."""

  def jinja(self, tokens: Tokenizer) -> str:
    """Returns a Jinja template, for folders of Hugging Face, that writes the text of what `encode` returns."""


@dataclasses.dataclass(frozen=True)
class Turns:
  """<s><|user|>hello<|end|><|assistant|>hi<|end|>, with control tokens (`tokenizers.CONTROL`), which no text can spell.

  A conversation begins with bos if `adds_bos` of the tokenizer is true.
  """
  end: str = '<|end|>'

  writes_tools = False

  def encode(self, tokens: Tokenizer, messages: Messages, add_generation_prompt: bool = False, *, first: int = 0
             ) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = _bos(tokens)
    for i, (role, content) in enumerate(map(_role_and_content, messages)):
      text = tokens.encode(content)
      ids += [[tokens.control_id(f'<|{role}|>')], text, [tokens.control_id(self.end)]]
      mask += [[False], np.full(len(text) + 1, role == 'assistant' and i >= first)]
    if add_generation_prompt:
      ids.append([tokens.control_id('<|assistant|>')])
      mask.append([False])
    return np.concatenate(ids).astype(np.int32), np.concatenate(mask).astype(bool)

  def check(self, tokens: Tokenizer) -> str:
    templates.refuse_missing([*(f'<|{role}|>' for role in _ROLES), self.end], tokens)
    return ''

  def ends(self, tokens: Tokenizer) -> tuple[int, ...]:
    return (tokens.control_id(self.end),)

  def jinja(self, tokens: Tokenizer) -> str:
    turn = f"{{{{ '<|' + message['role'] + '|>' + message['content'] + {json.dumps(self.end)} }}}}"
    return (f'{_jinja_bos(tokens)}{{% for message in messages %}}{turn}{{% endfor %}}'
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


@dataclasses.dataclass(frozen=True)
class Plain:
  """The plain text of messages: `between` follows each message of the user or the system, and eos each other message.

  A conversation begins with bos if `adds_bos` of the tokenizer is true.
  """
  between: str = ''

  writes_tools = False

  def encode(self, tokens: Tokenizer, messages: Messages, add_generation_prompt: bool = False, *, first: int = 0
             ) -> tuple[np.ndarray, np.ndarray]:
    del add_generation_prompt   # nothing marks the beginning of an answer
    ids, mask = _bos(tokens)
    for i, (role, content) in enumerate(map(_role_and_content, messages)):
      is_answer = role == 'assistant'
      text = tokens.encode(content if is_answer else content + self.between)
      end = [tokens.eos_id] if is_answer else []
      ids += [text, end]
      mask.append(np.full(len(text) + len(end), is_answer and i >= first))
    return np.concatenate(ids).astype(np.int32), np.concatenate(mask).astype(bool)

  def check(self, tokens: Tokenizer) -> str:
    return ''

  def ends(self, tokens: Tokenizer) -> tuple[int, ...]:
    return ()

  def jinja(self, tokens: Tokenizer) -> str:
    end = f"(eos_token if message['role'] == 'assistant' else {json.dumps(self.between)})"
    return f"{_jinja_bos(tokens)}{{% for message in messages %}}{{{{ message['content'] + {end} }}}}{{% endfor %}}"


_ROLES = ('system', 'user', 'assistant')


def _bos(tokens: Tokenizer) -> tuple[list, list]:
  """Returns the first ids of a conversation, and that they are not to be learned, each as a list of arrays."""
  bos = [tokens.bos_id] if tokens.adds_bos else []
  return [np.int32(bos)], [np.zeros(len(bos), bool)]


def _jinja_bos(tokens: Tokenizer) -> str:
  return '{{ bos_token }}' if tokens.adds_bos else ''


def _role_and_content(message: Mapping[str, Any]) -> tuple[str, str]:
  role, content = message.get('role'), message.get('content')
  if role not in _ROLES or not isinstance(content, str):
    raise ValueError(f'a message has a role of {", ".join(_ROLES)}, and a content that is text: {message!r}'[:400])
  return role, content


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A tokenizer for `generate`, with which a model answers a message of the user, or a list of messages."""
  tokenizer: Tokenizer
  template: Template

  adds_bos = False   # the template decides about bos

  def encode_batch(self, prompts: Sequence[str | Messages]) -> list[np.ndarray]:
    """Returns the ids of each prompt, up to where the assistant's answer begins, with the bos of the template."""
    conversations = [[{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    return [self.template.encode(self.tokenizer, messages, add_generation_prompt=True)[0] for messages in conversations]

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text by itself, without the template."""
    return self.tokenizer.encode(text)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self.tokenizer.decode(ids)

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    return self.tokenizer.decode_bytes(ids)

  def control_id(self, name: str) -> int:
    return self.tokenizer.control_id(name)

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @property
  def bos_id(self) -> int:
    return self.tokenizer.bos_id

  @property
  def eos_id(self) -> int:
    return self.tokenizer.eos_id

  @functools.cached_property
  def eos_ids(self) -> tuple[int, ...]:
    """The ids that end a text of the tokenizer, and those that end an answer of the template."""
    return tuple(dict.fromkeys((*self.tokenizer.eos_ids, *self.template.ends(self.tokenizer))))
