"""A run that continues: it keeps the flags that the command line leaves out, and some flags may not change."""
import contextlib
import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lm import signature, train
from lm.data.store_reader import OtherSettings
from lm.launch.arguments import Values, from_json, to_text
from lm.workdir import checkpoint, mismatch, records
from lm.workdir.describe import describe, differences


@dataclasses.dataclass(frozen=True)
class ProgramFlags:
  """The values of a program's flags, and where they come from.

  Attributes:
    knobs: the values of the experiment's flags, by name.
    shared: the values of the flags that all runs share, by name.
    from_workdir: the values that were taken from the run in the workdir and are not defaults.
    changes: (value of the run in the workdir, value now) of each flag that the command line changes.
    on_command_line: the names of the flags that the command line sets.
  """
  knobs: Mapping[str, Any]
  shared: Mapping[str, Any]
  from_workdir: Mapping[str, Any]
  changes: Mapping[str, tuple[Any, Any]]
  on_command_line: frozenset[str] = frozenset()

  def lines(self, workdir: pathlib.Path) -> list[str]:
    """Returns lines that name the values from the workdir, and the changes."""
    lines = []
    if self.from_workdir:
      values = ' '.join(f'--{name}={to_text(value)}' for name, value in self.from_workdir.items())
      lines.append(f'flags that the run in {workdir} has: {values}')
    if self.changes:
      values = ' '.join(f'--{name}={to_text(now)} (before {to_text(before)})'
                        for name, (before, now) in self.changes.items())
      lines.append(f'flags given with other values: {values}')
    return lines


UNCHANGED = ProgramFlags({}, {}, {}, {})


def inherit_flags(experiment: Callable[..., Any], knobs: Values, shared: Values, workdir: pathlib.Path) -> ProgramFlags:
  """Returns the flags of a program; flags that the command line leaves out have the values of the run in the workdir.

  Only a run of the same script counts. One that ended before its first checkpoint counts where the command line sets no
  flag of the experiment: such a command asks for that run, and would train another one with the defaults. Of the flags
  that all runs share, `--seed` and `--init` are taken from it.
  """
  script = pathlib.Path(inspect.getfile(experiment)).name
  on_command_line = knobs.on_command_line | shared.on_command_line
  accepted = [record for record in records.read(workdir) if 'data' in record and record.get('script') == script]
  has_checkpoint = any((workdir / 'checkpoints').glob('[0-9]*'))
  if not accepted or knobs.on_command_line and not has_checkpoint:
    return ProgramFlags(knobs, shared, {}, {}, on_command_line)
  own = {flag.name: flag for flag in signature.flags(experiment)}
  kinds = {name: flag.kind for name, flag in own.items()} | {'init': pathlib.Path | None, 'seed': int}
  defaults = {name: flag.default for name, flag in own.items()} | {'seed': 0, 'init': None}
  record = {**accepted[-1]['knobs'], **{name: accepted[-1].get(name) for name in ('seed', 'init')}}
  before = {name: from_json(kinds[name], value) for name, value in record.items() if name in kinds}
  inherited = {name: value for name, value in before.items() if name not in on_command_line}
  now = {name: value for name, value in {**knobs, **shared}.items() if name in on_command_line and name in before}
  if isinstance(now.get('init'), pathlib.Path) and now['init'].exists():
    now['init'] = now['init'].resolve()   # records have the whole path
  return ProgramFlags(
      knobs={**knobs, **{name: value for name, value in inherited.items() if name in own}},
      shared={**shared, **{name: value for name, value in inherited.items() if name in shared}},
      from_workdir={name: value for name, value in inherited.items() if value != defaults[name]},
      changes={name: (before[name], value) for name, value in now.items() if value != before[name]},
      on_command_line=on_command_line)


@contextlib.contextmanager
def name_changed_flags(flags: ProgramFlags, workdir: pathlib.Path, build: Callable[..., train.Run]) -> Iterator[None]:
  """Makes the error of a checkpoint or of data that belongs to another run name the flags that make the difference.

  `build(**changes)` builds the run with other values of some flags. A mesh has to be set.

  Raises:
    ValueError: the block raised such an error, and flags that changed are the reason.
  """
  try:
    yield
  except (mismatch.Mismatch, OtherSettings) as error:
    parts = _parts_by_flag(flags.changes, build, _fixed_parts)
    if parts:
      raise ValueError(_refusal(flags, parts, workdir)) from error
    raise


def check_start(flags: ProgramFlags, workdir: pathlib.Path, build: Callable[..., train.Run]) -> None:
  """Checks that a run with a checkpoint is not given other parameters to start from, which it would ignore.

  Raises:
    ValueError: flags that changed name other parameters.
  """
  if not flags.changes or checkpoint.stored_facts(workdir / 'checkpoints') is None:
    return
  parts = _parts_by_flag(flags.changes, build, lambda run: {'start': describe(run.start, inside=True)})
  if parts:
    raise ValueError(_refusal(flags, parts, workdir))


def check_minutes(flags: ProgramFlags, run: train.Run) -> None:
  """Checks that a run with a fixed number of steps is not given minutes, which it would ignore.

  Raises:
    ValueError: the command line sets --minutes, and the run has a fixed number of steps.
  """
  if 'minutes' in flags.on_command_line and run.minutes is None:
    raise ValueError(f'--minutes={to_text(flags.knobs["minutes"])} is given, and the run has a fixed number of steps, '
                     f'--steps={run.steps}; leave --minutes out, or give --steps=none beside it')


def _refusal(flags: ProgramFlags, parts: Mapping[str, set[str]], workdir: pathlib.Path) -> str:
  """Returns the message on flags that may not change; `parts` are the parts of the run that each of them changes."""
  lines = []
  for name in parts:
    before, now = flags.changes[name]
    lines.append(f'--{name} is {to_text(before)} there, not {to_text(now)}')
  them = 'it' if len(lines) == 1 else 'them'
  message = (f'the run in {workdir} was trained with other values of flags that cannot change: {"; ".join(lines)}. '
             f'Leave {them} out, or choose another --workdir')
  if set().union(*parts.values()) == {'objective'}:
    message += ', or continue all the same by --new_objective'
  return message


def _parts_by_flag(changes: Mapping[str, tuple[Any, Any]], build: Callable[..., train.Run],
                   describe_run: Callable[[train.Run], Mapping[str, Any]]) -> dict[str, set[str]]:
  """Returns the parts of the run that each flag changes, by its name; flags that change none are left out."""
  now, parts = describe_run(build()), {}
  for name, (before, _) in changes.items():
    # The earlier value may not fit the other flags, and the file that it names may no longer exist.
    with contextlib.suppress(ValueError, OSError):
      lines = differences(describe_run(build(**{name: before})), now)
      parts[name] = {line.replace(':', '.').partition('.')[0] for line in lines}
  return {name: changed for name, changed in parts.items() if changed}


def _fixed_parts(run: train.Run) -> dict[str, Any]:
  """Returns the parts of a run that may not change, as far as they are known before the data is opened."""
  state = jax.eval_shape(lambda: train.init(run).opt_state)
  arrays = {jax.tree_util.keystr(path): str((x.shape, x.dtype)) for path, x in
            jax.tree_util.tree_leaves_with_path(state)}
  return {**train.identity(run, '', ''), 'data': describe(run.data, inside=True), 'optimizer': arrays}
