"""Quantised tensors of files as weights, which are dequantised when they are indexed.

In MXFP4 (gpt-oss; OCP Microscaling Formats 1.0, 2023), 32 numbers of 4 bits share a scale. In FP8 (DeepSeek-V3, 2024),
each block of a matrix has a scale. Other values of `quantization_config` raise an error.
"""
import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lm.hf.config import Config

_FP4 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# The two numbers that each byte stands for; the low half of the byte is the first.
_PAIRS = np.stack([np.tile(_FP4, 16), np.repeat(_FP4, 16)], axis=-1).view(np.uint64)[:, 0]
_SCALES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))


@dataclasses.dataclass(frozen=True)
class Mxfp4:
  """Matrices of experts, [E, in, out], in bfloat16, which represents them exactly.

  `blocks` are [E, out, in/32, 16], with two numbers in a byte. `scales` are [E, out, in/32]: exponents of 2, plus 127.
  """
  blocks: np.ndarray
  scales: np.ndarray
  dtype = np.dtype(ml_dtypes.bfloat16)

  @property
  def shape(self) -> tuple[int, ...]:
    experts, out, groups, _ = self.blocks.shape
    return experts, 32 * groups, out

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Returns the matrices of the experts that `index` selects."""
    blocks, scales = self.blocks[index], self.scales[index]
    weights = np.empty((*blocks.shape[:2], 32 * blocks.shape[2]), self.dtype)
    for i in range(len(blocks)):
      with np.errstate(over='ignore'):
        weights[i] = (_PAIRS[blocks[i]].view(np.float32) * _SCALES[scales[i], None]).reshape(weights.shape[1:])
    return weights.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Fp8:
  """A matrix [out, in] in float32: numbers of 8 bits times the scale of their block; the last blocks may be partial."""
  numbers: np.ndarray
  scales: np.ndarray   # [out / rows of a block, in / columns of a block]
  block: tuple[int, int]   # rows and columns
  dtype = np.dtype(np.float32)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.numbers.shape

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    weights = np.empty(self.shape, self.dtype)
    for i, scales in enumerate(self.scales.astype(self.dtype)):
      rows = slice(i * self.block[0], (i + 1) * self.block[0])
      weights[rows] = self.numbers[rows].astype(self.dtype) * np.repeat(scales, self.block[1])[:self.shape[1]]
    return weights[index]


def reader(c: Config) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
  """Returns a function that dequantises the tensors of a folder, as the field `quantization_config` describes.

  Raises ValueError, which names the field, if its value is not supported. The returned function raises ValueError,
  which names the tensors, if their shapes or dtypes do not fit.
  """
  q = c.inner('quantization_config')
  if q is None:
    return lambda weights: weights
  excluded = q.get('modules_to_not_convert', list, q.get('ignored_layers', list, []))
  if not all(isinstance(name, str) for name in excluded):
    q.refuse('modules_to_not_convert', excluded, 'names')
  q.get('dequantize', bool, False)   # weights are dequantised in any case
  if q.choice('quant_method', {'mxfp4': True, 'fp8': False}):
    read_tensors = functools.partial(_tensors, ('_blocks', '_scales'), _mxfp4, excluded)
  else:
    block = q.get('weight_block_size', list)
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
      q.refuse('weight_block_size', block, 'two positive numbers')
    q.only('activation_scheme', 'dynamic')
    q.only('fmt', 'e4m3')
    q.only('scale_fmt', 'float', 'ue8m0')   # 'ue8m0' scales are rounded to powers of 2, but stored as floats
    q.only('expert_dtype', 'fp8')
    read_tensors = functools.partial(_tensors, ('', '_scale_inv'), functools.partial(_fp8, tuple(block)), excluded)
  q.finish()
  return read_tensors


def _tensors(suffixes, make, excluded, weights):
  """Returns the tensors, with one dequantised tensor in place of each pair of names with these suffixes."""
  tensors = dict(weights)
  for name in [name.removesuffix(suffixes[1]) for name in weights if name.endswith(suffixes[1])]:
    pair = [name + suffix for suffix in suffixes]
    if pair[0] not in weights or (name in weights and pair[0] != name):
      continue   # a tensor without its partner is refused later, because it is not a weight of the model
    if any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + '.*') for pattern in excluded):
      raise ValueError(f'{name} is quantised, where modules_to_not_convert says that it is not')
    numbers, scales = (tensors.pop(part) for part in pair)
    try:
      tensors[name] = make(numbers, scales)
    except ValueError as error:
      raise ValueError(f'{" and ".join(pair)}, {numbers.dtype}{list(numbers.shape)} and {scales.dtype}'
                       f'{list(scales.shape)}, {error}') from None
  return tensors


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> Mxfp4:
  if not blocks.dtype == scales.dtype == np.uint8 or blocks.ndim != 4 or blocks.shape != (*scales.shape, 16):
    raise ValueError('are not MXFP4: uint8 [experts, out, in/32, 16] and [experts, out, in/32]')
  return Mxfp4(blocks, scales)


def _fp8(block: tuple[int, int], numbers: np.ndarray, scales: np.ndarray) -> Fp8:
  if numbers.dtype != ml_dtypes.float8_e4m3fn or scales.dtype not in (np.float32, ml_dtypes.bfloat16):
    raise ValueError('are not FP8: float8_e4m3fn, and float32 or bfloat16')
  if numbers.ndim != 2 or scales.shape != tuple(-(-size // by) for size, by in zip(numbers.shape, block)):
    raise ValueError(f'do not fit weight_block_size={list(block)}: one scale to a block of a matrix')
  return Fp8(numbers, scales, block)
