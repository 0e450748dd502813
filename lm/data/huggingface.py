"""Tokenizers of Hugging Face: tokenizer.json files, and GPT-2's two files as one of those."""
import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.data import source, vocabulary


@dataclasses.dataclass(frozen=True)
class HuggingFace(vocabulary.Base):
  """A tokenizer of the `tokenizers` library, by the text of its tokenizer.json and the names of bos and eos in it.

  What the file adds around a text (post-processor), cuts (truncation) or fills up (padding) is left out.
  """
  model: str = dataclasses.field(repr=False)
  bos: str
  eos: str
  ends: tuple[int, ...] = dataclasses.field(default=(), compare=False)
  adds_bos: bool = dataclasses.field(default=True, compare=False)

  @functools.cached_property
  def _tokenizer(self) -> Any:
    return self._opened(True)

  @functools.cached_property
  def _parser(self) -> Any:
    return self._opened(False)

  def _opened(self, control_is_text: bool) -> Any:
    module = source.require('tokenizers', 'tokenizers')
    try:
      tokenizer = module.Tokenizer.from_str(self.model)
    except Exception as error:  # the library raises no narrower class
      raise ValueError(f'this is no tokenizer.json: {error}') from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = control_is_text
    return tokenizer

  @functools.cached_property
  def _table(self) -> list[bytes]:
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    added = self._tokenizer.get_added_tokens_decoder()
    byte = byte_level() if '"ByteLevel"' in self.model else None
    table = [b''] * (1 + max(vocabulary.values()))
    for name, i in vocabulary.items():
      if i in added:
        table[i] = b'' if added[i].special else name.encode()
      elif byte:
        table[i] = b''.join(byte.get(c, c.encode()) for c in name)
      elif re.fullmatch('<0x[0-9A-F]{2}>', name):
        table[i] = bytes([int(name[3:5], 16)])
      else:
        table[i] = name.removeprefix('##').replace('▁', ' ').encode()
    return table

  @functools.cached_property
  def _control(self) -> dict[str, int]:
    return {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

  @functools.cached_property
  def front(self) -> tuple[int, ...]:
    """The ids that the file itself puts in front of a text (its post-processor)."""
    encoded = self._parser.encode('a')
    added = [*encoded.special_tokens_mask, 0]
    return tuple(encoded.ids[:added.index(0)])

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    for text in texts:
      vocabulary.utf8(text)
    return [np.array(x.ids, np.int32) for x in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

  def parse(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    vocabulary.utf8(text)
    found = self._parser.encode(text, add_special_tokens=False)
    spans = np.array(found.offsets, int).reshape(-1, 2)
    # Some files leave the space before a word out of its span.
    spans[:, 0] = np.minimum(spans[:, 0], np.r_[0, spans[:, 1]][:-1])
    return np.array(found.ids, np.int32), spans

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._tokenizer.decode(self._checked(ids))

  def save(self, folder: str | os.PathLike) -> None:
    vocabulary.write(folder, 'tokenizer.json', self.model.encode())
    vocabulary.write_separators(folder, self)


def gpt2(names: str, merges: str, special: Sequence[str], added: Mapping[str, int], prefix_space: bool) -> str:
  """The tokenizer.json of GPT-2's vocab.json and merges.txt (byte-level BPE, its pre-tokenizer).

  Args:
    names, merges: what the files hold.
    special: control tokens; those that have no id get the next ones, as in transformers.
    added: ids of control tokens beyond the vocabulary, of added_tokens.json.
    prefix_space: whether a text starts with a space that it does not have (RoBERTa's option).
  """
  ids = json.loads(names)
  if missing := byte_level().keys() - ids:
    raise ValueError(f'no byte-level vocabulary: it lacks {len(missing)} of 256 bytes')
  if any(name.endswith('</w>') for name in ids):
    raise ValueError("its '</w>' marks the end of words, as in CLIP, not GPT-2's way; it needs a tokenizer.json")
  lines = merges.split('\n')
  pairs = [line.rstrip('\r').split(' ') for line in lines[lines[0].startswith('#version'):] if line.strip()]
  control = dict(added)
  for name in dict.fromkeys(special):
    control.setdefault(name, ids[name] if name in ids else 1 + max((*ids.values(), *control.values())))
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  level = {'type': 'ByteLevel', 'add_prefix_space': prefix_space, 'trim_offsets': True, 'use_regex': True}
  return json.dumps({
      'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None, 'post_processor': None,
      'added_tokens': [{'id': i, 'content': name, **flags, 'special': True}
                       for name, i in sorted(control.items(), key=lambda item: item[1])],
      'pre_tokenizer': level, 'decoder': level, 'model': {'type': 'BPE', 'vocab': ids, 'merges': pairs}})


def byte_level() -> dict[str, bytes]:
  """GPT-2's printable stand-ins for bytes: those that print stand for themselves, the others for U+0100 and up."""
  visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
  hidden = [byte for byte in range(256) if byte not in visible]
  return {chr(byte): bytes([byte]) for byte in visible} | {chr(256 + i): bytes([b]) for i, b in enumerate(hidden)}
