"""How the optimizer treats each parameter: measured by two updates, one of a gradient of zeros and one of signs."""
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import declarations, optim
from lm.declarations import Role
from lm.doctor.findings import DoesNotApply, Finding, Verdict
from lm.doctor.subject import Subject, compiled_fast
from lm.optim import groups


def optimizer_table(subject: Subject) -> Finding:
  """The table of all parameters: shape, role, decay and size of the update, both in units of the learning rate.

  The decay is that of an update for a gradient of zeros; the update is the root mean square for a gradient of signs.
  Vectors, such as the scales of norms, that decay, and parameters that never move, are named.
  """
  if subject.state is None:
    raise DoesNotApply('the workdir does not describe the optimizer; the script of the run does, with --diagnose')
  run = subject.run
  weights = jax.tree.leaves(declarations.of(run.model), is_leaf=lambda x: isinstance(x, declarations.Weight))
  decays, updates, rate = compiled_fast(functools.partial(_measure, run, run.steps // 2))(subject.shaken)
  rate = float(rate)
  rows, decaying, still = [], [], []
  for (path, x), weight, decay, update in zip(jax.tree_util.tree_leaves_with_path(subject.params), weights,
                                              jax.tree.leaves(decays), jax.tree.leaves(updates)):
    name, decay, update = jax.tree_util.keystr(path, simple=True, separator='/'), float(decay), float(update)
    rows.append((name, 'x'.join(map(str, x.shape)) or '1', weight.role.name.lower(), f'{update:.3g}', f'{decay:.3g}'))
    if weight.role in (Role.VECTOR, Role.CORRECTION) and decay > 1e-6:
      decaying.append(name)
    if not update > 0:
      still.append(name)
  table = _aligned([('parameter', 'shape', 'role', 'update', 'decay'), *rows])
  text = f'{len(rows)} parameters at a learning rate of {rate:.2g} in the middle of the run; update and decay are in '
  text += 'units of it' if rate != 1 else 'absolute numbers'
  if any(not np.isfinite(float(row[3])) for row in rows):
    return Finding(Verdict.FAULT, f'{text}; the update of a gradient of signs is not finite', table)
  problems = []
  if decaying:
    problems.append(f'vectors decay: {_some(decaying)}; scales of norms and biases are not meant to become small')
  if still:
    problems.append(f'never updated: {_some(still)}')
  return Finding(Verdict.WARNING if problems else Verdict.OK, '; '.join([text, *problems]), table)


def _some(names: list[str]) -> str:
  return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')


def _measure(run: Any, step: int, params: Any) -> tuple[Any, Any, jax.Array]:
  """Returns decay and size of the update of each parameter, in units of the learning rate, and the rate."""
  state = optim.advance(run.transformation.init(params), step)
  square = lambda params: 0.5 * sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))

  def update(grads):
    return run.transformation.update(grads, state, params, value=jnp.float32(1), obj_fn=square)

  def signs(x):
    wave = sum((jax.lax.broadcasted_iota(jnp.float32, x.shape, axis) * (2.3 + 0.7 * axis) for axis in range(x.ndim)),
               jnp.full(x.shape, 0.5, jnp.float32))
    return groups.laid_out_like(jnp.sign(jnp.sin(wave) + 1e-3).astype(x.dtype), x)

  still_updates, new = update(jax.tree.map(jnp.zeros_like, params))
  moved, _ = update(jax.tree.map(signs, params))
  rate = optim.learning_rate(new)
  rate = jnp.float32(1) if rate is None else rate
  rms = lambda x: groups.replicated(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))
  scale = jnp.maximum(rate, 1e-30)
  decays = jax.tree.map(lambda u, p: rms(u) / jnp.maximum(rms(p), 1e-30) / scale, still_updates, params)
  return decays, jax.tree.map(lambda u, z: rms(u - z) / scale, moved, still_updates), rate


def _aligned(rows: list[tuple[str, ...]]) -> tuple[str, ...]:
  """Returns rows as lines with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  return tuple('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
