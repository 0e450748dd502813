"""Builds the run of an experiment, with the parameters that it starts from, and chooses a mesh that fits it."""
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm import load, lora, sharding, signature, train
from lm.train import checks
from lm.workdir import checkpoint


def with_init(knobs: dict[str, Any], init: pathlib.Path | None) -> tuple[dict[str, Any], pathlib.Path | None]:
  """Returns the values of the flags and the place of the parameters to start from, which both may name."""
  init = init or knobs.get('init')
  if init and init.exists():   # otherwise it is an id on the hub
    init = init.resolve()
  return ({**knobs, 'init': init} if 'init' in knobs else knobs), init


@contextlib.contextmanager
def naming_init(workdir: pathlib.Path, init: pathlib.Path | None) -> Iterator[None]:
  """Explains a missing file where a run started from other parameters, and still reads them."""
  try:
    yield
  except FileNotFoundError as error:
    if init is None or not has_checkpoint(workdir):
      raise
    raise FileNotFoundError(f'{error}. The run in {workdir} started from there, and still reads there what lies '
                            'under its adapters, or its shape and tokenizer; put it back. Where flags give the shape '
                            'and the tokenizer, --init=none continues without it') from None


def choose_mesh(build: Callable[..., Any]) -> Any:
  """Returns a mesh of all devices that fits the run; where there are several, it is printed with the reason."""
  if len(jax.devices()) == 1:
    return sharding.make_mesh()
  mesh, reason = sharding.choose_mesh(functools.partial(checks.check_mesh, build()))
  if jax.process_index() == 0:
    print(f'mesh {sharding.mesh_text(mesh)}: {reason}; --mesh gives another')
  return mesh


def builder(experiment: Callable[..., Any], knobs: dict[str, Any], workdir: pathlib.Path, init: pathlib.Path | None,
            seed: int, init_ignore_tokenizer: bool, init_changed: bool) -> Callable[..., Any]:
  """Returns `build(**changes)`, which builds the run of an experiment with other values of some flags."""
  def build(seed: int = seed, init: pathlib.Path | None = init, **changes: Any) -> Any:
    own_init = {'init': init} if 'init' in knobs else {}
    run = train.build(signature.call(experiment, {**knobs, **changes, **own_init}))
    run = dataclasses.replace(run, seed=seed)
    if init is None:
      return lora.start_from(run, None)
    try:
      return load.start_from(run, str(init), init_ignore_tokenizer)
    except OSError:   # the folder no longer exists, or the hub cannot be reached
      if init_changed or isinstance(run.model, lora.Adapted) or not has_checkpoint(workdir):
        raise
      return run   # the checkpoints of the run hold all its parameters

  return build


def has_checkpoint(workdir: pathlib.Path) -> bool:
  return checkpoint.stored_facts(workdir / 'checkpoints') is not None
