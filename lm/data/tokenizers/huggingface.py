"""Tokenizers of Hugging Face: tokenizer.json files, and GPT-2's two files, which become a tokenizer.json."""
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
_SECRET = f'\ue000{secrets.token_hex(8)}\ue001'   # random, so that no text contains it


@dataclasses.dataclass(frozen=True)
class HuggingFace(base.TokenizerBase):
  """A tokenizer of the `tokenizers` library, given by the text of its tokenizer.json and the names of bos and eos.

  The file's post-processor, truncation and padding are not applied. Its control tokens are those that the file calls
  special, and those that are named like marks of a template (`base.MARK`).
  """
  model: str = dataclasses.field(repr=False)
  bos: str
  eos: str
  ends: tuple[int, ...] = dataclasses.field(default=(), compare=False)
  adds_bos: bool = dataclasses.field(default=True, compare=False)

  @functools.cached_property
  def _original(self) -> Any:
    """The tokenizer of the unchanged file."""
    return _open_once(self.model)

  @functools.cached_property
  def _tokenizer(self) -> Any:
    """The tokenizer for `encode`, which treats control tokens as text."""
    return _open(literal(self.model, set(self._control)))

  @functools.cached_property
  def _parser(self) -> Any:
    """The tokenizer for `parse`, which recognises control tokens."""
    return _open(literal(self.model, set()))

  @functools.cached_property
  def _table(self) -> list[bytes]:
    vocabulary = self._original.get_vocab(with_added_tokens=True)
    added = self._original.get_added_tokens_decoder()
    form = json_value(self.model)
    is_byte_level = _has(form, 'ByteLevel')
    fallback = form['model'].get('byte_fallback') or _has(form, 'ByteFallback')
    table = [b''] * (1 + max(vocabulary.values()))
    for name, i in vocabulary.items():
      if i in added:
        table[i] = b'' if name in self._control else name.encode()
      elif fallback and _BYTE.fullmatch(name):
        table[i] = bytes([int(name[3:5], 16)])
      elif is_byte_level:
        table[i] = byte_level_bytes(name)
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
    """The ids that the file's post-processor puts before a text."""
    encoded = self._original.encode('a')
    added = [*encoded.special_tokens_mask, 0]
    return tuple(encoded.ids[:added.index(0)])

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    for text in texts:
      base.utf8(text)
    encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def parse(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    base.utf8(text)
    encoded = self._parser.encode(text, add_special_tokens=False)
    spans = np.array(encoded.offsets, int).reshape(-1, 2)
    # In some files, the span of a word lacks the space before it.
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


@functools.lru_cache(maxsize=1)   # `folder.load` makes several tokenizers of a file, one after the other
def _open_once(model: str) -> Any:
  return _open(model)


def _open(model: str) -> Any:
  """Opens the text of a tokenizer.json with the library. Raises ValueError if the library cannot read it."""
  module = source.require('tokenizers', 'tokenizers')
  try:
    tokenizer = module.Tokenizer.from_str(model)
  except Exception as error:   # the library raises no narrower class
    raise ValueError(f'this is no tokenizer.json: {error}') from None
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _has(form: Mapping[str, Any], kind: str) -> bool:
  """Returns whether the pre-tokenizer or the decoder of a tokenizer.json, or a part of one, is of a kind."""
  parts = [form.get('pre_tokenizer'), form.get('decoder')]
  for part in parts:
    if isinstance(part, dict):
      if part.get('type') == kind:
        return True
      parts += [*part.get('pretokenizers', ()), *part.get('decoders', ())]
  return False


def with_added(model: str, tokens: Mapping[int, Mapping[str, Any]]) -> str:
  """Returns the text of a tokenizer.json with further added tokens, by id; the same text if it has all of them.

  Raises ValueError if transformers would give a token another id: the id of its name, or else the next id.
  """
  if not tokens:
    return model
  form = json_value(model)
  if not isinstance(form, dict) or 'vocab' not in form.get('model', {}):
    return model   # not a tokenizer.json: `_open` raises an error
  words = form['model']['vocab']
  ids = words if isinstance(words, dict) else {name: i for i, (name, _) in enumerate(words)}
  added, changed = {token['content']: token for token in form.setdefault('added_tokens', [])}, False
  for i, token in sorted(tokens.items()):
    name = token['content']
    old = added.get(name)
    next_id = max(len(ids), *(1 + each['id'] for each in added.values())) if added else len(ids)
    expected = old['id'] if old else ids.get(name, next_id)
    if i != expected:
      raise ValueError(f'the files beside it add {name!r} as token {i}, and transformers would give it the id '
                       f'{expected}; save its tokenizer.json with transformers')
    if old is None:
      added[name] = dict(token)
      form['added_tokens'].append(added[name])
      changed = True
    elif old['special'] != token['special']:
      old['special'] = token['special']
      changed = True
  return json.dumps(form, ensure_ascii=False) if changed else model


def literal(model: str, control: Set[str]) -> str:
  """Returns a tokenizer.json that encodes the names in `control` as text, and '<0x41>' as text, not as the byte 0x41.

  Control tokens are renamed to random names, and keep their ids. Pieces of bytes keep their names, because the library
  looks them up by name; instead, merges that make these names are removed, or text is cut inside of them.
  """
  form = json_value(model)
  inner = form['model']
  words = inner['vocab'] if isinstance(inner['vocab'], dict) else dict(inner['vocab'])
  has_bytes = any(map(_BYTE.fullmatch, words)) and (inner.get('byte_fallback') or _has(form, 'ByteFallback'))
  if not control and not has_bytes:
    return model
  names = {name: f'{_SECRET}{i}' for i, name in enumerate(sorted(control))}
  new_name = lambda name: names.get(name, name)
  for token in form.get('added_tokens', ()):
    token['content'] = new_name(token['content'])
  if isinstance(inner['vocab'], dict):
    inner['vocab'] = {new_name(name): i for name, i in words.items()}
  else:
    inner['vocab'] = [[new_name(name), score] for name, score in inner['vocab']]
  if isinstance(inner.get('unk_token'), str):
    inner['unk_token'] = new_name(inner['unk_token'])
  if 'merges' in inner:
    pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in inner['merges']]
    inner['merges'] = [pair for pair in pairs if not control.intersection((*pair, ''.join(pair)))
                       and not (has_bytes and _BYTE.fullmatch(''.join(pair)))]
  if has_bytes and ('merges' not in inner or inner.get('ignore_merges')):   # such models look up whole words
    cut = {'type': 'Split', 'pattern': {'Regex': '<(?=0x[0-9A-F]{2}>)'}, 'behavior': 'Isolated', 'invert': False}
    parts = [part for part in (form.get('pre_tokenizer'), cut) if part]
    form['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': parts}
  form['post_processor'] = None
  return json.dumps(form)


