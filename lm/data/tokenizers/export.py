"""Exports tokenizers to files that `transformers.AutoTokenizer.from_pretrained(folder)` opens, with the same ids."""
import json
import os
import pathlib
from typing import Any

from lm.data.tokenizers import huggingface, protobuf
from lm.data.tokenizers.base import Bytes, Tokenizer
from lm.data.tokenizers.huggingface import HuggingFace
from lm.data.tokenizers.sentencepiece import SentencePiece

_BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}


def export(tokenizer: Tokenizer, folder: str | os.PathLike, chat_template: str | None = None, *,
           begins: bool = True) -> None:
  """Writes tokenizer.json and tokenizer_config.json, and chat_template.jinja if there is a chat template.

  transformers then encodes any text of valid Unicode to the ids of `encode`, and decodes these ids to the text. With a
  chat template, which needs it, text that spells a control token becomes that token, as in `parse`. Of ids that no text
  has, two kinds decode differently: unknown (to its name), and bytes that are not UTF-8 (to another number of U+FFFD).
  A tokenizer.json that was loaded is written unchanged.

  The merges of BPE are compared on random texts, not proven: of several pairs with equal scores, SentencePiece joins
  the leftmost, and tokenizers the first in its list, which could differ if a piece can be made in two ways side by
  side. A unigram model is exact up to a negative log-likelihood of 2**20 nats (about half a megabyte in one text);
  beyond, the float32 sums of SentencePiece are too coarse to tell paths apart.

  Args:
    tokenizer: the tokenizer.
    folder: is created if it is missing.
    chat_template: the text of a Jinja template.
    begins: whether transformers puts bos before a text, if `adds_bos` is true; false for encoders and
      encoder-decoders, whose models place bos elsewhere.

  Raises ValueError if a SentencePiece model changes text, or was trained elsewhere with scores that do not add up
  exactly.
  """
  match tokenizer:
    case HuggingFace():
      text = tokenizer.model
    case Bytes() | SentencePiece():
      form = _bytes(tokenizer) if isinstance(tokenizer, Bytes) else _sentencepiece(tokenizer)
      form['post_processor'] = _bos_first(tokenizer) if begins and tokenizer.adds_bos else None
      text = json.dumps(form, ensure_ascii=False)
    case _:
      raise ValueError(f'{type(tokenizer).__name__} has no form as tokenizer.json')
  names = {tokenizer.control_id(name): name for name in tokenizer.control_names}
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
            'bos_token': names[tokenizer.bos_id], 'eos_token': names[tokenizer.eos_id]}
  if '<|pad|>' in tokenizer.control_names:
    config['pad_token'] = '<|pad|>'
  if chat_template is None and not isinstance(tokenizer, HuggingFace):
    config['split_special_tokens'] = True   # text that spells a control token is encoded as text
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tokenizer.json').write_text(text, 'utf-8', newline='')
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2), 'utf-8')
  if chat_template is not None:
    (folder / 'chat_template.jinja').write_text(chat_template, 'utf-8', newline='')


def _bytes(tokenizer: Bytes) -> dict[str, Any]:
  ids = {character: byte[0] for character, byte in huggingface.byte_level().items()}
  ids |= {name: tokenizer.control_id(name) for name in tokenizer.control_names}
  model = {'type': 'BPE', 'vocab': ids, 'merges': []}
  return _json(tokenizer, model, _BYTE_LEVEL, _BYTE_LEVEL)


def _sentencepiece(tokenizer: SentencePiece) -> dict[str, Any]:
  pieces = protobuf.pieces(tokenizer.model)
  characters = {piece.name for piece in pieces if piece.type == protobuf.NORMAL and len(piece.name) == 1}
  if not tokenizer.lossless:
    raise ValueError('this SentencePiece model changes text (it normalises, puts a space before it, ...), and '
                     'tokenizer.json would change it in another way; export with --like, the folder that it came from, '
                     'whose files are kept')
  supported = protobuf.NORMAL, protobuf.UNKNOWN, protobuf.CONTROL, protobuf.BYTE
  for piece in pieces:
    if piece.type not in supported or piece.type == protobuf.NORMAL and not characters.issuperset(piece.name):
      raise ValueError(f'{piece.name!r} is a piece that tokenizer.json would treat differently: it is user-defined, '
                       'unused, or has a character that is no piece of its own; export with --like, the folder that it '
                       'came from')
  match protobuf.kind(tokenizer.model):
    case protobuf.BPE:
      return _bpe(tokenizer, pieces)
    case protobuf.UNIGRAM:
      return _unigram(tokenizer, pieces)
  raise ValueError('only BPE and unigram models have a form as tokenizer.json')


