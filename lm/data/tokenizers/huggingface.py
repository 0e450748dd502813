"""Tokenizers of Hugging Face: tokenizer.json files, and GPT-2's two files as one of those."""
import dataclasses
import functools
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from lm.data.text import source
from lm.data.tokenizers import base
from lm.workdir.parsing import json_value

_BYTE = re.compile('<0x[0-9A-F]{2}>')
_SECRET = f'\ue000{secrets.token_hex(8)}\ue001'   # no text has it


@dataclasses.dataclass(frozen=True)
class HuggingFace(base.TokenizerBase):
  """A tokenizer of the `tokenizers` library, by the text of its tokenizer.json and the names of bos and eos in it.

  What the file adds around a text (post-processor), cuts (truncation) or fills up (padding) is left out. Its control
  tokens are those that it calls special, and those named like marks of a template (`vocabulary.MARK`).
  """
  model: str = dataclasses.field(repr=False)
  bos: str
  eos: str
  ends: tuple[int, ...] = dataclasses.field(default=(), compare=False)
  adds_bos: bool = dataclasses.field(default=True, compare=False)

  @functools.cached_property
  def _original(self) -> Any:
    return _opened(self.model)

  @functools.cached_property
  def _tokenizer(self) -> Any:
    """For text: it has no control tokens."""
    return _opened(literal(self.model, set(self._control)))

  @functools.cached_property
  def _parser(self) -> Any:
    """For text that spells control tokens on purpose."""
    return _opened(literal(self.model, set()))

  @functools.cached_property
  def _table(self) -> list[bytes]:
    vocabulary = self._original.get_vocab(with_added_tokens=True)
    added = self._original.get_added_tokens_decoder()
    form = json_value(self.model)
    byte = byte_level() if _has(form, 'ByteLevel') else None
    fallback = form['model'].get('byte_fallback') or _has(form, 'ByteFallback')
    table = [b''] * (1 + max(vocabulary.values()))
    for name, i in vocabulary.items():
      if i in added:
        table[i] = b'' if name in self._control else name.encode()
      elif byte and not (fallback and _BYTE.fullmatch(name)):
        table[i] = b''.join(byte.get(c, c.encode()) for c in name)
      elif fallback and _BYTE.fullmatch(name):
        table[i] = bytes([int(name[3:5], 16)])
      else:
        table[i] = name.removeprefix('##').replace('▁', ' ').encode()
    return table

  @functools.cached_property
  def lossless(self) -> bool:
    strips = any(token.lstrip or token.rstrip for token in self._original.get_added_tokens_decoder().values()
                 if token.content not in self._control)
    return json_value(self.model).get('normalizer') is None and not strips and super().lossless

  @functools.cached_property
  def _control(self) -> dict[str, int]:
    return {token.content: i for i, token in self._original.get_added_tokens_decoder().items()
            if token.special or base.MARK.fullmatch(token.content)}

  @functools.cached_property
  def front(self) -> tuple[int, ...]:
    """The ids that the file itself puts in front of a text (its post-processor)."""
    encoded = self._original.encode('a')
    added = [*encoded.special_tokens_mask, 0]
    return tuple(encoded.ids[:added.index(0)])

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    for text in texts:
      base.utf8(text)
    return [np.array(x.ids, np.int32) for x in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

  def parse(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    base.utf8(text)
    encoded = self._parser.encode(text, add_special_tokens=False)
    spans = np.array(encoded.offsets, int).reshape(-1, 2)
    # Some files leave the space before a word out of its span.
    spans[:, 0] = np.minimum(spans[:, 0], np.r_[0, spans[:, 1]][:-1])
    return np.array(encoded.ids, np.int32), spans

  def _ends(self, text: str, ids: np.ndarray) -> np.ndarray:
    offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
    return np.array([len(text[:end].encode()) for _, end in offsets], int)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    control = set(self._control.values())
    return self._original.decode([i for i in self._checked(ids) if i not in control])

  def save(self, folder: str | os.PathLike) -> None:
    base.write(folder, 'tokenizer.json', self.model.encode())
    base.write_separators(folder, self)


def _opened(model: str) -> Any:
  module = source.require('tokenizers', 'tokenizers')
  try:
    tokenizer = module.Tokenizer.from_str(model)
  except Exception as error:  # the library raises no narrower class
    raise ValueError(f'this is no tokenizer.json: {error}') from None
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _has(form: Mapping[str, Any], kind: str) -> bool:
  """Whether the pre-tokenizer or the decoder of a tokenizer.json is of a kind, or has a part that is."""
  parts = [form.get('pre_tokenizer'), form.get('decoder')]
  for part in parts:
    if isinstance(part, dict):
      if part.get('type') == kind:
        return True
      parts += [*part.get('pretokenizers', ()), *part.get('decoders', ())]
  return False


def with_added(model: str, tokens: Mapping[int, Mapping[str, Any]]) -> str:
  """The tokenizer.json with more added tokens, by id; the text itself where it has them all.

  Raises ValueError where transformers would give one another id: that of its name, or else the next one.
  """
  if not tokens:
    return model
  form = json_value(model)
  if not isinstance(form, dict) or 'vocab' not in form.get('model', {}):
    return model   # no tokenizer.json: what opens it says so
  words = form['model']['vocab']
  ids = words if isinstance(words, dict) else {name: i for i, (name, _) in enumerate(words)}
  known, changed = {token['content']: token for token in form.setdefault('added_tokens', [])}, False
  for i, token in sorted(tokens.items()):
    name, old = token['content'], known.get(token['content'])
    following = max(len(ids), *(1 + each['id'] for each in known.values())) if known else len(ids)
    expected = old['id'] if old else ids.get(name, following)
    if i != expected:
      raise ValueError(f'the files beside it add {name!r} as token {i}, and transformers would give it the id '
                       f'{expected}')
    if old is None:
      known[name] = dict(token)
      form['added_tokens'].append(known[name])
      changed = True
    elif old['special'] != token['special']:
      old['special'], changed = token['special'], True
  return json.dumps(form, ensure_ascii=False) if changed else model


def literal(model: str, control: Set[str]) -> str:
  """The tokenizer.json without ways from a text to the names in `control`, or from '<0x41>' to the byte it names.

  A control token keeps its id under a name that nobody can know, so that neither added tokens nor the vocabulary match
  it. Pieces of bytes keep their names, by which the library looks them up: what makes them of text is left out.
  """
  form = json_value(model)
  inner = form['model']
  words = inner['vocab'] if isinstance(inner['vocab'], dict) else dict(inner['vocab'])
  has_bytes = any(map(_BYTE.fullmatch, words)) and (inner.get('byte_fallback') or _has(form, 'ByteFallback'))
  if not control and not has_bytes:
    return model
  names = {name: f'{_SECRET}{i}' for i, name in enumerate(sorted(control))}
  renamed = lambda name: names.get(name, name)
  for token in form.get('added_tokens', ()):
    token['content'] = renamed(token['content'])
  inner['vocab'] = ({renamed(name): i for name, i in words.items()} if isinstance(inner['vocab'], dict) else
                    [[renamed(name), score] for name, score in inner['vocab']])
  if isinstance(inner.get('unk_token'), str):
    inner['unk_token'] = renamed(inner['unk_token'])
  if 'merges' in inner:
    pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in inner['merges']]
    inner['merges'] = [pair for pair in pairs if not control.intersection((*pair, ''.join(pair)))
                       and not (has_bytes and _BYTE.fullmatch(''.join(pair)))]
  if has_bytes and ('merges' not in inner or inner.get('ignore_merges')):   # these look for whole words
    cut = {'type': 'Split', 'pattern': {'Regex': '<(?=0x[0-9A-F]{2}>)'}, 'behavior': 'Isolated', 'invert': False}
    parts = [part for part in (form.get('pre_tokenizer'), cut) if part]
    form['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': parts}
  form['post_processor'] = None
  return json.dumps(form)


def gpt2(names: str, merges: str, special: Sequence[str], added: Mapping[str, int], prefix_space: bool) -> str:
  """The tokenizer.json of GPT-2's vocab.json and merges.txt (byte-level BPE, its pre-tokenizer).

  Args:
    names, merges: what the files hold.
    special: control tokens; those that have no id get the next ones, as in transformers.
    added: ids of control tokens beyond the vocabulary, of added_tokens.json.
    prefix_space: whether a text starts with a space that it does not have (RoBERTa's option).
  """
  ids = json_value(names)
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
