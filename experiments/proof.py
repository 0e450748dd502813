"""Shows that a run has the same batches, losses and gradients on every mesh of the devices that there are.

  python experiments/proof.py

A small decoder is trained on packed documents of Python's library for some steps on one mesh after the other, and at
last on one mesh for half of the steps and then, from its checkpoint, on another. The table has, for each mesh, whether
the batches are the same bytes, the largest relative difference of a loss and of a norm of the gradient from those of
the first mesh, how far rounding explains them (see `lm/studies/mesh_traces.py`), and the bytes that devices exchange in
a step. It is printed, and written to `proof.md` in the workdir. The exit code is 1 where a mesh differs by more than
rounding.
"""
import functools
import math
import pathlib
import shutil
import sys

import jax

from lm import launch, optim, sharding, train
from lm.data import dataset, tokenizers
from lm.data.text import corpora, source
from lm.models import attention, moe, rotary, stack, transformer
from lm.models import layers as parts
from lm.objectives.next_token import next_token
from lm.optim import schedules
from lm.sharding import hosts
from lm.studies import mesh_traces
from lm.workdir import atomic


def decoder(vocabulary: int, width: int, layers: int, heads: int, length: int, experts: int) -> transformer.Transformer:
  """Returns a small decoder; with `experts`, of which a token chooses two, a mixture whose loads a loss balances."""
  if not experts:
    return transformer.llama(vocabulary, width, layers, heads, max_length=length)
  mixture = moe.Experts(moe.SoftmaxRouter(2), experts, width, balance=(moe.SequenceBalance(),))
  mixer = attention.Attention(heads, heads, width // heads, rotary.Rotary())
  block = parts.Block(mixer, mixture, parts.RMSNorm(), parts.RMSNorm())
  return transformer.Transformer(vocabulary, width, stack.stacks([block] * layers), parts.RMSNorm(), length)


def proof(*, meshes: str | None = None, steps: int = 20, layers: int = 2, width: int | None = None, heads: int = 4,
          experts: int = 0, length: int = 128, batch: int | None = None, seed: int = 0,
          workdir: pathlib.Path = pathlib.Path('runs/proof'), cluster: launch.Cluster = launch.Cluster()) -> None:
  """Trains on each mesh and compares.

  Args:
    meshes: the meshes, separated by `;`, such as `fsdp:8; fsdp:4,tensor:2`; by default several of all devices.
    steps: the number of steps on each mesh.
    layers: the number of layers.
    width: the size of the residual stream; by default 64, or the next size that the devices divide.
    heads: the number of heads of attention.
    experts: the number of experts of each layer, such as 8; 0 for dense layers, which do not show what `expert` splits.
    length: the positions in a row.
    batch: the rows in a batch; by default 16, or the next number that the devices divide.
    seed: fixes the data order, the initialisation and the losses.
    workdir: the folder of the data and of the table.
  """
  cluster.join()   # the same command runs in each process
  rows, size = mesh_traces.sizes_for(jax.device_count(), heads)
  batch, width = rows if batch is None else batch, size if width is None else width
  tokenizer, warmup = tokenizers.Bytes(), max(min(2, steps - 1), 0)
  vocabulary = math.ceil(tokenizer.vocab_size / 16) * 16   # so that meshes split it
  run = train.Run(decoder(vocabulary, width, layers, heads, length, experts), next_token(),
                  dataset.Text(source.sample(corpora.python_library(), 64), tokenizer, length),
                  optim.adamw(schedules.warmup_cosine(3e-3, steps, warmup)), steps, batch, seed=seed)
  shapes = [shape.strip() for shape in (meshes or mesh_traces.meshes_of(len(jax.devices()))).split(';')]
  laid_out = [sharding.make_mesh(shape) for shape in shapes]
  for mesh in laid_out:
    with jax.set_mesh(mesh):
      train.check(run, mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  data = run.data.open(workdir, control=run.objective.control)
  reference = mesh_traces.trace(run, data, laid_out[0])
  bound = mesh_traces.bound(reference, mesh_traces.perturbed(run, data, laid_out[0]), batch * length)[:, -1]
  lines = [f'{jax.device_count()} {jax.devices()[0].device_kind}, {jax.process_count()} processes, JAX '
           f'{jax.__version__}, {steps} steps of {batch} x {length} positions', '',
           '| mesh | batches | loss differs by | norm differs by | within rounding | exchanged in a step |',
           '|---|---|---|---|---|---|',
           f'| {shapes[0]} | | | | at most {bound[0]:.1e}, {bound[1]:.1e} | {_exchanged(reference)} |']
  fails = False
  traces = [functools.partial(mesh_traces.trace, run, data, mesh) for mesh in laid_out[1:]]
  if steps > 1:
    moves = laid_out[1 % len(laid_out)], laid_out[-1 if len(laid_out) > 2 else 0]   # from a mesh to another one
    traces.append(lambda: mesh_traces.resumed(run, _empty(workdir / 'resumed'), moves, steps // 2))
  for make in traces:
    trace = make()
    loss, norm = mesh_traces.deviation(trace, reference)[:, -1]
    same, within = trace.batches == reference.batches, loss <= bound[0] and norm <= bound[1]
    fails |= not (same and within)
    lines.append(f'| {trace.mesh} | {"same" if same else "OTHERS"} | {loss:.1e} | {norm:.1e} | '
                 f'{"yes" if within else "NO"} | {_exchanged(trace)} |')
  if jax.process_index() == 0:
    print('\n'.join(lines))
    atomic.write(workdir / 'proof.md', '\n'.join(lines) + '\n')
  if fails:
    sys.exit(1)


def _empty(folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder, from which an earlier run is removed."""
  with hosts.process_0_first():
    if jax.process_index() == 0:
      shutil.rmtree(folder, ignore_errors=True)
  return folder


def _exchanged(trace: mesh_traces.Trace) -> str:
  if trace.exchanges is None:
    return ''
  return ', '.join(f'{kind} {size / 1e6:.2f} MB' for kind, (_, size) in trace.exchanges.items()) or 'nothing'


if __name__ == '__main__':
  launch.tool(proof)
