"""Flags of smaller batches and shorter rows in the first steps."""
import dataclasses

from lm.data.rows import stages


@dataclasses.dataclass(frozen=True)
class Warmup:
  """Warm-up of batches.

  Args:
    batch_warmup: rows of the first steps, as UNTIL:ROWS, such as 200:4,500:8 for 4 up to step 200, then 8 up to 500.
    length_warmup: of these steps, the length that rows are cut into, as UNTIL:LENGTH, such as 300:64,600:128.
  """
  batch_warmup: tuple[str, ...] = ()
  length_warmup: tuple[str, ...] = ()

  def stages(self, batch: int, length: int) -> tuple[stages.Stage, ...]:
    """The stages before the batches of the run itself, of `batch` rows of `length` positions."""
    return stages.stages(_parsed('batch', self.batch_warmup), _parsed('length', self.length_warmup), batch, length)


def _parsed(name: str, parts: tuple[str, ...]) -> list[tuple[int, int]]:
  """(until, value) of 'until:value'."""
  try:
    return [(int(until), int(value)) for until, value in (part.split(':') for part in parts)]
  except ValueError:
    raise ValueError(f'--{name}_warmup={",".join(parts)} is not of the kind 200:4,500:8, step:value') from None
