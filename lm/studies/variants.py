"""Experiments with other values of their flags, which text such as `a:lr=1e-3;b:lr=3e-3` names."""
import dataclasses
import inspect
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from lm import launch, lora, scripts, signature, train


@dataclasses.dataclass(frozen=True)
class Arm:
  """An experiment with values for its flags (`knobs`), under a name."""
  name: str
  function: Callable[..., train.Run]
  knobs: dict[str, Any]

  def make(self, seed: int = 0, **knobs: Any) -> train.Run:
    """Returns the run; `knobs` replace the arm's own. ValueError for adapters without base parameters."""
    run = train.build(signature.call(self.function, self.knobs | knobs))
    return lora.start_from(dataclasses.replace(run, seed=seed), None)

  def with_steps(self, steps: int) -> 'Arm':
    return dataclasses.replace(self, knobs={**self.knobs, 'steps': steps})


def experiment(script: pathlib.Path) -> Callable[..., train.Run]:
  """The function `experiment` of a script. FileNotFoundError or ValueError where there is none."""
  if not script.is_file():
    raise FileNotFoundError(f'there is no script {script}; --experiment takes a file such as experiments/pretrain.py')
  scripts.trust(script)
  if (folder := str(script.resolve().parent)) not in sys.path:
    sys.path.insert(0, folder)   # as for a script that is run
  return scripts.function(script, 'experiment')


def knobs(function: Callable[..., Any], text: str) -> dict[str, Any]:
  """Returns the values of all flags of an experiment, of which `text` sets some, as in 'lr=1e-3 optimizer=adam'.

  Values that contain spaces are quoted, as in a shell. A backslash stands for itself, as it does in a flag.
  ValueError for a flag that does not exist, with the name of the nearest one, and for a value that is not valid.
  """
  try:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, '', ''   # a backslash stands for itself
    words = [word if word.startswith('--') else f'--{word}' for word in lexer]
  except ValueError as error:
    raise ValueError(f'knobs {text.strip()!r}: {error}') from None
  if help := [word for word in words if word.lstrip('-').partition('=')[0] in ('help', 'helpfull', 'debug', 'script')]:
    raise ValueError(f'{help[0]} is no knob of an experiment')
  try:
    (values,), _ = launch.parse([function], ['', *words])
  except flags.Error as error:
    complete_list = f'{pathlib.Path(inspect.getfile(function)).name} --help lists all'
    raise ValueError(str(error).replace('--help lists all', complete_list)) from None
  return values


def arms(function: Callable[..., Any], text: str, common: str = '') -> list[Arm]:
  """Returns the arms that `text` names, as in 'adam: optimizer=adam lr=1e-3; muon: optimizer=muon'.

  All have the flags in `common` too. ValueError where the text names none, or one twice.
  """
  result: list[Arm] = []
  for part in filter(str.strip, text.split(';')):
    name, colon, own = part.partition(':')
    name = name.strip()
    is_valid = name.isprintable() and not set(name) & set('/|') and not name.startswith('.')
    if not colon or not name or not is_valid or name in [arm.name for arm in result]:
      raise ValueError(f"arm {part.strip()!r}: write 'name: knob=value knob=value; other: ...', each name once, "
                       'without / and |')
    result.append(Arm(name, function, knobs(function, f'{common} {own}')))
  if not result:
    raise ValueError("there are no arms; write 'name: knob=value knob=value; other: ...'")
  return result
