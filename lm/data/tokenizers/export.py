"""Our tokenizers as files that `transformers.AutoTokenizer.from_pretrained(folder)` opens, with the same ids."""
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
  """Writes tokenizer.json and tokenizer_config.json, and chat_template.jinja where there is one.

  transformers then encodes any text of valid Unicode to the ids of `encode`, after bos with `begins` (encoders and
  encoder-decoders place it elsewhere), and decodes those ids to the text. With a chat template, text that spells a
  control token becomes that token there, as in our `parse`: the template needs it. Of ids that no text has, two kinds
  decode differently: unknown (to its name), and bytes that are no UTF-8 (to another number of U+FFFD). A tokenizer.json
  that was loaded is written as it was.

  BPE is compared on random texts, not proven: of pairs equally good SentencePiece joins the leftmost, tokenizers the
  one that comes first in its list, which could differ where one piece is made in two ways side by side. A unigram
  model is exact up to a negative log-likelihood of 2**20 nats (about half a megabyte in one text), where
  SentencePiece's float32 sums get too coarse to tell paths apart.

  Raises:
    ValueError: a SentencePiece model that changes text or was trained elsewhere with scores that do not add up exactly.
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
  name = {i: name for name in tokenizer.control_names for i in [tokenizer.control_id(name)]}
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
            'bos_token': name[tokenizer.bos_id], 'eos_token': name[tokenizer.eos_id]}
  if '<|pad|>' in tokenizer.control_names:
    config['pad_token'] = '<|pad|>'
  if chat_template is None and not isinstance(tokenizer, HuggingFace):
    config['split_special_tokens'] = True  # text that spells a control token is text
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
    raise ValueError('this SentencePiece model changes text (normalisation, a space put before it, ...), which '
                     'tokenizer.json would not do alike; export with --like, the folder that it came from, whose files '
                     'are kept')
  if bad := [piece.name for piece in pieces
             if piece.type not in (protobuf.NORMAL, protobuf.UNKNOWN, protobuf.CONTROL, protobuf.BYTE)
             or piece.type == protobuf.NORMAL and not characters.issuperset(piece.name)]:
    raise ValueError(f'{bad[0]!r} is a piece that tokenizer.json would treat differently: user-defined, unused, or '
                     'with a character that is no piece of its own')
  match protobuf.kind(tokenizer.model):
    case protobuf.BPE:
      return _bpe(tokenizer, pieces)
    case protobuf.UNIGRAM:
      return _unigram(tokenizer, pieces)
  raise ValueError('only BPE and unigram models have a form as tokenizer.json')


def _bpe(tokenizer: SentencePiece, pieces: list[protobuf.Piece]) -> dict[str, Any]:
  """Spaces stand for themselves, so that '▁' is a character like those without a piece: three bytes."""
  normal = {piece.name.replace('▁', ' '): piece for piece in pieces if piece.type == protobuf.NORMAL}
  names = [piece.name.replace('▁', ' ') if piece.type == protobuf.NORMAL else piece.name for piece in pieces]
  # All ways to make a piece of two, where the trained model only has an order of pieces.
  merges = [[name[:cut], name[cut:]] for name, _ in sorted(normal.items(), key=lambda item: -item[1].score)
            for cut in reversed(range(1, len(name))) if name[:cut] in normal and name[cut:] in normal]
  unknown = next(piece.name for piece in pieces if piece.type == protobuf.UNKNOWN)
  model = {'type': 'BPE', 'unk_token': unknown, 'byte_fallback': True,
           'vocab': {name: i for i, name in enumerate(names)}, 'merges': merges}
  return _json(tokenizer, model, None, {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, {'type': 'Fuse'}]})


def _unigram(tokenizer: SentencePiece, pieces: list[protobuf.Piece]) -> dict[str, Any]:
  """Over GPT-2's stand-ins for bytes: characters without a piece are a path of bytes, which costs more than any other.

  tokenizers looks for all names in the text, control tokens' and '<0x41>' too, so those cost more than any spelling.
  """
  if any(piece.score * protobuf.EXACT % 1 for piece in pieces if piece.type == protobuf.NORMAL):
    raise ValueError(f"this unigram model's scores are no multiples of 1/{protobuf.EXACT}, so rounding would tell "
                     'paths of equal score apart, differently in each library; train one with train_sentencepiece')
  level = {byte[0]: character for character, byte in huggingface.byte_level().items()}
  stand_in = lambda name: ''.join(level[byte] for byte in name.replace('▁', ' ').encode())
  normal = {stand_in(piece.name) for piece in pieces if piece.type == protobuf.NORMAL}

  def entry(piece):
    if piece.type == protobuf.NORMAL:
      return stand_in(piece.name), piece.score
    if piece.type == protobuf.BYTE and (byte := level[int(piece.name[3:5], 16)]) not in normal:
      return byte, -1e4
    return piece.name, -1e9

  unknown = next(i for i, piece in enumerate(pieces) if piece.type == protobuf.UNKNOWN)
  model = {'type': 'Unigram', 'unk_id': unknown, 'byte_fallback': False,
           'vocab': [entry(piece) for piece in pieces]}
  return _json(tokenizer, model, _BYTE_LEVEL, {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, _BYTE_LEVEL]})


def _json(tokenizer: Tokenizer, model: dict, pre_tokenizer: dict | None, decoder: dict) -> dict[str, Any]:
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  added = [{'id': tokenizer.control_id(name), 'content': name, **flags, 'special': True}
           for name in tokenizer.control_names]
  return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
          'pre_tokenizer': pre_tokenizer, 'post_processor': None,
          'decoder': decoder, 'model': model}


def _bos_first(tokenizer: Tokenizer) -> dict[str, Any]:
  bos = {'SpecialToken': {'id': tokenizer.bos, 'type_id': 0}}
  first, second = ({'Sequence': {'id': name, 'type_id': 0}} for name in 'AB')
  token = {'id': tokenizer.bos, 'ids': [tokenizer.bos_id], 'tokens': [tokenizer.bos]}
  return {'type': 'TemplateProcessing', 'single': [bos, first], 'pair': [bos, first, second],
          'special_tokens': {tokenizer.bos: token}}
