"""Trains tokenizers on text, and loads them from files of any kind."""
import collections
import dataclasses
import io
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lm.data.tokenizers import base, huggingface, protobuf
from lm.data.tokenizers.base import CONTROL, Bytes, Tokenizer, sentinels
from lm.data.tokenizers.huggingface import HuggingFace
from lm.data.tokenizers.sentencepiece import SentencePiece
from lm.workdir.parsing import json_value, read_object_if_any

__all__ = ['CONTROL', 'Bytes', 'HuggingFace', 'InFile', 'SentencePiece', 'Tokenizer', 'load', 'sentinels',
           'special_tokens', 'train_sentencepiece', 'mask_id']

# Names of separators in public vocabularies; the first that exists is used.
_SEPARATORS = {'bos': ('<s>', '<|begin_of_text|>', '<|startoftext|>', '<bos>', '[CLS]', '<|endoftext|>'),
               'eos': ('</s>', '<|end_of_text|>', '<eos>', '[SEP]', '<|endoftext|>')}
_MASK = ('[MASK]', '<mask>', '<|mask|>')


def train_sentencepiece(documents: Iterable[str], vocab: int, kind: Literal['bpe', 'unigram'] = 'bpe',
                        control: Sequence[str] = CONTROL, character_coverage: float = 0.9995,
                        sample_bytes: int | None = None) -> SentencePiece:
  """Trains a lossless SentencePiece model; the same documents give the same model on any machine.

  A piece may span letters and punctuation ('self.', '):\\n'), and spaces with the word after them. On Python's sources,
  this gives 3.7 bytes per token at a vocabulary of 4096, and SentencePiece's defaults give 2.1.

  Args:
    documents: texts. If they are a sequence, only the sampled ones are read.
    vocab: the number of tokens: 256 bytes, unknown, bos, eos, the control tokens, then pieces.
    kind: 'bpe' (arXiv:1508.07909), or 'unigram' (arXiv:1804.10959), whose training takes 50 times as long.
    control: names of control tokens.
    character_coverage: the share of the text whose characters get a piece each, from 0.98 to 1; rarer characters are
      spelled in bytes. A space and a tab are always pieces.
    sample_bytes: the size of a random sample of documents to train on; None: 16 MB (bpe) or 1.5 MB (unigram).

  Raises ValueError if there is no text, if `vocab` is more than the text supports or less than bytes, control tokens
  and characters take, or if another argument is out of range.
  """
  sizes = {'bpe': 16_000_000, 'unigram': 1_500_000}
  if kind not in sizes:
    raise ValueError(f"kind={kind!r} is neither 'bpe' nor 'unigram'; choose one of them")
  if not 0.98 <= character_coverage <= 1:
    raise ValueError(f'character_coverage={character_coverage} is not a share between 0.98 and 1, which are the bounds '
                     'of SentencePiece; give such a share')
  from sentencepiece import SentencePieceTrainer as trainer
  model = io.BytesIO()
  sample = _sample(documents, sizes[kind] if sample_bytes is None else sample_bytes)
  if not sample:
    raise ValueError('there is no text to train a tokenizer on; give documents that have text')
  try:
    trainer.train(
        sentence_iterator=iter(sample), model_writer=model, model_type=kind, vocab_size=vocab,
        control_symbols=list(control), character_coverage=character_coverage, byte_fallback=True,
        normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_by_unicode_script=False, required_chars='▁\t',
        max_sentence_length=8 * _PIECE, minloglevel=2,
        num_threads=8)   # a constant, because unigram sums its counts by thread, in floating point
  except RuntimeError as error:
    if match := re.search(r'value <= (\d+)', str(error)):
      raise ValueError(f'--vocab={vocab} is more than the text supports: at most {match[1]}') from None
    if match := re.search(r'required_chars\. \d+ vs (\d+)', str(error)):
      raise ValueError(f'--vocab={vocab} is too small: bytes, control tokens and the characters of the text take '
                       f'{match[1]}; raise it{_coverage_advice(sample, vocab - 259 - len(control))}') from None
    raise ValueError(f'SentencePiece cannot train: {error}') from None
  data = model.getvalue()
  if kind == 'unigram':   # rounding changes scores by less than 0.04 nats, and lets tokenizer.json have the same ids
    data = protobuf.rounded(data)
  return SentencePiece(data, '<s>', '</s>')


