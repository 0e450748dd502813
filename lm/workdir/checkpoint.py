"""Checkpoints on Orbax: asynchronous, atomic, restored onto any mesh; what is damaged or does not fit is named.

A step is a folder `<folder>/<step>`: the arrays of the state, JSON facts about them (position in the data,
fingerprints, a description of the model), and checksums of the files of both. Nothing is ever deleted but the steps
that the last `keep` have outlived.
"""
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from lm.workdir import integrity, rebuild
from lm.workdir.describe import differences
from lm.workdir.judge import Judge

Tree = Any
# Bytes of a chunk of an array, and of a file of chunks. A file fills up in memory before it is written: Orbax's own are
# of 2 GB, in chunks as large as a shard, which takes as much memory again, and is slower to write and to read.
CHUNK, FILE = 1 << 22, 1 << 24
_METRIC = 'metric.json'   # in the folder of a step that was evaluated after it was saved


class Restored(NamedTuple):
  state: Tree
  facts: dict
  step: int
  records: list   # what was logged of the step


class Mismatch(ValueError):
  """The checkpoint is whole, but of another model, optimizer or data set."""


class Checkpoints:
  """The checkpoints of one run; as a context manager, it waits for the save under way.

  Keeps the last `keep` steps and, with `keep_best`, the one of the best metric. `create=False` is for readers: the
  folder has to exist. The best step is one of those that were saved with the same judge: `judged_by`, or, where that is
  None, the judge of the newest step. Raises OSError at once where the folder cannot be made, written to, or found.
  """

  def __init__(self, folder: str | os.PathLike, keep: int = 3, keep_best: bool = True, create: bool = True,
               judged_by: Judge | None = None):
    import orbax.checkpoint as ocp  # here, not at the top: it takes half a second
    from etils import epath
    if keep < 1:
      raise ValueError(f'keep={keep}: keep the last checkpoint at least')
    self.folder = epath.Path(folder).expanduser().resolve()
    if create:
      integrity.check_writable(self.folder)
    elif not self.folder.is_dir():
      raise FileNotFoundError(f'no checkpoints: there is no folder {self.folder}')
    logging.get_absl_logger().addFilter(_is_news)
    self._ocp, self._keep, self._keep_best = ocp, keep, keep_best
    self._damaged: dict[int, str] = {}  # step: why
    self._manager = ocp.CheckpointManager(
        self.folder, options=ocp.CheckpointManagerOptions(
            create=False, preservation_policy=self,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)),
        item_handlers={'state': ocp.PyTreeCheckpointHandler(), 'facts': ocp.JsonCheckpointHandler()})
    # As the files of steps will have it.
    self._judged_by = judged_by and Judge(*json.loads(json.dumps(judged_by)))
    self._metrics: dict[int, tuple[float | None, Judge]] = {}
    for step in self.steps():
      try:
        document = self._read_facts(step)
        self._metrics[step] = document['metric'], Judge.of(document)
        later = self.folder / str(step) / _METRIC
        if later.exists():
          metric, *judge = json.loads(later.read_text())   # of before runs named a metric, the objective alone
          self._metrics[step] = metric, Judge(*judge)
      except Exception:  # damage is told when the step is read, not here
        self._metrics[step] = None, Judge()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def save(self, step: int, state: Tree, facts: Mapping, metric: float | None = None, records: Sequence = ()) -> None:
    """Starts to save a tree of arrays; they are copied on return, so `state` may be donated.

    The `metric` is what the best step is chosen by; a step with None, or with a value that is not finite, is never the
    best. The `records` of the step, JSON, come back with the state.
    Raises OSError if this save, or the one before it, cannot be written: earlier checkpoints are intact.
    """
    metric = None if metric is None else float(metric)
    # A copy, which the caller cannot change.
    judge = self._judged_by or Judge(facts.get('objective'))
    document = json.loads(json.dumps({'facts': facts, 'metric': metric, 'best': judge[1:], 'records': records}))
    self.wait()
    self._set_damaged_aside()
    if (last := max(self.steps(), default=-1)) >= step:
      raise ValueError(f'step {step} cannot be saved after step {last} of {self.folder}: to go back, use a new folder')
    self._metrics[step], self._saving = (metric, Judge.of(document)), step
    ocp, chunks = self._ocp, jax.tree.map(lambda _: self._ocp.SaveArgs(chunk_byte_size=CHUNK), state)
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state, chunks, ocdbt_target_data_file_size=FILE),
                              facts=ocp.args.JsonSave(document))
    self._write(lambda: self._manager.save(step, args=args, force=True))

  def check_for_errors(self) -> None:
    """Raises OSError if an earlier save failed; does not wait for one under way. To be called every step."""
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when the save under way is on disk. Raises OSError if it failed."""
    self._write(self._manager.wait_until_finished)

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._manager.close()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def metric(self, step: int | None) -> float | None:
    """The metric of a step; None if it has none."""
    return self._metrics.get(step, (None, None))[0]

  def set_metric(self, step: int, metric: float) -> None:
    """Gives a step its metric where it was saved without one."""
    judge = self._judged_by or Judge()
    self._metrics[step] = metric, judge
    if jax.process_index() == 0:
      self._write(lambda: (self.folder / str(step) / _METRIC).write_text(json.dumps([metric, *judge])))

  def best_step(self) -> int | None:
    """The step of the best metric, the last among equals; None if none has a metric."""
    steps = self.steps()
    metrics = {step: self._metrics.get(step, (None, Judge())) for step in steps}
    judge = self._judged_by or (metrics[steps[-1]][1] if steps else Judge())
    return judge.best({step: metric for step, (metric, other) in metrics.items() if other == judge})

  def best_metric(self) -> float | None:
    """The metric of the best step; None if no step has one."""
    return self.metric(self.best_step())

  def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
    """Orbax's PreservationPolicy. With its own `BestN`, one damaged metrics file keeps the folder from opening."""
    del context
    steps = self.steps()
    kept = {*steps[-self._keep:], self.best_step() if self._keep_best else None}
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def facts(self, step: int | None = None) -> dict | None:
    """The facts of `step`, or of the newest that can be read; None if there are no checkpoints."""
    found = self._newest_readable(step, self._read_facts)
    return found and found['facts']

  def restore(self, abstract_state: Tree, step: int | None = None) -> Restored | None:
    """Reads into the structure and shardings, on any mesh, of `abstract_state`, a tree of `jax.ShapeDtypeStruct`.

    Without `step`: the newest that is whole and whose parameters are finite, with a warning naming the newer ones that
    are not; None if there are none.
    Raises Mismatch if a leaf is missing or differs in shape or dtype (Orbax casts without a word), OSError if `step`
    is not there, or nothing can be read.
    """
    return self._newest_readable(step, functools.partial(self._read, abstract_state, False, None))

  def restore_params(self, abstract_params: Tree, step: int | None = None,
                     dtypes: Callable[[Any], Any] | None = None) -> Restored | None:
    """Like `restore`, of the state's field `params` alone: the optimizer's state is not read.

    With `dtypes`, what it makes of the dtype that an array is stored in counts, not that of `abstract_params`.
    """
    found = self.restore_parts({'params': abstract_params}, step, dtypes)
    return found and found._replace(state=found.state['params'])

  def restore_parts(self, abstract_parts: Tree, step: int | None = None, dtypes: Callable[[Any], Any] | None = None
                    ) -> Restored | None:
    """Like `restore`, of some parts of the state: nested dicts, by the names of its fields, down to whole trees."""
    return self._newest_readable(step, functools.partial(self._read, abstract_parts, True, dtypes))

  def _write_checksums(self) -> None:
    """Called when the files of a step are written, before the folder gets its name; raises as the save does."""
    unfinished = [*self.folder.glob(f'{self._saving}.orbax-checkpoint-tmp*')]
    for folder in unfinished or [self.folder / str(self._saving)]:   # where folders cannot be renamed, it has its name
      if jax.process_index() == 0:
        integrity.write_checksums(folder, ['state', 'facts'])

  def _check_checksums(self, step: int) -> None:
    """Raises ValueError if a file of a step has changed; each process reads its share of the files."""
    share = slice(jax.process_index(), None, jax.process_count())
    names = integrity.changed(self.folder / str(step), share=share)
    count = int(np.sum(multihost_utils.process_allgather(np.int32(len(names)))))   # all processes fall back together
    if count:
      raise ValueError(f'{count} of its files are missing, or are not as they were written'
                       + ''.join(f', {name}' for name in names[:2]))

  def _read(self, abstract: Tree, partly: bool, dtypes: Callable[[Any], Any] | None, step: int) -> Restored:
    self._check_checksums(step)
    ocp, path, document = self._ocp, self.folder / str(step), self._read_facts(step)
    wanted = _named(abstract)
    names = ('params.', *(name for name in wanted if not name.startswith('params.'))) if partly else ('',)
    integrity.check_arrays(path / 'state', names)
    tree = self._manager.item_metadata(step).state.tree
    found = {name: leaf for name, leaf in _named(tree).items() if name.startswith(names)}
    lines = differences(*({name: f'{"" if dtypes else leaf.dtype}{list(leaf.shape)}' for name, leaf in leaves.items()}
                          for leaves in (found, wanted)))
    if lines and all(line.startswith('opt_state.') for line in lines):
      raise Mismatch(f'checkpoint {path} holds the state of another optimizer ({len(lines)} arrays differ): go on with '
                     'the same one, or start another run from its parameters (--init)')
    if lines:
      raise Mismatch(f'checkpoint {path} does not fit' + _listed(lines))
    if dtypes:
      abstract = jax.tree.map_with_path(lambda path, x: x.update(dtype=dtypes(found[_name(path)].dtype)), abstract)
    template = abstract
    if partly:
      wanted = _named(abstract)
      template = jax.tree.map_with_path(lambda path, _: wanted.get(_name(path), ocp.PLACEHOLDER), tree)
    args = ocp.args.PyTreeRestore(template, ocp.checkpoint_utils.construct_restore_args(template))
    state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
    if partly:
      arrays = _named(state)
      state = jax.tree.map_with_path(lambda path, _: arrays[_name(path)], abstract)
    if not integrity.all_finite([leaf for name, leaf in _named(state).items() if name.startswith('params')]):
      raise ValueError('the norm of its parameters is not finite')
    return Restored(state, document['facts'], step, document.get('records', []))

  def _read_facts(self, step: int) -> dict:
    if names := integrity.changed(self.folder / str(step), 'facts/'):
      raise ValueError(f'{", ".join(names)} is not as it was written')
    document = self._manager.restore(step, args=self._ocp.args.Composite(facts=self._ocp.args.JsonRestore())).facts
    if not isinstance(document, dict) or not document.keys() >= {'facts', 'metric'} or not isinstance(
        document['facts'], dict):
      raise ValueError('its facts are incomplete')
    rebuild.check_size(document)   # before anything walks through them
    return document

  def _newest_readable(self, step: int | None, read: Callable[[int], Any]) -> Any:
    self.wait()
    steps = self.steps()
    if step is not None and step not in steps:
      raise FileNotFoundError(f'no step {step} in {self.folder}, which has {steps}')
    tried = steps[::-1] if step is None else [step]
    for candidate in [n for n in tried if n not in self._damaged]:
      try:
        return read(candidate)
      except (Mismatch, MemoryError, jax.errors.JaxRuntimeError):  # the files are well
        raise
      except Exception as error:  # missing, truncated and garbled files show as errors of every type
        self._damaged[candidate] = integrity.reason(error)
        logging.warning('checkpoint %s is damaged: %s', self.folder / str(candidate), self._damaged[candidate])
    if tried:
      raise OSError(f'no checkpoint to read in {self.folder}: ' + '; '.join(
          f'step {n} is damaged: {self._damaged[n]}' for n in tried) + ' (nothing was deleted)')
    return None

  def _set_damaged_aside(self) -> None:
    """Renames damaged steps: the run comes to these steps again, and must resume from what it saves then."""
    if self._damaged:
      for step in self._damaged if jax.process_index() == 0 else ():
        aside = self.folder / f'{step}.damaged-{time.strftime("%Y%m%d-%H%M%S")}'
        self._write(functools.partial((self.folder / str(step)).rename, aside))
      self._ocp.multihost.sync_global_processes('lm.workdir.checkpoint: damaged steps set aside')
      self._damaged.clear()
      self._manager.reload()

  def _write(self, write: Callable[[], Any]) -> None:
    try:
      write()
    except Exception as error:  # a full disk is a ValueError of TensorStore
      self._manager.reload()  # its list has the failed step, and lacks those about to be deleted
      raise OSError(f'a checkpoint could not be written to {self.folder}: {integrity.reason(error)} (the earlier '
                    'ones are intact)') from error


def stored_facts(folder: str | os.PathLike) -> dict | None:
  """The facts of the newest checkpoint in a folder that can be read; None if there are none. Nothing is written."""
  if not os.path.isdir(folder):
    return None
  with Checkpoints(folder, create=False) as checkpoints:
    return checkpoints.facts()


def check(stored: Any, now: Any) -> None:
  """Raises Mismatch, with a line for each difference between two JSON trees."""
  if lines := differences(stored, now):
    meant = ', or go on all the same by --new_objective' if all(line.startswith('objective') for line in lines) else ''
    raise Mismatch(f'the checkpoint is of another run: go back to its settings, or use a new folder{meant}'
                   + _listed(lines))


def _listed(lines: Sequence[str], most: int = 6) -> str:
  more = [f'... and {len(lines) - most} more'] if len(lines) > most else []
  return '\n  '.join([':', *lines[:most], *more])


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _named(tree: Tree) -> dict[str, Any]:
  """{'params.w': leaf, ...} of a tree of arrays, or of Orbax's metadata of one."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_news(record: Any) -> bool:
  """Leaves out what Orbax logs of every save, and its traces of errors, which are raised as well."""
  return '/orbax/' not in record.pathname or record.levelname == 'WARNING'
