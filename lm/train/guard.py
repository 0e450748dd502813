"""A guard against spikes of the loss."""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Seen(NamedTuple):
  """What the last steps were like; slot `count % window` is written next."""
  losses: jax.Array    # [window]
  norms: jax.Array     # [window], of the gradient
  skipped: jax.Array   # bool [window]
  count: jax.Array     # steps seen
  total: jax.Array     # steps skipped


@dataclasses.dataclass(frozen=True)
class Guard:
  """Skips a step whose loss, or gradient norm, is above the mean of the last `window` by more than `sigma` of their
  standard deviations, or is not finite: as OLMo-core's SkipStepOptimizer, on the devices, without waiting for them.

  A step that is skipped changes neither parameters nor the state of the optimizer; its schedules go on with the step.
  It begins when half of a window was seen; what is not finite is skipped from the start. Spikes count among the last
  steps, but for those that are not finite, so that a loss which stays higher is accepted in the end. Training stops
  where more than `most` of a window were skipped: what goes wrong then is no spike.
  """
  window: int = 128
  sigma: float = 6.
  most: int = 16

  def __post_init__(self):
    if not 0 < self.most < self.window:
      raise ValueError(f'a spike guard that allows {self.most} skipped steps of {self.window} never stops, or at once; '
                       'allow fewer than the window has, and one at least')
    if self.window < 4 or not self.sigma > 0:
      raise ValueError(f'a spike guard of {self.sigma} standard deviations over {self.window} steps judges nothing; '
                       'take more than 0, and 4 steps at least')

  def init(self) -> Seen:
    return Seen(*jnp.zeros((2, self.window)), jnp.zeros(self.window, bool), jnp.int32(0), jnp.int32(0))

  def judge(self, seen: Seen, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, Seen]:
    """Whether the step is taken, and what was seen then."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    known = jnp.minimum(seen.count, self.window)
    usual = (known < max(self.window // 2, 2)) | (self._usual(seen.losses, known, loss)
                                                  & self._usual(seen.norms, known, norm))
    taken, at = finite & usual, seen.count % self.window
    # In place of what is not finite, what is known stays: the slot's own value, or the last one where it has none.
    put = lambda values, new: values.at[at].set(jnp.where(
        finite, new, jnp.where(seen.count < self.window, values[at - 1], values[at])))
    return taken, Seen(put(seen.losses, loss), put(seen.norms, norm), seen.skipped.at[at].set(~taken),
                       seen.count + 1, seen.total + ~taken)

  def _usual(self, values, known, new):
    held = jnp.arange(self.window) < known
    mean = jnp.sum(values * held) / known
    variance = jnp.sum(jnp.square(values - mean) * held) / (known - 1)
    return new - mean <= self.sigma * jnp.sqrt(variance)