_PIECE = 4000   # characters; SentencePiece skips sentences that are longer than its limit


def _sample(documents: Iterable[str], size: int) -> list[str]:
  """Returns documents in a fixed random order, up to `size` bytes, in pieces that end before whitespace if possible."""
  documents = documents if hasattr(documents, '__getitem__') else list(documents)
  sample = []
  for i in np.random.default_rng(0).permutation(len(documents)).tolist():
    text = base.utf8(documents[i])[:size].decode('utf-8', 'ignore')
    sample += re.findall(rf'(?s).{{1,{_PIECE}}}(?=\s|\Z)|.{{1,{_PIECE}}}', text)
    size -= len(text.encode())
    if size <= 0:
      break
  return sample


def _coverage_advice(sample: Iterable[str], room: int) -> str:
  """Returns advice to lower the character coverage, if `room` pieces cover 98 % of the text; otherwise ''."""
  counts = sorted(collections.Counter(''.join(sample)).values(), reverse=True)
  share = sum(counts[:room - 4]) / sum(counts)   # 4 pieces are for a space, a tab, and rounding
  if room < 5 or share < 0.98:
    return ''
  return (f', or spell rare characters in bytes (--character_coverage={math.floor(share * 1e4) / 1e4} of pretrain.py '
          'and finetune_chat.py)')


def load(path: str | os.PathLike, bos: str | None = None, eos: str | None = None) -> Tokenizer:
  """Opens what `save` wrote, a Hugging Face folder, a tokenizer.json, or a SentencePiece model (of T5, Llama, ...).

  Whether a text begins with bos is decided as in transformers: by the post-processor of a tokenizer.json, or by
  add_bos_token in the tokenizer_config.json beside other files; the texts of a .model file without one begin with bos.
  Tokens that tokenizer_config.json (added_tokens_decoder) or added_tokens.json add to the vocabulary are added.

  Args:
    path: a file (vocab.json and merges.txt stand for both), or a folder. In a folder, the first of these files is read:
      bytes.json, tokenizer.json, vocab.json with merges.txt (GPT-2), vocab.txt (BERT), a .model file.
    bos: the name of the separator that begins a document. None: the name in the files beside it (separators.json, else
      tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json), else a customary name. In
      an encoder-decoder, it is the token with which the decoder starts.
    eos: likewise, the name of the separator that ends a document: the first, if the files name several, all of which
      end a text.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, or its folder has several; it has no such separator, or none with a customary name;
      or transformers would give an added token another id.
  """
  path = _file(pathlib.Path(path))
  try:
    if path.name == 'bytes.json':
      return Bytes(tuple(json_value(path.read_bytes())['control']))
    kind, data = _read(path)
    control = kind(data, '', '')._control
    bos, eos = bos or _separator(path.parent, 'bos', control), eos or _separator(path.parent, 'eos', control)
    if not bos and not eos:
      raise ValueError(f'no known separator among the control tokens ({", ".join(control) or "none"}): '
                       'name them, load(path, bos=..., eos=...)')
    tokenizer = kind(data, bos or eos, eos or bos)
    _ = tokenizer.bos_id, tokenizer.eos_id   # raises ValueError if a name is not one of the control tokens
    tokenizer = dataclasses.replace(tokenizer, ends=_ends(path.parent, tokenizer.vocab_size),
                                    adds_bos=_adds_bos(path, tokenizer))
    if isinstance(tokenizer, SentencePiece):
      tokenizer = dataclasses.replace(tokenizer, legacy=_legacy(path.parent))
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  return tokenizer