def gpt2(names: str, merges: str, special: Sequence[str], added: Mapping[str, int], prefix_space: bool) -> str:
  """Returns the tokenizer.json of GPT-2's vocab.json and merges.txt (byte-level BPE, with its pre-tokenizer).

  Args:
    names: the text of vocab.json.
    merges: the text of merges.txt.
    special: control tokens; those without an id get the next ids, as in transformers.
    added: ids of control tokens beyond the vocabulary, from added_tokens.json.
    prefix_space: whether a space is put before a text (RoBERTa's option).

  Raises ValueError if the vocabulary is not byte-level, or marks the ends of words.
  """
  ids = json_value(names)
  if missing := byte_level().keys() - ids:
    raise ValueError(f'its vocabulary is not byte-level: it lacks {len(missing)} of 256 bytes; give a tokenizer.json')
  if any(name.endswith('</w>') for name in ids):
    raise ValueError("its '</w>' marks the end of words, as in CLIP and unlike GPT-2; give a tokenizer.json")
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


def wordpiece(words: Sequence[str], lower_case: bool, strip_accents: bool | None = None, chinese: bool = True) -> str:
  """Returns the tokenizer.json of BERT's vocab.txt (WordPiece), whose lines are `words`.

  Args:
    words: the names of tokens, by id.
    lower_case: whether text is changed to lower case.
    strip_accents: whether accents are removed; None: if text is changed to lower case.
    chinese: whether each Chinese character is a word.

  Raises ValueError if [UNK], [CLS] or [SEP] is missing.
  """
  ids = {word: i for i, word in enumerate(words)}
  if missing := [name for name in ('[UNK]', '[CLS]', '[SEP]') if name not in ids]:
    raise ValueError(f'its vocab.txt is not that of a BERT: it lacks {", ".join(missing)}; give a tokenizer.json')
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  special = sorted((ids[name], name) for name in ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]') if name in ids)
  return json.dumps({
      'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [
          {'id': i, 'content': name, **flags, 'special': True} for i, name in special],
      'normalizer': {'type': 'BertNormalizer', 'clean_text': True, 'handle_chinese_chars': chinese,
                     'strip_accents': strip_accents, 'lowercase': lower_case},
      'pre_tokenizer': {'type': 'BertPreTokenizer'},
      'post_processor': {'type': 'BertProcessing', 'sep': ['[SEP]', ids['[SEP]']], 'cls': ['[CLS]', ids['[CLS]']]},
      'decoder': {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
      'model': {'type': 'WordPiece', 'unk_token': '[UNK]', 'continuing_subword_prefix': '##',
                'max_input_chars_per_word': 100, 'vocab': ids}})


def byte_level_bytes(name: str) -> bytes:
  """Returns the bytes that a name of a byte-level vocabulary stands for; other characters stand for themselves."""
  try:
    return name.translate(_latin_1()).encode('latin-1')
  except UnicodeEncodeError:
    bytes_of = byte_level()
    return b''.join(bytes_of.get(character, character.encode()) for character in name)


@functools.cache
def _latin_1() -> dict[int, str]:
  """Returns the character of Latin-1 that has the byte of each character; none for those that represent no byte."""
  no_byte = dict.fromkeys(range(128, 256), '\ufffd')
  return no_byte | {ord(character): byte.decode('latin-1') for character, byte in byte_level().items()}


def byte_level() -> dict[str, bytes]:
  """Returns the byte of each character with which GPT-2 represents bytes.

  A byte that is a printable character is represented by itself, the others by the characters from U+0100 on.
  """
  visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
  hidden = [byte for byte in range(256) if byte not in visible]
  return ({chr(byte): bytes([byte]) for byte in visible}
          | {chr(256 + i): bytes([byte]) for i, byte in enumerate(hidden)})
