"""Checks that the parts of a run fit together, before anything is compiled."""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import seeds, sharding
from lm.data.batch import KINDS, Batch
from lm.data.rows.augment import augmented
from lm.train.interfaces import OpenData
from lm.train.run import Run, abstract_batch, abstract_constants, abstract_state, with_constants, with_shardings
from lm.train.step import make_step
from lm.workdir.describe import differences


def check(run: Run, mesh: jax.sharding.Mesh) -> None:
  """Checks a run by tracing its step, in seconds, without data and without memory of devices.

  Raises:
    ValueError: parts of the run do not fit together, or do not fit the mesh.
  """
  sharding.require(mesh)
  _check_rows(run, mesh)
  _check_lengths(run, mesh)
  shapes = run.schedule.shapes()
  longest = run.model.max_length
  if run.data.length > longest:
    raise ValueError(f'rows of {run.data.length} positions are longer than the {longest} that the model reads at once; '
                     f'give --length={longest} or less')
  if run.offload_optimizer:
    sharding.require_host_memory('the state of the optimizer', '--offload_optimizer')
  if run.objective.needs is not run.data.kind:
    raise ValueError(f'the objective learns from {KINDS[run.objective.needs]}, and the data holds '
                     f'{KINDS[run.data.kind]}; choose another objective or other data')
  augmented(run.objective, run.augment)
  if run.augment and run.data.columns:
    raise ValueError(f'columns that are stored with the data, {", ".join(run.data.columns)}, belong to the text '
                     'without augmentation; leave out the augmentation')
  has_whole_rows = run.data.source_length or run.data.kind is not np.ndarray or abstract_batch(run, mesh).inputs
  if len({length for _, length in shapes}) > 1 and has_whole_rows:
    raise ValueError('rows of sources, of dialogues and with inputs cannot be cut into shorter ones; leave out the '
                     'stages of length')
  key = with_shardings(jax.eval_shape(lambda: seeds.key(run.seed)), mesh)
  for shape in shapes:   # with the arguments of the loop, which then does not trace the step again
    jax.eval_shape(make_step(run), abstract_state(run, mesh), abstract_batch(run, mesh, shape),
                   abstract_constants(run), key, np.int32(0))


def check_mesh(run: Run, mesh: jax.sharding.AbstractMesh) -> None:
  """Raises ValueError where the mesh does not divide the batch of a run, or its weights."""
  _check_rows(run, mesh)
  with jax.sharding.use_abstract_mesh(mesh):
    jax.eval_shape(lambda: run.model.init(jax.random.key(0)))


def _check_rows(run: Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
  split = sharding.parts('B', mesh)
  parts = split * run.accumulate
  uneven = [rows for rows, _ in ((run.batch, 0), *run.schedule.shapes()) if rows % parts]
  if uneven:
    raise ValueError(f'batch={uneven[0]} is not a multiple of {parts}: accumulate={run.accumulate} times the '
                     f'{split} parts of a batch on the mesh {sharding.mesh_text(mesh)}; choose '
                     f'{_multiples_near(uneven[0], parts)}, or another --mesh')


def _check_lengths(run: Run, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError where the mesh does not divide the positions of rows, also those of a stage."""
  split = sharding.parts('T', mesh)
  lengths = [('--length', run.data.length), ('source_length', run.data.source_length or split),
             *(('the length of a stage', length) for _, length in run.schedule.shapes())]
  for name, length in lengths:
    if length % split:
      raise ValueError(f'{name}={length} is not a multiple of {split}, the number of parts into which the mesh '
                       f'{sharding.mesh_text(mesh)} splits the positions of a row; choose '
                       f'{_multiples_near(length, split)}, or another --mesh')


def _multiples_near(size: int, parts: int) -> str:
  """Returns the multiples of `parts` below and above a size, in words."""
  return ' or '.join(str(multiple) for multiple in (size // parts * parts, -(-size // parts) * parts) if multiple)


def check_batch(run: Run, mesh: jax.sharding.Mesh, shape: tuple[int, int], batch: Batch) -> None:
  """Raises ValueError, which names the differences, where a feed gives other arrays than those of `abstract_batch`."""
  lines = differences(_arrays(abstract_batch(run, mesh, shape)), _arrays(batch))
  if lines:
    raise ValueError('the feed gives a batch of other arrays than the run expects; the objective says which columns '
                     'there are, the data the length of rows\n  ' + '\n  '.join(lines))


def _arrays(tree: Any) -> dict[str, str]:
  """Returns the dtype and the shape of each array of a tree, by its path."""
  return {jax.tree_util.keystr(path, simple=True, separator='.'): f'{x.dtype}{list(x.shape)}'
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def check_vocabulary(run: Run, data: OpenData) -> None:
  """Raises ValueError where the tokenizer has tokens that the model does not know.

  These are the tokens without logits; a model whose head gives scores, not logits, says how many it knows by `vocab`.
  """
  counts = []

  def count(constants, inputs):
    params = with_constants(run.model.init(jax.random.key(0)), constants)
    tokens = jnp.zeros((run.batch, sharding.parts('T')), jnp.int32)
    source = None if run.data.source_length is None else tokens
    outputs = run.model.apply(params, Batch(tokens, source=source, inputs=inputs))
    counts.append(sharding.vocabulary_of(outputs.head, outputs.hidden) or run.model.vocab)

  jax.eval_shape(count, abstract_constants(run), abstract_batch(run, jax.sharding.get_mesh()).inputs)
  vocab = counts[0]
  if data.tokenizer.vocab_size > vocab:
    raise ValueError(f'the tokenizer has {data.tokenizer.vocab_size} tokens, the model only {vocab}; '
                     'raise the vocabulary of the model')
