"""What a probe of the doctor returns: one line with a number and a verdict."""
import dataclasses
import enum


class Verdict(enum.Enum):
  """The verdict of a probe.

  Attributes:
    OK: the run is as it should be.
    WARNING: the run can train, and its user should know something.
    FAULT: the run would train something else than it says.
    SKIPPED: the probe does not apply to the run, or it could not be done.
  """
  OK = 'ok'
  WARNING = 'warning'
  FAULT = 'fault'
  SKIPPED = 'skipped'


@dataclasses.dataclass(frozen=True)
class Finding:
  """The result of a probe.

  Attributes:
    verdict: the verdict.
    text: one line, which has the number that was measured.
    table: further lines, such as one for each parameter.
  """
  verdict: Verdict
  text: str
  table: tuple[str, ...] = ()


class DoesNotApply(Exception):
  """A probe does not apply to a run; the message says why."""


def judge(is_right: bool, text: str, advice: str = '', otherwise: Verdict = Verdict.FAULT) -> Finding:
  """Returns a finding: OK where `is_right` is true; elsewhere `otherwise`, with the advice after the text."""
  if is_right:
    return Finding(Verdict.OK, text)
  return Finding(otherwise, f'{text}: {advice}' if advice else text)