def _file(path: pathlib.Path) -> pathlib.Path:
  """Returns the file of a tokenizer: the path itself, or a file in that folder. See `load`."""
  if path.is_dir():
    names = 'bytes.json', 'tokenizer.json', 'vocab.json', 'vocab.txt'
    paths = [path / name for name in names if (path / name).is_file()]
    paths = paths[:1] or sorted(path.glob('*.model'))
    if len(paths) > 1:
      raise ValueError(f'{path} has {", ".join(file.name for file in paths)}: give the path of the one to load')
    path = paths[0] if paths else path / 'tokenizer.model'
  if not path.is_file():
    raise FileNotFoundError(f'{path}: there is no such tokenizer; give a .model file, a tokenizer.json or their folder')
  return path


def _read(path: pathlib.Path) -> tuple[type[HuggingFace | SentencePiece], str | bytes]:
  """Returns the class of a tokenizer and its model, with the tokens that files beside it add."""
  if path.name in ('vocab.json', 'merges.txt'):
    return HuggingFace, _gpt2(path.parent)
  if path.name == 'vocab.txt':
    return HuggingFace, _bert(path)
  data, added = path.read_bytes(), _added(path.parent)
  if path.suffix == '.json':
    return HuggingFace, huggingface.with_added(data.decode(), added)
  if added:
    _ = SentencePiece(data, '', '')._processor   # raises ValueError if it is not a SentencePiece model
    data = protobuf.with_added(data, {i: token['content'] for i, token in added.items()},
                               {i for i, token in added.items() if token['special']})
  return SentencePiece, data


@dataclasses.dataclass(frozen=True)
class InFile:
  """A tokenizer in a file, which data opens together with its text; see `load`."""
  path: str

  def load(self) -> Tokenizer:
    return load(self.path)


def special_tokens(folder: str | os.PathLike) -> dict[str, str]:
  """Returns bos_token, eos_token, pad_token, ... of a Hugging Face folder; nothing if it lacks their files."""
  tokens = {}
  for file in ('special_tokens_map.json', 'tokenizer_config.json'):   # the second overrides the first
    for key, value in read_object_if_any(pathlib.Path(folder) / file).items():
      name = value.get('content') if isinstance(value, dict) else value
      if key.endswith('_token') and isinstance(name, str):
        tokens[key] = name
  return tokens


def mask_id(tokenizer: Tokenizer) -> int:
  """Returns the id of the mask token. Raises ValueError if there is none with a customary name."""
  name = next((name for name in _MASK if name in tokenizer.control_names), None)
  if name is None:
    raise ValueError(f'the tokenizer has no mask token ({" or ".join(_MASK)}) among its control tokens '
                     f'({", ".join(tokenizer.control_names)}), and an encoder is scored by masking')
  return tokenizer.control_id(name)


def _separator(folder: pathlib.Path, side: str, control: Mapping[str, int]) -> str | None:
  """Returns the control token that is the separator 'bos' or 'eos', by the files of a folder or by a customary name."""
  names = [read_object_if_any(folder / 'separators.json').get(side)]
  by_id = {i: name for name, i in control.items()}
  if side == 'bos' and (config := read_object_if_any(folder / 'config.json')).get('is_encoder_decoder'):
    # T5's tokenizer has no bos; by its files, the decoder starts with pad.
    names += [by_id.get(config.get(name)) for name in ('decoder_start_token_id', 'pad_token_id')]
  names.append(special_tokens(folder).get(f'{side}_token'))
  for file in ('generation_config.json', 'config.json'):
    ids = read_object_if_any(folder / file).get(f'{side}_token_id')
    names += [by_id.get(i) for i in (ids if isinstance(ids, list) else [ids])]
  return next((name for name in (*names, *_SEPARATORS[side]) if name in control), None)


def _ends(folder: pathlib.Path, vocab: int) -> tuple[int, ...]:
  """Returns the ids that end a text, by the first file of a folder that names any."""
  for file, name in (('separators', 'ends'), ('generation_config', 'eos_token_id'), ('config', 'eos_token_id')):
    if (ids := read_object_if_any(folder / f'{file}.json').get(name)) not in (None, []):
      return tuple(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and 0 <= i < vocab)
  return ()


