"""Checkpoints on Orbax: asynchronous, atomic, restored onto any mesh. Errors name what is damaged or does not fit.

The checkpoint of a step is a folder `<folder>/<step>`. It holds the arrays of the state, JSON facts about them
(position in the data, fingerprints, a description of the model), and checksums of the files of both. Only steps that
are neither among the last `keep` nor the best are ever deleted.
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

from lm.workdir import integrity, mismatch, rebuild
from lm.workdir.judge import Judge
from lm.workdir.mismatch import Mismatch

Tree = Any
# Sizes in bytes of a chunk of an array, and of a file of chunks. A file is assembled in memory before it is written. By
# default, Orbax writes files of 2 GB in chunks as large as a shard, which needs that much more memory and is slower.
CHUNK, FILE = 1 << 22, 1 << 24
_METRIC = 'metric.json'   # lies in the folder of a step that was evaluated after it was saved


class Restored(NamedTuple):
  state: Tree
  facts: dict
  step: int
  records: list   # the log records of the step


class Checkpoints:
  """The checkpoints of one run. As a context manager, it waits at its end for a save in progress.

  It keeps the last `keep` steps and, with `keep_best`, the one with the best metric, chosen among the steps that were
  saved with the judge `judged_by`, or with that of the newest step if it is None. Readers give `create=False`, which
  needs a folder that exists. Raises OSError if the folder cannot be made, written to, or found.
  """

  def __init__(self, folder: str | os.PathLike, keep: int = 3, keep_best: bool = True, create: bool = True,
               judged_by: Judge | None = None):
    import orbax.checkpoint as ocp  # here, not at the top, because it takes half a second
    from etils import epath
    if keep < 1:
      raise ValueError(f'keep={keep} is less than 1; at least the last checkpoint is kept')
    self.folder = epath.Path(folder).expanduser().resolve()
    if create:
      integrity.check_writable(self.folder)
    elif not self.folder.is_dir():
      raise FileNotFoundError(f'there is no folder of checkpoints {self.folder}; check the path')
    logging.get_absl_logger().addFilter(_is_relevant)
    self._ocp, self._keep, self._keep_best = ocp, keep, keep_best
    self._damaged: dict[int, str] = {}  # step: reason
    self._manager = ocp.CheckpointManager(
        self.folder, options=ocp.CheckpointManagerOptions(
            create=False, preservation_policy=self,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)),
        item_handlers={'state': ocp.PyTreeCheckpointHandler(), 'facts': ocp.JsonCheckpointHandler()})
    # JSON turns tuples into lists, as in the files of the steps.
    self._judged_by = judged_by and Judge(*json.loads(json.dumps(judged_by)))
    self._metrics: dict[int, tuple[float | None, Judge]] = {}
    for step in self.steps():
      try:
        document = self._read_facts(step)
        self._metrics[step] = document['metric'], Judge.of(document)
        metric_file = self.folder / str(step) / _METRIC
        if metric_file.exists():
          metric, *judge = json.loads(metric_file.read_text())   # older files have only the judge's objective
          self._metrics[step] = metric, Judge(*judge)
      except Exception:  # damage is reported when the step is read, not here
        self._metrics[step] = None, Judge()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def save(self, step: int, state: Tree, facts: Mapping, metric: float | None = None, records: Sequence = ()) -> None:
    """Starts to save a tree of arrays. They are copied before it returns, so `state` may be donated afterwards.

    The best step is chosen by `metric`; a step whose metric is None or not finite is never the best. `restore` returns
    the `records` of the step, JSON, with the state.
    Raises OSError if this save, or the one before it, cannot be written; earlier checkpoints stay intact.
    """
    metric = None if metric is None else float(metric)
    # JSON makes a copy, which later changes by the caller do not reach.
    judge = self._judged_by or Judge(facts.get('objective'))
    document = json.loads(json.dumps({'facts': facts, 'metric': metric, 'best': judge[1:], 'records': records}))
    self.wait()
    self._set_damaged_aside()
    last = max(self.steps(), default=-1)
    if step <= last:
      raise ValueError(f'step {step} cannot be saved after step {last} of {self.folder}: to go back, use a new folder')
    self._metrics[step], self._saving = (metric, Judge.of(document)), step
    ocp, chunks = self._ocp, jax.tree.map(lambda _: self._ocp.SaveArgs(chunk_byte_size=CHUNK), state)
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state, chunks, ocdbt_target_data_file_size=FILE),
                              facts=ocp.args.JsonSave(document))
    self._write(lambda: self._manager.save(step, args=args, force=True))

  def check_for_errors(self) -> None:
    """Raises OSError if an earlier save failed. It does not wait for a save in progress, so call it at every step."""
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits until the save in progress is on disk. Raises OSError if it failed."""
    self._write(self._manager.wait_until_finished)

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._manager.close()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def metric(self, step: int | None) -> float | None:
    """Returns the metric of a step; None if it has none."""
    return self._metrics.get(step, (None, None))[0]

  def set_metric(self, step: int, metric: float) -> None:
    """Sets the metric of a step that was saved without one."""
    judge = self._judged_by or Judge()
    self._metrics[step] = metric, judge
    if jax.process_index() == 0:
      self._write(lambda: (self.folder / str(step) / _METRIC).write_text(json.dumps([metric, *judge])))

  def best_step(self) -> int | None:
    """Returns the step with the best metric, the last one among equals; None if no step has a metric."""
    steps = self.steps()
    metrics = {step: self._metrics.get(step, (None, Judge())) for step in steps}
    judge = self._judged_by or (metrics[steps[-1]][1] if steps else Judge())
    return judge.best({step: metric for step, (metric, other) in metrics.items() if other == judge})

  def best_metric(self) -> float | None:
    """Returns the metric of the best step; None if no step has one."""
    return self.metric(self.best_step())

  def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
    """Implements Orbax's PreservationPolicy. Its own `BestN` cannot open a folder in which one metric is damaged."""
    del context
    steps = self.steps()
    preserved = {*steps[-self._keep:], self.best_step() if self._keep_best else None}
    return [checkpoint.step in preserved for checkpoint in checkpoints]

  def facts(self, step: int | None = None) -> dict | None:
    """Returns the facts of `step`, or of the newest step that can be read; None if there are no checkpoints."""
    document = self._newest_readable(step, self._read_facts)
    return document and document['facts']

  def restore(self, abstract_state: Tree, step: int | None = None) -> Restored | None:
    """Restores a state with the structure and shardings, on any mesh, of a tree of `jax.ShapeDtypeStruct`.

    Without `step`, it restores the newest step that is intact and whose parameters are finite, and logs a warning for
    each newer one that is not. Returns None if there are no checkpoints. Raises Mismatch if a leaf is missing or
    differs in shape or dtype (Orbax would cast it silently), OSError if the step does not exist or none can be read.
    """
    return self._newest_readable(step, functools.partial(self._read, abstract_state, False, None))

  def restore_params(self, abstract_params: Tree, step: int | None = None,
                     dtypes: Callable[[Any], Any] | None = None) -> Restored | None:
    """Restores only the state's field `params`, like `restore`; the optimizer's state is not read.

    `dtypes` maps the dtype in which an array is stored to that in which it is restored, in place of `abstract_params`.
    """
    restored = self.restore_parts({'params': abstract_params}, step, dtypes)
    return restored and restored._replace(state=restored.state['params'])

  def restore_parts(self, abstract_parts: Tree, step: int | None = None, dtypes: Callable[[Any], Any] | None = None
                    ) -> Restored | None:
    """Restores parts of the state, given as nested dicts by the names of its fields, down to complete trees."""
    return self._newest_readable(step, functools.partial(self._read, abstract_parts, True, dtypes))

  def _write_checksums(self) -> None:
    """Orbax calls this when the files of a step are written, before it renames the folder. An error fails the save."""
    unfinished = [*self.folder.glob(f'{self._saving}.orbax-checkpoint-tmp*')]
    for folder in unfinished or [self.folder / str(self._saving)]:   # some storage cannot rename: the name is final
      if jax.process_index() == 0:
        integrity.write_checksums(folder, ['state', 'facts'])

  def _check_checksums(self, step: int) -> None:
    """Raises ValueError if a file of a step has changed. Each process reads its share of the files."""
    share = slice(jax.process_index(), None, jax.process_count())
    names = integrity.changed(self.folder / str(step), share=share)
    # The sum over processes lets all of them fall back to an earlier step together.
    count = int(np.sum(multihost_utils.process_allgather(np.int32(len(names)))))
    if count:
      raise ValueError(f'{count} of its files are missing, or are not as they were written'
                       + ''.join(f', {name}' for name in names[:2]))

  def _read(self, abstract: Tree, partly: bool, dtypes: Callable[[Any], Any] | None, step: int) -> Restored:
    self._check_checksums(step)
    ocp, path, document = self._ocp, self.folder / str(step), self._read_facts(step)
    requested = _named(abstract)
    names = ('params.', *(name for name in requested if not name.startswith('params.'))) if partly else ('',)
    integrity.check_arrays(path / 'state', names)
    tree = self._manager.item_metadata(step).state.tree
    stored = {name: leaf for name, leaf in _named(tree).items() if name.startswith(names)}
    mismatch.check_arrays(path, stored, requested, with_dtypes=dtypes is None)
    if dtypes:
      abstract = jax.tree.map_with_path(lambda path, x: x.update(dtype=dtypes(stored[_name(path)].dtype)), abstract)
    template = abstract
    if partly:
      requested = _named(abstract)
      template = jax.tree.map_with_path(lambda path, _: requested.get(_name(path), ocp.PLACEHOLDER), tree)
    args = ocp.args.PyTreeRestore(template, ocp.checkpoint_utils.construct_restore_args(template))
    state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
    if partly:
      arrays = _named(state)
      state = jax.tree.map_with_path(lambda path, _: arrays[_name(path)], abstract)
    if not integrity.all_finite([leaf for name, leaf in _named(state).items() if name.startswith('params')]):
      raise ValueError('the norm of its parameters is not finite')
    return Restored(state, document['facts'], step, document.get('records', []))

  def _read_facts(self, step: int) -> dict:
    names = integrity.changed(self.folder / str(step), 'facts/')
    if names:
      raise ValueError(f'{", ".join(names)} is not as it was written')
    document = self._manager.restore(step, args=self._ocp.args.Composite(facts=self._ocp.args.JsonRestore())).facts
    if not isinstance(document, dict) or not document.keys() >= {'facts', 'metric'} or not isinstance(
        document['facts'], dict):
      raise ValueError('its facts are incomplete')
    rebuild.check_size(document)   # other code recurses through the facts
    return document

  def _newest_readable(self, step: int | None, read: Callable[[int], Any]) -> Any:
    """Returns `read(step)`; for None, of the newest step that can be read, or None if there are no checkpoints."""
    self.wait()
    steps = self.steps()
    if step is not None and step not in steps:
      raise FileNotFoundError(f'there is no step {step} in {self.folder}, which has {steps}; choose one of these')
    candidates = steps[::-1] if step is None else [step]
    for candidate in [n for n in candidates if n not in self._damaged]:
      try:
        return read(candidate)
      except (Mismatch, MemoryError, jax.errors.JaxRuntimeError):  # the files are intact
        raise
      except Exception as error:  # missing, truncated and garbled files raise errors of any type
        self._damaged[candidate] = integrity.reason(error)
        logging.warning('checkpoint %s is damaged: %s', self.folder / str(candidate), self._damaged[candidate])
    if candidates:
      raise OSError(f'no checkpoint in {self.folder} can be read: ' + '; '.join(
          f'step {n} is damaged: {self._damaged[n]}' for n in candidates) + ' (nothing was deleted)')
    return None

  def _set_damaged_aside(self) -> None:
    """Renames the folders of damaged steps, so that the run can save these steps again and resume from them."""
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
    except Exception as error:  # TensorStore raises ValueError for a full disk
      self._manager.reload()  # its list contains the failed step, and lacks the steps that it was about to delete
      raise OSError(f'a checkpoint could not be written to {self.folder}: {integrity.reason(error)} (the earlier '
                    'ones are intact)') from error


def stored_facts(folder: str | os.PathLike) -> dict | None:
  """Returns the facts of the newest readable checkpoint in a folder; None if there is none. It writes nothing."""
  if not os.path.isdir(folder):
    return None
  with Checkpoints(folder, create=False) as checkpoints:
    return checkpoints.facts()


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _named(tree: Tree) -> dict[str, Any]:
  """Returns {'params.w': leaf, ...} for a tree of arrays, or for Orbax's metadata of one."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_relevant(record: Any) -> bool:
  """Filters out what Orbax logs at every save, and its tracebacks of errors, which are raised too."""
  return '/orbax/' not in record.pathname or record.levelname == 'WARNING'
