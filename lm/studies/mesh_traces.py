"""The losses of a run on several meshes, and how far float32 lets them differ.

Meshes add the same numbers in other orders, so that results differ by rounding. Two kinds of it bound the difference:

* A loss is a sum over n targets. Added in any tree, its relative error is at most u log2(n), where u = 2^-24 is half of
  the distance from 1 to the next number (Higham 1993), so two sums differ by twice of that.
* Rounding within a step changes the parameters, which later steps enlarge. How much they do in this run, with this
  optimizer, is measured: the run is repeated on one mesh with parameters that are moved at each step by at most one
  unit in the last place. A step rounds at more than one place, hence `FACTOR`.
"""
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import seeds, sharding, train
from lm.sharding import hosts
from lm.train import communication
from lm.train.feed import DataFeed
from lm.train.interfaces import OpenData
from lm.workdir import describe, track

FACTOR = 8.
PERTURBATIONS = 3   # the largest move of one run alone is a poor estimate: it was four times smaller than that of three


class Trace(NamedTuple):
  """The steps of a run on a mesh.

  Attributes:
    mesh: the mesh as text.
    losses: the loss of each step, [steps].
    norms: the norm of the gradient of each step, [steps].
    batches: a fingerprint of the bytes of all batches.
    exchanges: the exchanges of a step, by kind: their number, and their bytes; see `communication.totals`. None where
      they are not known.
  """
  mesh: str
  losses: np.ndarray
  norms: np.ndarray
  batches: str
  exchanges: Mapping[str, tuple[int, int]] | None


def meshes_of(count: int) -> str:
  """Returns meshes for a number of devices, separated by `;`, the first of which is the reference."""
  names = [f'fsdp:{count}', f'replica:{count}']
  if count % 2 == 0:
    names += [f'fsdp:{count // 2},tensor:2', f'replica:2,fsdp:{count // 2}']
  if count % 4 == 0:
    names += [f'replica:2,fsdp:{count // 4},tensor:2', f'fsdp:{count // 4},tensor:4', f'stage:2,fsdp:{count // 2}',
              f'fsdp:{count // 4},context:4', f'fsdp:{count // 4},expert:4']
  return '; '.join(names)


def sizes_for(devices: int, heads: int) -> tuple[int, int]:
  """Returns the least rows of a batch from 16, and the least width from 64, that a number of devices divides."""
  divisor = math.lcm(devices, 2 * heads)   # the size of a head is even
  return -(-16 // devices) * devices, -(-64 // divisor) * divisor


def trace(run: train.Run, data: OpenData, mesh: jax.sharding.Mesh, perturbation: int | None = None) -> Trace:
  """Returns the steps of a run on a mesh. Nothing is evaluated or saved.

  Args:
    run: the run; its optimizer, guard and accumulation count.
    data: the opened data of the run.
    mesh: the mesh.
    perturbation: the seed of perturbations of the parameters by rounding; None for none.
  """
  hosts.connect(mesh)
  with jax.set_mesh(mesh):
    feed, digest = DataFeed(run, data, mesh), hashlib.sha256()
    key = seeds.key(run.seed)
    state, metrics, compiled = jax.jit(lambda: train.init(run))(), [], None
    for number in range(run.steps):
      batch = feed(number, state)
      digest.update(describe.fingerprint(batch).encode())
      if compiled is None:
        compiled = train.make_step(run).lower(state, batch, {}, key).compile()
      if perturbation is not None:
        state = state._replace(params=_perturb(state.params, seeds.key(perturbation), number))
      state, values = compiled(state, batch, {}, key)
      metrics.append(values)
    losses, norms = (np.float64([step[name] for step in metrics]) for name in ('loss', 'grad_norm'))
    feed.close()
  return Trace(sharding.mesh_text(mesh), losses, norms, digest.hexdigest()[:16],
               communication.totals(compiled.as_text()))


def perturbed(run: train.Run, data: OpenData, mesh: jax.sharding.Mesh) -> list[Trace]:
  """Returns the steps of several runs whose parameters are moved by rounding, from which `bound` is computed."""
  return [trace(run, data, mesh, perturbation) for perturbation in range(PERTURBATIONS)]


def resumed(run: train.Run, workdir: pathlib.Path, meshes: Sequence[jax.sharding.Mesh], step: int) -> Trace:
  """Returns the steps of a run that ends after `step` on one mesh, and goes on from its checkpoint on another one.

  The workdir is a new one. All that the second mesh knows of the first is in its files.

  Raises:
    train.Stopped: a signal stopped the run.
  """
  digest = hashlib.sha256()

  class HashedFeed(DataFeed):
    def __call__(self, step, state):
      batch = super().__call__(step, state)
      digest.update(describe.fingerprint(batch).encode())
      return batch

  run = dataclasses.replace(run, feed=HashedFeed, evaluate_every=step, save_every=step, evaluate_batches=1)
  for mesh, watch in zip(meshes, (lambda number, _: number == step, None)):
    with jax.set_mesh(mesh):
      train.train(run, workdir, mesh, watch).raise_if_stopped()
  rows = [row for row in track.read_metrics(workdir / 'metrics.jsonl') if 'loss' in row]
  losses, norms = (np.float64([row[name] for row in rows]) for name in ('loss', 'grad_norm'))
  first, second = map(sharding.mesh_text, meshes)
  return Trace(f'{first}, from step {step + 1} on {second}', losses, norms, digest.hexdigest()[:16], None)


@jax.jit
def _perturb(params, key, number):
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.fold_in(key, number), len(leaves))
  ulp = jnp.finfo(jnp.float32).eps

  def move(x, key):
    layout = jax.typeof(x).sharding if jax.typeof(x).sharding.mesh.axis_names else None
    return x * (1 + ulp * (jax.random.randint(key, x.shape, -1, 2, out_sharding=layout)))

  return jax.tree.unflatten(tree, map(move, leaves, keys))


def deviation(trace: Trace, reference: Trace) -> np.ndarray:
  """Returns the largest relative difference of losses and of norms up to each step, [2, steps]."""
  pairs = (trace.losses, reference.losses), (trace.norms, reference.norms)
  return np.maximum.accumulate([np.abs(a - b) / np.abs(b) for a, b in pairs], axis=1)


def bound(reference: Trace, perturbed: Sequence[Trace], targets: int) -> np.ndarray:
  """Returns how far losses and norms may differ from those of the reference up to each step, [2, steps].

  `targets` is the number of targets of a step.
  """
  moved = np.max([deviation(trace, reference) for trace in perturbed], axis=0)
  return 2 * 2 ** -24 * np.log2(targets) + FACTOR * moved
