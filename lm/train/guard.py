"""A guard that skips steps at which the loss spikes, and what a run may do at a step that is not finite."""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class History(NamedTuple):
  """The last steps, as a ring: the next step is written to slot `count % window`.

  Attributes:
    losses: [window].
    norms: norms of the gradient, [window].
    skipped: whether steps were skipped, bool [window].
    count: the number of steps so far.
    total: the number of steps that were skipped so far.
  """
  losses: jax.Array
  norms: jax.Array
  skipped: jax.Array
  count: jax.Array
  total: jax.Array


@dataclasses.dataclass(frozen=True)
class Guard:
  """Skips steps at which the loss or the norm of the gradient spikes, as SkipStepOptimizer of OLMo-core does.

  A spike is a value that is not finite, or that is above the mean of the last `window` steps by more than `sigma`
  standard deviations. A skipped step changes neither the parameters nor the state of the optimizer; only schedules
  advance. The devices decide, so that the host does not wait for them.

  Finite spikes are judged once half of a window has passed. They are part of the last steps like all other values, so
  that a loss which stays higher is accepted in the end. Training stops where more than `most` steps of a window were
  skipped, since the reason is then no spike.

  Raises:
    ValueError: the window, sigma or `most` is out of range.
  """
  window: int = 128
  sigma: float = 6.
  most: int = 16

  def __post_init__(self):
    if not 0 < self.most < self.window:
      raise ValueError(f'most={self.most} skipped steps of window={self.window} must be at least 1, and fewer than the '
                       'window; otherwise the run stops at once, or never')
    if self.window < 4 or not self.sigma > 0:
      raise ValueError(f'window={self.window} steps must be at least 4, and sigma={self.sigma} standard deviations '
                       'more than 0')

  def init(self) -> History:
    """Returns the history before the first step."""
    return History(*jnp.zeros((2, self.window)), jnp.zeros(self.window, bool), jnp.int32(0), jnp.int32(0))

  def judge(self, history: History, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, History]:
    """Returns whether to keep the update of a step, and the history after it."""
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    size = jnp.minimum(history.count, self.window)
    is_usual = (size < max(self.window // 2, 2)) | (self._is_usual(history.losses, size, loss)
                                                    & self._is_usual(history.norms, size, norm))
    keeps, slot = is_finite & is_usual, history.count % self.window

    def write(values, new):
      # A value that is not finite is not written: the slot keeps its value, or takes the last one where it has none.
      previous = jnp.where(history.count < self.window, values[slot - 1], values[slot])
      return values.at[slot].set(jnp.where(is_finite, new, previous))

    return keeps, History(write(history.losses, loss), write(history.norms, norm),
                          history.skipped.at[slot].set(~keeps), history.count + 1, history.total + ~keeps)

  def _is_usual(self, values: jax.Array, size: jax.Array, new: jax.Array) -> jax.Array:
    """Whether a value is not a spike after the first `size` values of a ring."""
    in_use = jnp.arange(self.window) < size
    mean = jnp.sum(values * in_use) / size
    variance = jnp.sum(jnp.square(values - mean) * in_use) / (size - 1)
    return new - mean <= self.sigma * jnp.sqrt(variance)


@dataclasses.dataclass(frozen=True)
class Skip:
  """Leaves out the update of a step that is not finite.

  The run ends where more than `most` of the last `window` steps were left out. Raises ValueError for a number that is
  out of range.
  """
  most: int = 16
  window: int = 128

  def __post_init__(self):
    if not 0 < self.most < self.window:
      raise ValueError(f'most={self.most} steps left out of window={self.window} must be at least 1, and fewer than '
                       'the window; otherwise the run stops at once, or never')


@dataclasses.dataclass(frozen=True)
class GoBack:
  """Goes back to the last checkpoint where a step is not finite, and leaves out all batches from there to this step.

  This is what PaLM's authors did at spikes (Chowdhery et al. 2022, section 5.1). `further` more batches are left out.
  The run ends after it went back `most` times. Raises ValueError for a number that is out of range.
  """
  further: int = 0
  most: int = 5

  def __post_init__(self):
    if self.further < 0 or self.most < 1:
      raise ValueError(f'further={self.further} batches must be 0 or more, and most={self.most} times at least 1')
