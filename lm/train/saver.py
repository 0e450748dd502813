"""Saves of a run in progress. One that fails is noticed at the next step, and made again some steps later."""
import time
from collections.abc import Callable

import jax
from absl import logging

from lm.sharding import hosts
from lm.workdir.checkpoint import Checkpoints

ATTEMPTS = 5   # saves in a row that may fail before training ends


class Saver:
  """Saves the checkpoints of a run, and repeats what fails, because file systems fail for a while.

  The state of the step is gone when a failure is noticed, so that of a later step is saved: 1, 2, 4 and 8 steps later.
  In a cluster, a save that fails in one process fails in all, and all save the later step.

  Attributes:
    saved: the step of the last save that has not failed, or the step that training continued from.
  """

  def __init__(self, checkpoints: Checkpoints, start: int):
    self._checkpoints, self._start, self.saved = checkpoints, start, start
    self._failures, self._due = 0, None
    self._in_progress = False   # whether a save may still fail

  def is_due(self, step: int) -> bool:
    """Whether a step is to be saved because an earlier save failed."""
    return self._due is not None and step >= self._due

  def describe_newest(self) -> str:
    """Returns the clause of a message that says which checkpoint there is."""
    return f'the checkpoint of step {self.saved} is good' if self.saved else 'no checkpoint was saved before'

  def check(self, step: int) -> None:
    """Notices where a save has failed; it does not wait for one in progress. Call it at every step.

    In a cluster, where the processes have to ask one another, it does so 1, 2, 4, 8, ... steps after a save.

    Raises:
      OSError: too many saves in a row failed. The checkpoints before them are intact.
    """
    if self._in_progress and (jax.process_count() == 1 or (step - self.saved).bit_count() == 1):   # a power of two
      self._attempt(step, self._check)

  def _check(self) -> None:
    self._in_progress = not self._checkpoints.check_for_errors()

  def save(self, step: int, start: Callable[[], None]) -> None:
    """Starts a save of a step by calling `start`, when the save before has ended. Raises OSError like `check`."""
    if self._attempt(step, self._checkpoints.wait) and self._due is None:
      self._failures = 0
    if self._attempt(step, start):
      self.saved, self._due, self._in_progress = step, None, True

  def finish(self, step: int, start: Callable[[], None]) -> None:
    """Waits until the last step is saved. No step follows, so a failure is repeated after 1, 2, 4 and 8 seconds."""
    self._attempt(step, self._checkpoints.wait)
    while self._due is not None and step > self.saved:   # a step may be saved, and what follows may fail
      _wait(2 ** (self._failures - 1))
      self.save(step, start)
      self._attempt(step, self._checkpoints.wait)

  def _attempt(self, step: int, action: Callable[[], None]) -> bool:
    """Returns whether an action succeeded. Raises OSError after too many failures."""
    try:
      action()
      return True
    except OSError as error:
      self._failures += 1
      self._in_progress = False
      self.saved = hosts.from_process_0(max(self._checkpoints.steps(), default=self._start))
      if self._failures == ATTEMPTS:
        raise OSError(f'{error}; it was tried {self._failures} times, and training ends at step {step}. The newest '
                      f'checkpoint is of step {self.saved}: free space or mend the file system, and give the same '
                      'command again') from error
      self._due = step + 2 ** (self._failures - 1)
      logging.warning('%s; attempt %d of %d follows at step %d, or at the end', error, self._failures + 1, ATTEMPTS,
                      self._due)
      return False


_wait = time.sleep
