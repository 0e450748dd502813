"""Where tokenizers come from: `train_sentencepiece` on text, `load` from files of any kind, `Bytes()`."""
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
from lm.workdir.parsing import json_value

__all__ = ['CONTROL', 'Bytes', 'HuggingFace', 'InFile', 'SentencePiece', 'Tokenizer', 'load', 'sentinels',
           'special_tokens', 'train_sentencepiece', 'mask_id']

# Names of separators in public vocabularies, most telling first.
_BOS = ('<s>', '<|begin_of_text|>', '<|startoftext|>', '<bos>', '[CLS]', '<|endoftext|>')
_EOS = ('</s>', '<|end_of_text|>', '<eos>', '[SEP]', '<|endoftext|>')
_MASK = ('[MASK]', '<mask>', '<|mask|>')


def train_sentencepiece(documents: Iterable[str], vocab: int, kind: Literal['bpe', 'unigram'] = 'bpe',
                        control: Sequence[str] = CONTROL, character_coverage: float = 0.9995,
                        sample_bytes: int | None = None) -> SentencePiece:
  """Trains a lossless model; the same documents give the same bytes on any machine.

  Pieces may span letters and punctuation ('self.', '):\\n') and a run of spaces with the word after it, which on
  Python's sources gives 3.7 bytes a token at a vocabulary of 4096, where SentencePiece's defaults give 2.1.

  Args:
    documents: text; of a sequence only what is sampled is read.
    vocab: tokens in all: 256 bytes, unknown, bos, eos, the control tokens, then pieces.
    kind: 'bpe' (arXiv:1508.07909), or 'unigram' (arXiv:1804.10959), whose training takes 50 times as long.
    control: names of the control tokens to keep room for.
    character_coverage: share of the text whose characters get a piece each, of 0.98 to 1; the rarer ones are spelled
      in bytes. A space and a tab are always pieces.
    sample_bytes: train on whole documents drawn at random up to this size; by default 16 MB (bpe) or 1.5 MB (unigram).

  Raises:
    ValueError: `vocab` is more than the text supports, or less than bytes, control tokens and characters take.
  """
  sizes = {'bpe': 16_000_000, 'unigram': 1_500_000}
  if kind not in sizes:
    raise ValueError(f'kind={kind!r} is neither bpe nor unigram')
  if not 0.98 <= character_coverage <= 1:
    raise ValueError(f'character_coverage={character_coverage} is not a share between 0.98 and 1, which are the bounds '
                     'of SentencePiece')
  from sentencepiece import SentencePieceTrainer as trainer
  model = io.BytesIO()
  sample = _sample(documents, sizes[kind] if sample_bytes is None else sample_bytes)
  if not sample:
    raise ValueError('there is no text to train a tokenizer on')
  try:
    trainer.train(
        sentence_iterator=iter(sample), model_writer=model, model_type=kind, vocab_size=vocab,
        control_symbols=list(control), character_coverage=character_coverage, byte_fallback=True,
        normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_by_unicode_script=False, required_chars='▁\t',
        max_sentence_length=8 * _PIECE, minloglevel=2,
        num_threads=8)  # a constant: unigram sums its counts by thread, in floating point
  except RuntimeError as error:
    if match := re.search(r'value <= (\d+)', str(error)):
      raise ValueError(f'--vocab={vocab} is more than the text supports: at most {match[1]}') from None
    if match := re.search(r'required_chars\. \d+ vs (\d+)', str(error)):
      raise ValueError(f'--vocab={vocab} is too small: bytes, control tokens and the characters met take {match[1]}; '
                       f'raise it{_fewer_characters(sample, vocab - 259 - len(control))}') from None
    raise ValueError(f'SentencePiece cannot train: {error}') from None
  # Unigram's scores are rounded, by less than 0.04 nats, so that tokenizer.json files can have the same ids.
  return SentencePiece(protobuf.rounded(model.getvalue()) if kind == 'unigram' else model.getvalue(), '<s>', '</s>')


_PIECE = 4000  # characters: SentencePiece skips longer sentences than it is told of


def _sample(documents: Iterable[str], size: int) -> list[str]:
  """Documents in a fixed random order up to `size` bytes, in pieces that end before whitespace where there is any."""
  documents = documents if hasattr(documents, '__getitem__') else list(documents)
  sample = []
  for i in np.random.default_rng(0).permutation(len(documents)).tolist():
    text = base.utf8(documents[i])[:size].decode('utf-8', 'ignore')
    sample += re.findall(rf'(?s).{{1,{_PIECE}}}(?=\s|\Z)|.{{1,{_PIECE}}}', text)
    size -= len(text.encode())
    if size <= 0:
      break
  return sample