def _adds_bos(path: pathlib.Path, tokenizer: Tokenizer) -> bool:
  """Returns whether a text begins with bos, by the files. Raises ValueError if it begins with another token."""
  rule = read_object_if_any(path.parent / 'separators.json').get('adds_bos')
  if rule is not None:
    return rule
  if read_object_if_any(path.parent / 'config.json').get('is_encoder_decoder'):   # there, bos starts the decoder alone
    return False
  if path.name in ('tokenizer.json', 'vocab.txt'):
    front = tokenizer.front
    if front not in ((), (tokenizer.bos_id,)):
      raise ValueError(f'its post-processor puts the tokens {front} in front of a text, and bos is '
                       f'{tokenizer.bos_id}; name the token that a text begins with, load(path, bos=...)')
    return bool(front)
  config = path.parent / 'tokenizer_config.json'
  return bool(read_object_if_any(config).get('add_bos_token')) if config.is_file() else path.suffix == '.model'


def _added(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
  """Returns the tokens that files of a folder add to the vocabulary, by id, in the form of tokenizer.json."""
  config = read_object_if_any(folder / 'tokenizer_config.json')
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  if (decoder := config.get('added_tokens_decoder')) is not None:
    return {int(i): {'id': int(i), 'special': False, **flags, **token} for i, token in decoder.items()}
  extra = [*(config.get('additional_special_tokens') or ()), *(config.get('extra_special_tokens') or ())]
  special = {*special_tokens(folder).values(), *(each['content'] if isinstance(each, dict) else each for each in extra)}
  return {i: {'id': i, 'content': name, 'special': name in special, **flags, 'normalized': name not in special}
          for name, i in read_object_if_any(folder / 'added_tokens.json').items()}


def _legacy(folder: pathlib.Path) -> bool:
  """Returns whether a space is put before the text after each control token too, not only before the whole text."""
  rule = read_object_if_any(folder / 'separators.json').get('legacy')
  if rule is not None:
    return rule
  config = read_object_if_any(folder / 'tokenizer_config.json')
  return config.get('legacy', not config.get('tokenizer_class', '').startswith(('Llama', 'CodeLlama')))


def _gpt2(folder: pathlib.Path) -> str:
  """Returns the tokenizer.json of a folder with GPT-2's two files. Raises ValueError if one is missing or differs."""
  config = read_object_if_any(folder / 'tokenizer_config.json')
  name = config.get('tokenizer_class', 'GPT2Tokenizer')
  if name not in ('GPT2Tokenizer', 'GPT2TokenizerFast'):
    raise ValueError(f"{name} may split text differently from GPT-2's; save its tokenizer.json with transformers")
  if not (folder / 'merges.txt').is_file() or not (folder / 'vocab.json').is_file():
    raise ValueError("GPT-2's vocab.json and merges.txt go together, and one is missing; copy it to the folder")
  tokens = {**dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), '<|endoftext|>'), **special_tokens(folder)}
  added = {token['content']: int(i) for i, token in config.get('added_tokens_decoder', {}).items()}
  return huggingface.gpt2((folder / 'vocab.json').read_bytes().decode(), (folder / 'merges.txt').read_bytes().decode(),
                          list(tokens.values()), {**read_object_if_any(folder / 'added_tokens.json'), **added},
                          bool(config.get('add_prefix_space')))


def _bert(path: pathlib.Path) -> str:
  """Returns the tokenizer.json of BERT's vocab.txt, with the settings beside it, which BLEURT has in its own file."""
  config = {name: value for file in ('bleurt_config.json', 'tokenizer_config.json')
            for name, value in read_object_if_any(path.parent / file).items()}
  words = path.read_bytes().decode().removesuffix('\n').split('\n')
  return huggingface.wordpiece([word.rstrip('\r') for word in words], config.get('do_lower_case', True),
                               config.get('strip_accents'), config.get('tokenize_chinese_chars', True))
