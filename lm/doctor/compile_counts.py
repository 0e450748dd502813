"""Probes of compilation: whether a step compiles once, by the types of its state, and counted over steps of the run."""
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import seeds, train
from lm.doctor.findings import DoesNotApply, Finding, Verdict, judge
from lm.doctor.subject import Subject

STEPS = 3   # that are computed of each shape of batches
_EVENT = '/jax/core/compile/backend_compile_duration'   # that JAX records for each program that XLA compiles


def state_keeps_its_types(subject: Subject) -> Finding:
  """Whether a step returns a state of the same types as the state that it is given, so that the next step is the same.
  """
  state = _required_state(subject)
  batch = train.abstract_batch(subject.run, subject.mesh)
  key = seeds.key(subject.run.seed)
  new, _ = train.make_step(subject.run).eval_shape(state, batch, subject.constants, key, np.int32(0))
  before, after = _types(state), _types(new)
  changes = _changes(before, after)
  text = f'a step changes the types of {len(changes)} of {len(before)} arrays of its state'
  shapes = len(subject.run.schedule.shapes())
  if not changes:
    return judge(True, f'{text}, so that it compiles once' + (f' for each of {shapes} shapes' if shapes > 1 else ''))
  return judge(False, text, f'it compiles again; {changes[0]}', Verdict.WARNING)


def step_compiles_once(subject: Subject) -> Finding:
  """Whether XLA compiles a step once for each shape of batches, counted over steps of the run, with its own batches."""
  state, train_step = _required_state(subject), train.make_step(subject.run)
  run, key, number = subject.run, seeds.key(subject.run.seed), int(state.step)
  state = jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state)   # a step donates its state
  # The types of the last step of each shape, compilations, the change before the first that is not needed, and seconds.
  types, compilations, cause, seconds = {}, 0, '', 0.
  steps = list(_steps(run, number))
  for step in steps:
    batch = subject.feed(step, state._replace(params=subject.with_constants(state.params)))
    shape, now = run.schedule.shape(step), {**_types(state), **_types(batch)}
    start = time.monotonic()
    with _compilations() as compiled:
      state, _ = jax.block_until_ready(train_step(state, batch, subject.constants, key, np.int32(state.step)))
    if compiled and shape in types and not cause:
      cause = f'step {step + 1} did so: ' + (_changes(types[shape], now) or ['with the same types'])[0]
    seconds, compilations, types[shape] = time.monotonic() - start, compilations + bool(compiled), now
  shapes = 'one shape' if len(types) == 1 else f'{len(types)} shapes'
  times = 'once' if compilations == 1 else f'{compilations} times'
  text = f'{len(steps)} steps with batches of {shapes} compiled {times}; the last one took {seconds:.3f} s'
  return judge(not cause, text, f'{cause}; each further compilation takes as long as the first', Verdict.WARNING)


@contextlib.contextmanager
def _compilations() -> Iterator[list[float]]:
  """Yields the seconds of each compilation in a block; the list is complete at its end."""
  compiled = []

  def listen(event: str, seconds: float, **_: Any) -> None:
    if event == _EVENT:
      compiled.append(seconds)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _required_state(subject: Subject) -> train.State:
  if subject.state is None:
    raise DoesNotApply('the workdir does not describe the optimizer; the script of the run does, with --diagnose')
  return subject.state


def _steps(run: train.Run, number: int) -> Iterator[int]:
  """Yields steps of the run to compute: some from `number` on, and as many from the start of each later stage."""
  first = max(min(number, run.steps - STEPS), 0)
  starts = [first, *(stage.until for stage in run.schedule.stages if first < stage.until < run.steps)]
  for start, end in zip(starts, [*starts[1:], run.steps]):
    yield from range(start, min(start + STEPS, end))


def _types(tree: Any) -> dict[str, str]:
  return {jax.tree_util.keystr(path, simple=True, separator='/'): _type(x)
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _type(x: Any) -> str:
  """Returns the type of an array in words: dtype, shape, whether it is weak, and how it is laid out."""
  aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  spec = tuple(aval.sharding.spec) if getattr(aval.sharding, 'spec', None) is not None else ()
  spec += (None,) * (len(aval.shape) - len(spec))
  return f'{aval.dtype}{list(aval.shape)}{" weak" if aval.weak_type else ""} {spec}'


def _changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
  return [f'{path} is {before.get(path)} before and {after.get(path)} after'
          for path in {**before, **after} if before.get(path) != after.get(path)]
