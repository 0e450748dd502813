"""Search over the flags of an experiment with Optuna. Its journal is a file, so that a search can be resumed."""
import csv
import dataclasses
import itertools
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Choice:
  """A flag that takes one of several values, given as text."""
  values: tuple[str, ...]

  def suggest(self, trial: Any, name: str) -> str:
    return trial.suggest_categorical(name, self.values)


@dataclasses.dataclass(frozen=True)
class Range:
  """A flag that takes a number in [low, high], an integer if both ends are."""
  low: float
  high: float
  log: bool = False

  def suggest(self, trial: Any, name: str) -> str:
    suggest = trial.suggest_int if isinstance(self.low, int) else trial.suggest_float
    return repr(suggest(name, self.low, self.high, log=self.log))


Space = dict[str, Choice | Range]


def space(text: str, convert: Callable[[str, str], Any]) -> Space:
  """Returns the space that a text describes, as in 'lr=1e-4:1e-2:log; batch=8,16,32'.

  A flag has a range (two ends, and `log` for a logarithmic scale) or a list of values. Values that contain a comma or a
  colon are quoted, as in "milestones='100,200','150'". `convert(name, value)` returns the value of a flag for its text,
  and raises ValueError where there is no such flag. ValueError where the text is not of this form.
  """
  result: Space = {}
  for part in filter(None, map(str.strip, text.split(';'))):
    name, equals, values = (word.strip() for word in part.partition('='))
    low, *range_parts = [values] if "'" in values else values.split(':')
    if not equals or not values or name in result or len(range_parts) > 2 or range_parts[1:] not in ([], ['log']):
      raise ValueError(f"knob {part!r}: write 'lr=1e-4:1e-2:log' or 'batch=8,16,32', each once, with ; between them; "
                       "quote values that hold , or :, as in name='1,2','3:4'")
    if not range_parts:
      choices = tuple(value.strip() for value in next(csv.reader([values], quotechar="'", skipinitialspace=True)))
      if len(set(choices)) < len(choices):
        raise ValueError(f'knob {part!r}: list each value once')
      for value in choices:
        convert(name, value)
      result[name] = Choice(choices)
      continue
    ends = convert(name, low), convert(name, range_parts[0])
    if not all(type(end) in (int, float) for end in ends):
      raise ValueError(f'knob {part!r}: {name} is no number, so it has no range; list its values, such as {name}=a,b')
    if not ends[0] < ends[1] or range_parts[1:] and ends[0] <= 0 or not math.isfinite(ends[1]):
      raise ValueError(f'knob {part!r}: a range goes up, between finite numbers, and on a log scale begins above 0')
    result[name] = Range(*ends, log=bool(range_parts[1:]))
  if not result:
    raise ValueError("there are no knobs to search; write 'lr=1e-4:1e-2:log; batch=8,16,32'")
  return result


def combinations(knobs: Space) -> int:
  """Returns the number of points of a grid. ValueError where a flag has a range."""
  if ranges := [name for name, values in knobs.items() if isinstance(values, Range)]:
    raise ValueError(f'a grid needs the values of {", ".join(ranges)}, such as {ranges[0]}=1e-3,3e-3,1e-2; or take '
                     '--method=random')
  return math.prod(len(values.values) for values in knobs.values())


class Trial(NamedTuple):
  number: int
  knobs: dict[str, str]   # as they are written
  value: float            # inf: it diverged
  evaluations: int
  pruned: bool


def optuna() -> Any:
  """Returns the library. ImportError, which says how to install it, where it is missing."""
  try:
    import optuna
  except ImportError:
    raise ImportError("a search needs Optuna (pip install 'lm[sweep]')") from None
  return optuna


class Study:
  """A search whose trials are in `journal`. `method` is grid, random, or halving.

  Halving (Jamieson and Talwalkar 2016; asynchronous as in Li et al. 2020): at evaluation 1, 3, 9, ... a trial continues
  only if it is among the best third of the trials that have reached this evaluation.

  ImportError without Optuna; ValueError for a grid over a range.
  """

  def __init__(self, journal: pathlib.Path, knobs: Space, method: str, seed: int = 0):
    library = optuna()
    library.logging.set_verbosity(library.logging.WARNING)
    backend = library.storages.journal
    storage = library.storages.JournalStorage(backend.JournalFileBackend(str(journal)))
    self._optuna, self._knobs = library, knobs
    self._study = library.create_study(storage=storage, study_name='sweep', load_if_exists=True, direction='minimize')
    # A search that is resumed draws new points.
    self._study.sampler = library.samplers.RandomSampler(seed + len(self._study.trials))
    self.size = combinations(knobs) if method == 'grid' else None
    if method == 'grid':
      # Optuna's GridSampler does not work with ask and tell.
      for values in itertools.product(*(k.values for k in knobs.values())):
        self._study.enqueue_trial(dict(zip(knobs, values)), skip_if_exists=True)
    self._study.pruner = (library.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
                          if method == 'halving' else library.pruners.NopPruner())

  def ask(self, trials: int) -> Iterator['RunningTrial']:
    """Yields trials to run until so many are finished, first those that were interrupted."""
    states = self._optuna.trial.TrialState
    for stopped in self._study.get_trials(states=[states.RUNNING]):
      trial = self._optuna.trial.Trial(self._study, stopped._trial_id)
      yield RunningTrial(self._study, trial, stopped.params, self._knobs)
    while len(self._study.get_trials(states=[states.COMPLETE, states.PRUNED])) < trials:
      yield RunningTrial(self._study, self._study.ask(), {}, self._knobs)

  def finished(self) -> list[Trial]:
    """Returns the finished trials: the best first, those that were pruned last."""
    states = self._optuna.trial.TrialState
    trials = self._study.get_trials(states=[states.COMPLETE, states.PRUNED])
    results = [Trial(t.number, {name: str(value) for name, value in t.params.items()}, t.value,
                   max(t.intermediate_values, default=0), t.state == states.PRUNED) for t in trials]
    return sorted(results, key=lambda t: (t.pruned, t.value))


class RunningTrial:
  """A trial to run: report the value of each evaluation, then tell the last one."""

  def __init__(self, study: Any, trial: Any, earlier: dict[str, Any], knobs: Space):
    self._study, self._trial, self.number = study, trial, trial.number
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      self.knobs = {name: str(earlier[name]) if name in earlier else knob.suggest(trial, name)
                    for name, knob in knobs.items()}
    self.pruned = False

  def report(self, evaluation: int, value: float) -> bool:
    """Whether to stop the trial, since the value of this evaluation (counted from 1) is not among the best so far."""
    with warnings.catch_warnings():   # of an evaluation that was reported before an interruption
      warnings.simplefilter('ignore')
      self._trial.report(value if math.isfinite(value) else math.inf, evaluation)
    self.pruned = self._trial.should_prune()
    return self.pruned

  def tell(self, value: float) -> None:
    states = optuna().trial.TrialState
    state = states.PRUNED if self.pruned else states.COMPLETE
    self._study.tell(self._trial, None if self.pruned else value, state=state)