def _fewer_characters(sample: Iterable[str], room: int) -> str:
  """Advice to spell more of the characters in bytes, where `room` pieces are enough for 98 % of the text."""
  counts = sorted(collections.Counter(''.join(sample)).values(), reverse=True)
  share = sum(counts[:room - 4]) / sum(counts)   # of a space, a tab, and what is lost in rounding
  if room < 5 or share < 0.98:
    return ''
  return (f', or spell rare characters in bytes (--character_coverage={math.floor(share * 1e4) / 1e4} of pretrain.py '
          'and finetune_chat.py)')


def load(path: str | os.PathLike, bos: str | None = None, eos: str | None = None) -> Tokenizer:
  """Opens what `save` wrote, a Hugging Face folder, a tokenizer.json, or a SentencePiece model (of T5, Llama, ...).

  Args:
    path: the file (vocab.json or merges.txt stand for both), or a folder. In a folder the first found counts:
      bytes.json, tokenizer.json, vocab.json with merges.txt (GPT-2's), a .model file.
    bos, eos: names of the separators. By default what the files beside it say (separators.json, else
      tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json; of several eos the first,
      the others end a text too), else what is custom. Of an encoder-decoder, bos is what its decoder starts with.

  Whether a text begins with bos is decided as transformers does: by the post-processor of a tokenizer.json, by
  add_bos_token in the tokenizer_config.json beside other files. A .model without one is of documents that do. Tokens
  that tokenizer_config.json (added_tokens_decoder) or added_tokens.json add to a vocabulary are added, and refused at
  ids where transformers would not put them.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    paths = [path / name for name in ('bytes.json', 'tokenizer.json', 'vocab.json') if (path / name).is_file()]
    paths = paths[:1] or sorted(path.glob('*.model'))
    if len(paths) > 1:
      raise ValueError(f'{path} has {", ".join(p.name for p in paths)}: give the path of the one to load')
    path = paths[0] if paths else path / 'tokenizer.model'
  if not path.is_file():
    raise FileNotFoundError(f'{path}: there is no such tokenizer; give a .model file, a tokenizer.json or their folder')
  try:
    if path.name == 'bytes.json':
      return Bytes(tuple(json_value(path.read_bytes())['control']))
    if path.name in ('vocab.json', 'merges.txt'):
      kind, data = HuggingFace, _gpt2(path.parent)
    elif path.suffix == '.json':
      kind, data = HuggingFace, huggingface.with_added(path.read_bytes().decode(), _added(path.parent))
    else:
      kind, data = SentencePiece, path.read_bytes()
      if tokens := _added(path.parent):
        _ = kind(data, '', '')._processor   # raises where it is no model
        data = protobuf.with_added(data, {i: token['content'] for i, token in tokens.items()},
                                   {i for i, token in tokens.items() if token['special']})
    control = kind(data, '', '')._control
    first = lambda given, side, names: [given] if given else [
        name for name in (*_named(path.parent, side, control), *names) if name in control]
    bos, eos = first(bos, 'bos', _BOS), first(eos, 'eos', _EOS)
    if not bos + eos:
      raise ValueError(f'no known separator among the control tokens ({", ".join(control) or "none"}): '
                       'name them, load(path, bos=..., eos=...)')
    tokenizer = kind(data, (bos or eos)[0], (eos or bos)[0])
    _ = tokenizer.bos_id, tokenizer.eos_id  # raises where a name is none of its own
    tokenizer = dataclasses.replace(tokenizer, ends=_ends(path.parent, tokenizer.vocab_size),
                                    adds_bos=_adds_bos(path, tokenizer))
    if isinstance(tokenizer, SentencePiece):
      tokenizer = dataclasses.replace(tokenizer, legacy=_legacy(path.parent))
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  return tokenizer


@dataclasses.dataclass(frozen=True)
class InFile:
  """A tokenizer in a file, for data that opens it when its text is opened; see `load`."""
  path: str

  def load(self) -> Tokenizer:
    return load(self.path)


def special_tokens(folder: str | os.PathLike) -> dict[str, str]:
  """What a Hugging Face folder calls bos_token, eos_token, pad_token, ...; empty without its files."""
  tokens = {}
  for file in ('special_tokens_map.json', 'tokenizer_config.json'):  # the latter counts
    for key, value in _json(pathlib.Path(folder) / file).items():
      name = value.get('content') if isinstance(value, dict) else value
      if key.endswith('_token') and isinstance(name, str):
        tokens[key] = name
  return tokens


def mask_id(tokenizer: Tokenizer) -> int:
  """The control token that hides a word from an encoder; ValueError where there is none of a known name."""
  if not (names := [name for name in _MASK if name in tokenizer.control_names]):
    raise ValueError(f'the tokenizer has no mask token ({" or ".join(_MASK)}) among its control tokens '
                     f'({", ".join(tokenizer.control_names)}), and an encoder is scored by masking')
  return tokenizer.control_id(names[0])


def _named(folder: pathlib.Path, side: str, control: Mapping[str, int]) -> list[str]:
  """Names that the files of a folder give to bos or eos, most telling first."""
  names = [_json(folder / 'separators.json').get(side)]
  by_id = {i: name for name, i in control.items()}
  if side == 'bos' and (config := _json(folder / 'config.json')).get('is_encoder_decoder'):
    # T5's tokenizer has no bos; its files name pad as what the decoder starts with.
    names += [by_id.get(config.get(name)) for name in ('decoder_start_token_id', 'pad_token_id')]
  names += [special_tokens(folder).get(f'{side}_token')]
  for file in ('generation_config.json', 'config.json'):
    ids = _json(folder / file).get(f'{side}_token_id')
    names += [by_id.get(i) for i in (ids if isinstance(ids, list) else [ids])]
  return [name for name in names if name]


def _ends(folder: pathlib.Path, vocab: int) -> tuple[int, ...]:
  """The ids that the files of a folder end a text with, of the first that names any."""
  for file, name in (('separators', 'ends'), ('generation_config', 'eos_token_id'), ('config', 'eos_token_id')):
    if (ids := _json(folder / f'{file}.json').get(name)) not in (None, []):
      return tuple(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and 0 <= i < vocab)
  return ()


def _adds_bos(path: pathlib.Path, tokenizer: Tokenizer) -> bool:
  """Whether a text begins with bos by the rule of the files; ValueError where it begins with another token."""
  if (rule := _json(path.parent / 'separators.json').get('adds_bos')) is not None:
    return rule
  if _json(path.parent / 'config.json').get('is_encoder_decoder'):   # bos is the start of what the decoder writes
    return False
  if path.name == 'tokenizer.json':
    front = tokenizer.front
    if front not in ((), (tokenizer.bos_id,)):
      raise ValueError(f'its post-processor puts the tokens {front} in front of a text, and bos is '
                       f'{tokenizer.bos_id}: name the one that a text begins with, load(path, bos=...)')
    return bool(front)
  config = path.parent / 'tokenizer_config.json'
  return bool(_json(config).get('add_bos_token')) if config.is_file() else path.suffix == '.model'


def _added(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
  """The tokens that files of a folder add to the vocabulary, by id, as tokenizer.json lists them."""
  config = _json(folder / 'tokenizer_config.json')
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  if (decoder := config.get('added_tokens_decoder')) is not None:
    return {int(i): {'id': int(i), 'special': False, **flags, **token} for i, token in decoder.items()}
  extra = [*(config.get('additional_special_tokens') or ()), *(config.get('extra_special_tokens') or ())]
  special = {*special_tokens(folder).values(), *(each['content'] if isinstance(each, dict) else each for each in extra)}
  return {i: {'id': i, 'content': name, 'special': name in special, **flags, 'normalized': name not in special}
          for name, i in _json(folder / 'added_tokens.json').items()}


def _legacy(folder: pathlib.Path) -> bool:
  """Whether a space is put in front of the text after each control token too, and not only where all of it begins."""
  if (rule := _json(folder / 'separators.json').get('legacy')) is not None:
    return rule
  config = _json(folder / 'tokenizer_config.json')
  return config.get('legacy', not config.get('tokenizer_class', '').startswith(('Llama', 'CodeLlama')))


def _gpt2(folder: pathlib.Path) -> str:
  config = _json(folder / 'tokenizer_config.json')
  if (name := config.get('tokenizer_class', 'GPT2Tokenizer')) not in ('GPT2Tokenizer', 'GPT2TokenizerFast'):
    raise ValueError(f"{name} may cut text in other ways than GPT-2's; save its tokenizer.json with transformers")
  if not (folder / 'merges.txt').is_file() or not (folder / 'vocab.json').is_file():
    raise ValueError("GPT-2's vocab.json and merges.txt go together, and one is missing")
  tokens = {**dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), '<|endoftext|>'), **special_tokens(folder)}
  added = {token['content']: int(i) for i, token in config.get('added_tokens_decoder', {}).items()}
  return huggingface.gpt2((folder / 'vocab.json').read_bytes().decode(), (folder / 'merges.txt').read_bytes().decode(),
                          list(tokens.values()), {**_json(folder / 'added_tokens.json'), **added},
                          bool(config.get('add_prefix_space')))


def _json(path: pathlib.Path) -> dict[str, Any]:
  """What a file holds; nothing where there is none."""
  if not path.is_file():
    return {}
  try:
    value = json_value(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from None
  return value if isinstance(value, dict) else {}
