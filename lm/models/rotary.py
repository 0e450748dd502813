"""Rotary position embeddings (Su et al. 2021), and methods that extend them to longer contexts."""
import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding


class Scaling(Protocol):
  """Maps the frequencies of `Rotary` to others; `attention` multiplies sine and cosine."""
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
  """The scaling of Llama 3.1: low frequencies are divided by `factor`, high ones are kept, with a blend in between."""
  factor: float
  low: float
  high: float
  original: int
  attention = 1.

  def __call__(self, frequency, theta, size):
    rotations = self.original * frequency / (2 * math.pi)   # of a pair, over the original context
    # In Llama 4, low equals high, and there is no blend.
    share = np.clip((rotations - self.low) / max(self.high - self.low, 1e-9), 0, 1)
    return share * frequency + (1 - share) * frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (Peng et al. 2023): divides the frequencies of slow pairs by `factor`, keeps fast ones, blends in between.

  Over the original context, slow pairs rotate fewer than `slow` times, and fast pairs `fast` times or more.
  """
  factor: float
  original: int
  attention: float
  fast: float = 32.
  slow: float = 1.
  truncate: bool = True

  def __call__(self, frequency, theta, size):
    def pair(rotations):
      """Returns the index of the pair that rotates so often over the original context."""
      return size * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    low, high = pair(self.fast), pair(self.slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    share = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequency / self.factor * share + frequency * (1 - share)


@dataclasses.dataclass(frozen=True)
class LongRope:
  """LongRoPE (Ding et al. 2024): each pair has a divisor, and another one in texts beyond the original context."""
  short: tuple[float, ...]
  long: tuple[float, ...]
  original: int
  attention: float

  def __call__(self, frequency, theta, size):
    return np.stack([frequency / np.array(self.short), frequency / np.array(self.long)])


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Rotates the i-th pair of entries by the angle position * theta^(-2i/size).

  Args:
    theta: the base of the frequencies.
    size: how many of the first entries of a head are rotated; None for all.
    interleaved: whether pairs are neighbours, (2i, 2i + 1), instead of (i, i + size/2).
    scaling: changes the frequencies for longer contexts.
  """
  theta: float = 10_000.
  size: int | None = None
  interleaved: bool = False
  scaling: Scaling | None = None

  def frequencies(self, size: int) -> np.ndarray:
    """Returns radians per position, [size/2]; with LongRope [2, size/2]: within and beyond the original context."""
    frequency = self.theta ** (-np.arange(0, size, 2) / size)
    return frequency if self.scaling is None else self.scaling(frequency, self.theta, size)

  def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """Rotates `x`. Segments tell which positions belong to one text, as in `Batch`; without them, a row is one text."""
    size = self.size or x_BTNH.shape[-1]
    frequency = jnp.asarray(self.frequencies(size), jnp.float32)
    if isinstance(self.scaling, LongRope):
      is_long = _in_any_of_segment(positions_BT >= self.scaling.original, segments_BT)
      frequency = jnp.where(is_long[:, :, None], frequency[1], frequency[0])
    else:
      frequency = frequency[None, None]
    angle = (positions_BT.astype(jnp.float32)[:, :, None] * frequency)[:, :, None]
    scale = 1. if self.scaling is None else self.scaling.attention
    sin, cos = jnp.sin(angle) * scale, jnp.cos(angle) * scale
    x, unrotated = x_BTNH[..., :size].astype(jnp.float32), x_BTNH[..., size:]
    if self.interleaved:
      a, b = x[..., ::2], x[..., 1::2]
      rotated = sharding.merge_axes(jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1), 3)
    else:
      a, b = jnp.split(x, 2, axis=-1)
      rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([rotated.astype(unrotated.dtype), unrotated], axis=-1)


def _in_any_of_segment(beyond_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
  """Returns whether any position of the same segment is true, [B, T or 1]; other texts in the row do not matter."""
  if segments_BT is None:
    return beyond_BT.any(axis=1, keepdims=True)
  beyond_BS, segments_BS = (sharding.constrain(x, 'B-') for x in (beyond_BT, segments_BT))
  return (beyond_BS[:, None] & (segments_BS[:, None] == segments_BT[:, :, None])).any(axis=-1)
