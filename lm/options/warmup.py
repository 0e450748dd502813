"""Flags of smaller batches and shorter rows in the first steps of a run."""
import dataclasses

from lm.data.rows import stages


@dataclasses.dataclass(frozen=True)
class Warmup:
  """Warm-up of batches.

  Args:
    batch_warmup: rows of the first steps as UNTIL:ROWS, such as 200:4,500:8 for 4 until step 200, then 8 until 500.
    length_warmup: length of the rows of the first steps as UNTIL:LENGTH, such as 300:64,600:128.
  """
  batch_warmup: tuple[str, ...] = ()
  length_warmup: tuple[str, ...] = ()

  def stages(self, batch: int, length: int) -> tuple[stages.Stage, ...]:
    """Returns the stages before the full batches, which have `batch` rows of `length` positions."""
    return stages.stages(_parse('batch', self.batch_warmup), _parse('length', self.length_warmup), batch, length)


def _parse(name: str, parts: tuple[str, ...]) -> list[tuple[int, int]]:
  """Returns (until, value) of texts 'until:value'."""
  try:
    return [(int(until), int(value)) for until, value in (part.split(':') for part in parts)]
  except ValueError:
    raise ValueError(f'--{name}_warmup={",".join(parts)} is not of the form step:value, such as 200:4,500:8') from None