def _bpe(tokenizer: SentencePiece, pieces: list[protobuf.Piece]) -> dict[str, Any]:
  """A space is a space in the exported pieces, so that '▁' is spelled by its three bytes, as in `encode`."""
  normal = {piece.name.replace('▁', ' '): piece for piece in pieces if piece.type == protobuf.NORMAL}
  names = [piece.name.replace('▁', ' ') if piece.type == protobuf.NORMAL else piece.name for piece in pieces]
  # tokenizers needs all pairs of pieces that make a piece; the SentencePiece model only orders the pieces.
  merges = [[name[:cut], name[cut:]] for name, _ in sorted(normal.items(), key=lambda item: -item[1].score)
            for cut in reversed(range(1, len(name))) if name[:cut] in normal and name[cut:] in normal]
  unknown = next(piece.name for piece in pieces if piece.type == protobuf.UNKNOWN)
  model = {'type': 'BPE', 'unk_token': unknown, 'byte_fallback': True,
           'vocab': {name: i for i, name in enumerate(names)}, 'merges': merges}
  return _json(tokenizer, model, None, {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, {'type': 'Fuse'}]})


def _unigram(tokenizer: SentencePiece, pieces: list[protobuf.Piece]) -> dict[str, Any]:
  """Pieces are written in the characters with which GPT-2 represents bytes.

  A character without a piece is spelled in bytes, whose score is below that of any piece. tokenizers looks for all
  names in the text, such as those of control tokens and '<0x41>', so their score is below that of any spelling.
  """
  if any(piece.score * protobuf.EXACT % 1 for piece in pieces if piece.type == protobuf.NORMAL):
    raise ValueError(f"this unigram model's scores are no multiples of 1/{protobuf.EXACT}, so ties would be broken by "
                     'rounding, differently in each library; train a model with train_sentencepiece')
  characters = {byte[0]: character for character, byte in huggingface.byte_level().items()}
  in_bytes = lambda name: ''.join(characters[byte] for byte in name.replace('▁', ' ').encode())
  normal = {in_bytes(piece.name) for piece in pieces if piece.type == protobuf.NORMAL}

  def entry(piece):
    if piece.type == protobuf.NORMAL:
      return in_bytes(piece.name), piece.score
    if piece.type == protobuf.BYTE:
      character = characters[int(piece.name[3:5], 16)]
      if character not in normal:
        return character, -1e4
    return piece.name, -1e9

  unknown = next(i for i, piece in enumerate(pieces) if piece.type == protobuf.UNKNOWN)
  model = {'type': 'Unigram', 'unk_id': unknown, 'byte_fallback': False,
           'vocab': [entry(piece) for piece in pieces]}
  return _json(tokenizer, model, _BYTE_LEVEL, {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, _BYTE_LEVEL]})


def _json(tokenizer: Tokenizer, model: dict, pre_tokenizer: dict | None, decoder: dict) -> dict[str, Any]:
  """Returns the values of a tokenizer.json, with the control tokens."""
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  added = [{'id': tokenizer.control_id(name), 'content': name, **flags, 'special': True}
           for name in tokenizer.control_names]
  return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
          'pre_tokenizer': pre_tokenizer, 'post_processor': None,
          'decoder': decoder, 'model': model}


def _bos_first(tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns a post-processor that puts bos before a text."""
  bos = {'SpecialToken': {'id': tokenizer.bos, 'type_id': 0}}
  first, second = ({'Sequence': {'id': name, 'type_id': 0}} for name in 'AB')
  token = {'id': tokenizer.bos, 'ids': [tokenizer.bos_id], 'tokens': [tokenizer.bos]}
  return {'type': 'TemplateProcessing', 'single': [bos, first], 'pair': [bos, first, second],
          'special_tokens': {tokenizer.bos: token}}
