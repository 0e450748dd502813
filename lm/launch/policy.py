"""What the flag `--on_not_finite` makes of a run."""
import dataclasses

from lm import train


def with_policy(run: train.Run, on_not_finite: str | None) -> train.Run:
  """Returns the run with what `--on_not_finite` says. Raises ValueError where its guard contradicts it."""
  match on_not_finite:
    case 'stop' if run.guard is not None:
      raise ValueError('--on_not_finite=stop is given, and the spike guard of the run skips steps that are not finite; '
                       'leave one of them out')
    case 'stop':
      return dataclasses.replace(run, not_finite=None)
    case 'skip':   # with a guard, it is what counts the steps
      return dataclasses.replace(run, not_finite=train.Skip() if run.guard is None else None)
    case 'go_back':
      return dataclasses.replace(run, not_finite=train.GoBack())
  return run
