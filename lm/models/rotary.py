"""Rotary positions (Su et al. 2021), and the ways in which they are stretched to longer contexts."""
import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding


class Scaling(Protocol):
  """Changes the frequencies of `Rotary`; `attention` multiplies sine and cosine."""
  attention: float

  def __call__(self, frequency: np.ndarray, theta: float, size: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Linear:
  """Positions divided by `factor` (Chen et al. 2023)."""
  factor: float
  attention = 1.

  def __call__(self, frequency, theta, size):
    return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Low frequencies divided by `factor`, high ones kept, in between a blend; as Llama 3.1 defines it."""
  factor: float
  low: float
  high: float
  original: int
  attention = 1.

  def __call__(self, frequency, theta, size):
    turns = self.original * frequency / (2 * math.pi)   # of a pair, over the original context
    kept = np.clip((turns - self.low) / max(self.high - self.low, 1e-9), 0, 1)   # Llama 4 has no blend: low is high
    return kept * frequency + (1 - kept) * frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (Peng et al. 2023): pairs that turn fewer than `slow` times are divided by `factor`, from `fast` on none."""
  factor: float
  original: int
  attention: float
  fast: float = 32.
  slow: float = 1.
  truncate: bool = True

  def __call__(self, frequency, theta, size):
    def pair(turns):   # which turns so often over the original context
      return size * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = pair(self.fast), pair(self.slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    divided = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequency / self.factor * divided + frequency * (1 - divided)


@dataclasses.dataclass(frozen=True)
class LongRope:
  """LongRoPE (Ding et al. 2024): a divisor for each pair, others for texts that pass the original context."""
  short: tuple[float, ...]
  long: tuple[float, ...]
  original: int
  attention: float

  def __call__(self, frequency, theta, size):
    return np.stack([frequency / np.array(self.short), frequency / np.array(self.long)])


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Pairs of entries turn by position * theta^(-2i/size).

  Args:
    size: only the first entries of a head turn, so many; None for all.
    interleaved: pairs are neighbours, (2i, 2i + 1), rather than (i, i + size/2).
  """
  theta: float = 10_000.
  size: int | None = None
  interleaved: bool = False
  scaling: Scaling | None = None

  def frequencies(self, size: int) -> np.ndarray:
    """Radians a position, [size/2]; [2, size/2] with LongRope: within and past the original context."""
    frequency = self.theta ** (-np.arange(0, size, 2) / size)
    return frequency if self.scaling is None else self.scaling(frequency, self.theta, size)

  def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """`segments` tell which positions are of one text, as in `Batch`; without them, a row is."""
    size = self.size or x_BTNH.shape[-1]
    frequency = jnp.asarray(self.frequencies(size), jnp.float32)
    if isinstance(self.scaling, LongRope):
      passed = _passed(positions_BT >= self.scaling.original, segments_BT)
      frequency = jnp.where(passed[:, :, None], frequency[1], frequency[0])
    else:
      frequency = frequency[None, None]
    angle = (positions_BT.astype(jnp.float32)[:, :, None] * frequency)[:, :, None]
    scale = 1. if self.scaling is None else self.scaling.attention
    sin, cos = jnp.sin(angle) * scale, jnp.cos(angle) * scale
    x, rest = x_BTNH[..., :size].astype(jnp.float32), x_BTNH[..., size:]
    if self.interleaved:
      a, b = x[..., ::2], x[..., 1::2]
      turned = sharding.merge_axes(jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1), 3)
    else:
      a, b = jnp.split(x, 2, axis=-1)
      turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(rest.dtype), rest], axis=-1)


def _passed(beyond_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
  """Whether any position of the same segment is beyond, [B, T or 1]: a text's company does not change it."""
  if segments_BT is None:
    return beyond_BT.any(axis=1, keepdims=True)
  return (beyond_BT[:, None] & (segments_BT[:, None] == segments_BT[:, :, None])).any(axis=-1)
