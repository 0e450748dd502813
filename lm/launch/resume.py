"""A run that goes on: it keeps its flags but for those that are given, of which some may not change."""
import contextlib
import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lm import signature, train
from lm.data.store_reader import OtherSettings
from lm.launch.arguments import Values, restored, written
from lm.workdir import checkpoint, mismatch, records
from lm.workdir.describe import describe, differences


@dataclasses.dataclass(frozen=True)
class Flags:
  """The values of a program's flags: of the experiment, and of every run.

  `kept` are those that come from the run in the workdir and are no defaults, `changed` those that were given another
  value than that run has: name: (before, now). `given` are the names of those that the command line has.
  """
  knobs: Mapping[str, Any]
  shared: Mapping[str, Any]
  kept: Mapping[str, Any]
  changed: Mapping[str, tuple[Any, Any]]
  given: frozenset[str] = frozenset()

  def lines(self, workdir: pathlib.Path) -> list[str]:
    """What comes from the run and what was changed, to be printed."""
    kept = [f'--{name}={written(value)}' for name, value in self.kept.items()]
    changed = [f'--{name}={written(now)} (before {written(before)})' for name, (before, now) in self.changed.items()]
    return [f'{title}: {" ".join(flags)}' for title, flags in (
        (f'flags that the run in {workdir} has', kept), ('flags given with other values', changed)) if flags]


def settle(experiment: Callable[..., Any], knobs: Values, shared: Values, workdir: pathlib.Path) -> Flags:
  """The flags of a program: where the workdir holds a run of its script, those that are not given are of that run.

  Of the flags that every run has, these are the seed and what it started from.
  """
  script, given = pathlib.Path(inspect.getfile(experiment)).name, knobs.given | shared.given
  accepted = [record for record in records.read(workdir) if 'data' in record and record.get('script') == script]
  if not accepted or not any((workdir / 'checkpoints').glob('[0-9]*')):   # what never saved is begun anew
    return Flags(knobs, shared, {}, {}, given)
  own = {flag.name: flag for flag in signature.flags(experiment)}
  kinds = {name: flag.kind for name, flag in own.items()} | {'init': pathlib.Path | None, 'seed': int}
  record = {**accepted[-1]['knobs'], **{name: accepted[-1].get(name) for name in ('seed', 'init')}}
  before = {name: restored(kinds[name], value) for name, value in record.items() if name in kinds}
  defaults = {name: flag.default for name, flag in own.items()} | {'seed': 0, 'init': None}
  kept = {name: value for name, value in before.items() if name not in given}
  now = {name: value for name, value in {**knobs, **shared}.items() if name in given and name in before}
  if isinstance(now.get('init'), pathlib.Path) and now['init'].exists():
    now['init'] = now['init'].resolve()   # as it is recorded
  return Flags({**knobs, **{name: value for name, value in kept.items() if name in own}},
               {**shared, **{name: value for name, value in kept.items() if name in shared}},
               {name: value for name, value in kept.items() if value != defaults[name]},
               {name: (before[name], value) for name, value in now.items() if value != before[name]}, given)


UNCHANGED = Flags({}, {}, {}, {})


@contextlib.contextmanager
def naming(flags: Flags, workdir: pathlib.Path, build: Callable[..., train.Run]) -> Iterator[None]:
  """Where what is inside finds the checkpoint to be of another run: ValueError that names the flags which make it so.

  `build(**changes)` gives the run with flags of other values; a mesh is set.
  """
  try:
    yield
  except (mismatch.Mismatch, OtherSettings) as error:
    if parts := _parts(flags.changed, build, _portrait):
      raise ValueError(_refusal(flags, parts, workdir)) from error
    raise


def check_start(flags: Flags, workdir: pathlib.Path, build: Callable[..., train.Run]) -> None:
  """ValueError where flags that changed name other parameters to start from, and the run has a checkpoint already."""
  if not flags.changed or checkpoint.stored_facts(workdir / 'checkpoints') is None:
    return
  if parts := _parts(flags.changed, build, lambda run: {'start': describe(run.start, inside=True)}):
    raise ValueError(_refusal(flags, parts, workdir))


def check_minutes(flags: Flags, run: train.Run) -> None:
  """ValueError where minutes are given to a run that has a fixed number of steps, which would ignore them."""
  if 'minutes' in flags.given and run.minutes is None:
    raise ValueError(f'--minutes={written(flags.knobs["minutes"])} is given, and the run has a fixed number of steps, '
                     f'--steps={run.steps}; leave --minutes out, or give --steps=none beside it')


def _refusal(flags: Flags, parts: Mapping[str, set[str]], workdir: pathlib.Path) -> str:
  lines = [f'--{name} is {written(flags.changed[name][0])} there, not {written(flags.changed[name][1])}'
           for name in parts]
  objective = set().union(*parts.values()) == {'objective'}
  return (f'the run in {workdir} was trained with other values of flags that cannot change: {"; ".join(lines)}. '
          f'Leave {"it" if len(lines) == 1 else "them"} out, or choose another --workdir'
          + (', or go on all the same by --new_objective' if objective else ''))


def _parts(changed: Mapping[str, tuple[Any, Any]], build: Callable[..., train.Run],
           portrait: Callable[[train.Run], Mapping[str, Any]]) -> dict[str, set[str]]:
  """By flag that changed, the parts of the run that differ from those without its change."""
  now, parts = portrait(build()), {}
  for name, (before, _) in changed.items():
    with contextlib.suppress(ValueError, OSError):   # without it others may not fit, or what it named is gone
      parts[name] = {line.replace(':', '.').partition('.')[0]
                     for line in differences(portrait(build(**{name: before})), now)}
  return {name: differing for name, differing in parts.items() if differing}


def _portrait(run: train.Run) -> dict[str, Any]:
  """What may not change, as far as it is known without data."""
  state = jax.eval_shape(lambda: train.init(run).opt_state)
  arrays = {jax.tree_util.keystr(path): str((x.shape, x.dtype)) for path, x in
            jax.tree_util.tree_leaves_with_path(state)}
  return {**train.identity(run, '', ''), 'data': describe(run.data, inside=True), 'optimizer': arrays}
