"""Tokenizers of SentencePiece."""
import dataclasses
import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lm.data.tokenizers import base, protobuf

_SAMPLING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class SentencePiece(base.TokenizerBase):
  """A SentencePiece model (arXiv:1808.06226), given by the bytes of its .model file and the names of bos and eos in it.

  A model that does not change text (identity normalisation, byte fallback, no dummy prefix, a piece for a space) is
  lossless here: it is decoded by its table of bytes, and '▁', which SentencePiece treats as a space, is encoded by its
  three bytes. If the model puts a space before a text, `parse` puts one after each control token too if `legacy` is
  true, as in older files. Pieces that are named like marks of a template (`base.MARK`) are control tokens.
  """
  model: bytes = dataclasses.field(repr=False)
  bos: str
  eos: str
  ends: tuple[int, ...] = dataclasses.field(default=(), compare=False)
  adds_bos: bool = dataclasses.field(default=True, compare=False)
  legacy: bool = dataclasses.field(default=True, compare=False)

  @functools.cached_property
  def _processor(self) -> Any:
    import sentencepiece as module
    try:
      processor = module.SentencePieceProcessor(model_proto=self.model)
    except RuntimeError as error:
      raise ValueError(f'this is no SentencePiece model: {error}') from None
    with_marks = protobuf.as_control(self.model, base.MARK.fullmatch)
    return processor if with_marks == self.model else module.SentencePieceProcessor(model_proto=with_marks)

  @functools.cached_property
  def _table(self) -> list[bytes]:
    model = self._processor

    def piece(i):
      if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
        return b''
      name = model.id_to_piece(i)
      if model.is_byte(i):   # named '<0x41>'
        return bytes([int(name[3:5], 16)])
      return name.replace('▁', ' ').encode()

    return [piece(i) for i in range(model.vocab_size())]

  @functools.cached_property
  def _control(self) -> dict[str, int]:
    model = self._processor
    return {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}

  @functools.cached_property
  def _inner(self) -> 'SentencePiece':
    return self if self.legacy else dataclasses.replace(self, model=self.model + protobuf.NO_PREFIX)

  @property
  def lossless(self) -> bool:
    return self._space is not None

  @functools.cached_property
  def _space(self) -> np.ndarray | None:
    """The ids of the bytes of '▁', int32 [3]; None if the model is not lossless."""
    spelled = base.PROBE.replace(' ', '▁')
    if protobuf.maps_characters(self.model) or self._processor.normalize(base.PROBE) != spelled:
      return None
    if self._processor.is_unknown(self._processor.piece_to_id('▁')):   # a space would be spelled in bytes, like '▁'
      return None
    ids = [self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in range(256)]
    if not all(map(self._processor.is_byte, ids)):
      return None
    return np.array([ids[byte] for byte in '▁'.encode()], np.int32)

  def _split(self, text: str) -> list[str]:
    """Returns the parts of a text around each '▁', which `_joined` joins; the text itself if it is not lossless."""
    base.utf8(text)
    return text.split('▁') if self._space is not None else [text]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    parts = [self._split(text) for text in texts]
    flat = [part for group in parts for part in group]
    threads = min(len(flat), os.cpu_count() or 1)
    if threads > 1:
      encoded = iter(self._processor.encode(flat, num_threads=threads))
    else:
      encoded = iter([self._processor.encode(part) for part in flat])
    return [self._joined([np.array(next(encoded), np.int32) for _ in group]) for group in parts]

  def sample(self, text: str, alpha: float, seed: int) -> np.ndarray:
    import sentencepiece as module
    parts = self._split(text)

    def draw() -> list[np.ndarray]:
      return [np.array(self._processor.encode(part, enable_sampling=True, alpha=alpha, nbest_size=-1), np.int32)
              for part in parts]

    # The library has one generator per thread, which reads the seed only when the thread first draws a number.
    with _SAMPLING, ThreadPoolExecutor(1) as thread:
      module.set_random_generator_seed(seed)
      try:
        return self._joined(thread.submit(draw).result())
      except RuntimeError as error:
        raise ValueError(f'this SentencePiece model cannot sample ({error}); use a bpe or a unigram model') from None

  def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
    """Returns the ids of the parts of a text, with the ids of '▁' between them."""
    ids = [parts[0]]
    for part in parts[1:]:
      ids += [self._space, part]
    return np.concatenate(ids)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return super().decode(ids) if self._space is not None else self._processor.decode(self._checked(ids))

  def _ends(self, text: str, ids: np.ndarray) -> np.ndarray:
    if self.lossless:
      return super()._ends(text, ids)
    return np.array(protobuf.ends(self._processor.encode(text, out_type='serialized_proto')), int)

  def save(self, folder: str | os.PathLike) -> None:
    base.write(folder, 'tokenizer.model', self.model)
    base.write_separators(folder, self)
