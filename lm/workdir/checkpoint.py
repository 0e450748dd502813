"""Checkpoints on Orbax: asynchronous, atomic, restored onto any mesh. Errors name what is damaged or does not fit.

The checkpoint of a step is a folder `<folder>/<step>`. It holds the parameters (`params`), the other arrays of the
state (`state`), JSON facts about them (`facts`: position in the data, fingerprints, a description of the model), and
checksums of the files of all three. Steps among the last `keep`, the best and permanent ones are never deleted.
"""
import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from lm import paths
from lm.sharding import hosts
from lm.workdir import arrays, integrity, mismatch, rebuild
from lm.workdir.judge import Judge, Metrics, metric_from_json, metric_to_json
from lm.workdir.mismatch import Mismatch
from lm.workdir.storage import Storage

Tree = Any
_METRIC = 'metric.json'   # lies in the folder of a step that was evaluated after it was saved
_ATTEMPTS = 2   # reads of a step before it counts as damaged, because some file systems fail now and then


class Restored(NamedTuple):
  state: Tree
  facts: dict
  step: int
  records: list   # the log records of the step


class Checkpoints:
  """The checkpoints of one run. As a context manager, it waits at its end for a save in progress.

  It keeps the last `keep` steps, those that were saved as permanent and, with `keep_best`, the one with the best
  metric, chosen among the steps that were saved with the judge `judged_by`, or with that of the newest step if it is
  None. Readers give `create=False`, which needs a folder that exists. Raises OSError if the folder cannot be made,
  written to, or found.
  """

  def __init__(self, folder: str | os.PathLike, keep: int = 3, keep_best: bool = True, create: bool = True,
               judged_by: Judge | None = None):
    from etils import epath  # here, not at the top, because it takes long
    if keep < 1:
      raise ValueError(f'keep={keep} is less than 1; at least the last checkpoint is kept')
    self.folder = epath.Path(paths.local(folder)).resolve()
    if create:
      integrity.check_writable(self.folder)
    elif not self.folder.is_dir():
      raise FileNotFoundError(f'there is no folder of checkpoints {self.folder}; check the path')
    self._keep, self._keep_best = keep, keep_best
    self._damaged: dict[int, str] = {}  # step: reason
    self._storage = Storage(self.folder, self._preserved, only_reads=not create)
    # JSON turns tuples into lists, as in the files of the steps.
    self._metrics = Metrics(judged_by and Judge(*json.loads(json.dumps(judged_by))))
    self._permanent: set[int] = set()
    for step in self.steps():
      try:
        document = self._read_facts(step)
        if document.get('permanent'):
          self._permanent.add(step)
        self._metrics.by_step[step] = document['metric'], Judge.of(document)
        metric_file = self.folder / str(step) / _METRIC
        if metric_file.exists():
          self._metrics.by_step[step] = metric_from_json(metric_file.read_text())
      except Exception:  # damage is reported when the step is read, not here
        self._metrics.by_step[step] = None, Judge()
        self._permanent.add(step)   # it may be one

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def save(self, step: int, state: Tree, facts: Mapping, metric: float | None = None, records: Sequence = (),
           permanent: bool = False) -> None:
    """Starts to save a tree of arrays. They are copied before it returns, so `state` may be donated afterwards.

    The best step is chosen by `metric`; a step whose metric is None or not finite is never the best. `restore` returns
    the `records` of the step, JSON, with the state. A `permanent` step is never deleted.
    Raises OSError if this save, or the one before it, cannot be written; earlier checkpoints stay intact.
    """
    metric = None if metric is None else float(metric)
    judge = self._metrics.judged_by or Judge(facts.get('objective'))
    parts = arrays.parts(state)
    # JSON makes a copy, which later changes by the caller do not reach.
    document = json.loads(json.dumps({'facts': facts, 'metric': metric, 'best': judge[1:], 'records': records,
                                      'parts': [*parts], 'permanent': permanent}))
    self.wait()
    self._set_damaged_aside()
    last = max(self.steps(), default=-1)
    if step <= last:
      raise ValueError(f'step {step} cannot be saved after step {last} of {self.folder}: to go back, use a new folder')
    self._metrics.by_step[step] = metric, Judge.of(document)
    if permanent:
      self._permanent.add(step)
    self._storage.save(step, parts, document)

  def check_for_errors(self) -> bool:
    """Returns whether no save is in progress, for which it does not wait.

    Raises OSError if an earlier save failed. In a cluster, all processes call it, and it does the same in all.
    """
    if any(hosts.from_all(self._storage.is_saving())):
      return False
    self.wait()
    return True

  def is_finished(self) -> bool:
    """Returns whether no save is in progress; it may have failed."""
    return not self._storage.is_saving()

  def wait(self, alone: bool = False) -> None:
    """Waits until the save in progress is on disk. Raises OSError if it failed.

    In a cluster, all processes call it, and raise the error of any of them; with `alone`, this process does not wait
    for the others to call it, and does not know of their errors.
    """
    self._storage.wait(alone)

  def close(self) -> None:
    try:
      self.wait(alone=True)
    finally:
      self._storage.close()

  def steps(self) -> list[int]:
    return self._storage.steps()

  def steps_of_all(self) -> list[int]:
    """Returns the steps that all processes of a cluster see. All call it. Raises OSError where they share none."""
    steps = hosts.from_all(self.steps())
    common = sorted(set.intersection(*map(set, steps)))
    if any(steps) and not common:
      raise OSError(f'no checkpoint in {self.folder} is seen by all processes, which see {steps}, in their order; '
                    'give a folder on a disk that all of them share')
    return common

  def metric(self, step: int | None) -> float | None:
    """Returns the metric of a step; None if it has none."""
    return self._metrics.of(step)

  def set_metric(self, step: int, metric: float) -> None:
    """Sets the metric of a step that was saved without one."""
    self._metrics.by_step[step] = metric, self._metrics.judged_by or Judge()
    if jax.process_index() == 0:
      text = metric_to_json(*self._metrics.by_step[step])
      self._storage.write(lambda: (self.folder / str(step) / _METRIC).write_text(text), alone=True)

  def best_step(self) -> int | None:
    """Returns the step with the best metric, the last one among equals; None if no step has a metric."""
    return self._metrics.best_step(self.steps())

  def best_metric(self) -> float | None:
    """Returns the metric of the best step; None if no step has one."""
    return self.metric(self.best_step())

  def _preserved(self) -> set[int]:
    steps = self.steps()
    return {*steps[-self._keep:], self.best_step() if self._keep_best else None, *self._permanent}

  def facts(self, step: int | None = None) -> dict | None:
    """Returns the facts of `step`, or of the newest step that can be read; None if there are no checkpoints."""
    document = self._newest_readable(step, self.steps(), self._read_facts)
    return document and document['facts']

  def restore(self, abstract_state: Tree, step: int | None = None) -> Restored | None:
    """Restores a state with the structure and shardings, on any mesh, of a tree of `jax.ShapeDtypeStruct`.

    Without `step`, it restores the newest step that is intact and whose parameters are finite, and logs a warning for
    each newer one that is not. Returns None if there are no checkpoints. Raises Mismatch if a leaf is missing or
    differs in shape or dtype (Orbax would cast it silently), OSError if the step does not exist or none can be read.
    """
    return self._newest_readable(step, self.steps_of_all(), functools.partial(self._read, abstract_state, False, None))

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
    return self._newest_readable(step, self.steps_of_all(), functools.partial(self._read, abstract_parts, True, dtypes))

  def _check(self, names: tuple[str, ...], step: int) -> tuple[dict, dict[str, Tree]]:
    """Checks the files of the arrays whose names begin with one of `names`. Returns facts, and the metadata by part.

    Each process reads its share of the files; an error of any process is raised in all, so that all of them fall back
    to an earlier step together. Raises ValueError.
    """
    document, metadata, problem = {}, {}, ''
    try:
      document, path = self._read_facts(step), self.folder / str(step)
      # Checkpoints of earlier versions have the parameters among the other arrays.
      parts = [part for part in document['parts'] if arrays.may_hold(part, names)] if 'parts' in document else ['state']
      share = slice(jax.process_index(), None, jax.process_count())
      changed = integrity.changed(path, tuple(f'{part}/' for part in parts), share)
      if changed:
        problem = f'{len(changed)} of its files are missing, or are not as they were written, {", ".join(changed[:2])}'
      else:
        for part in parts:
          integrity.check_arrays(path / part, names)
          metadata[part] = self._storage.metadata(step, part)
    except MemoryError:   # the files are intact
      raise
    except Exception as error:   # missing, truncated and garbled files raise errors of any type
      problem = integrity.reason(error)
    _raise_in_all(problem)
    return document, metadata

  def _read(self, abstract: Tree, partly: bool, dtypes: Callable[[Any], Any] | None, step: int) -> Restored:
    path, requested = self.folder / str(step), arrays.named(abstract)
    names = ('params.', *(name for name in requested if not name.startswith('params.'))) if partly else ('',)
    document, metadata = self._check(names, step)
    stored = {name: leaf for tree in metadata.values() for name, leaf in arrays.named(tree).items()
              if name.startswith(names)}
    mismatch.check_arrays(path, stored, requested, with_dtypes=dtypes is None)
    if dtypes:
      abstract = jax.tree.map_with_path(lambda path, x: x.update(dtype=dtypes(stored[arrays.name(path)].dtype)),
                                        abstract)
    leaves, problem = {}, ''
    try:
      leaves = self._storage.restore(step, metadata, arrays.named(abstract))
    except (MemoryError, jax.errors.JaxRuntimeError):   # the files are intact
      raise
    except Exception as error:
      problem = integrity.reason(error)
    _raise_in_all(problem)
    if not integrity.all_finite([leaf for name, leaf in leaves.items() if name.startswith('params')]):
      raise ValueError('the norm of its parameters is not finite')
    state = jax.tree.map_with_path(lambda path, _: leaves[arrays.name(path)], abstract)
    return Restored(state, document['facts'], step, document.get('records', []))

  def _read_facts(self, step: int) -> dict:
    names = integrity.changed(self.folder / str(step), ('facts/',))
    if names:
      raise ValueError(f'{", ".join(names)} is not as it was written')
    document = self._storage.document(step)
    if not isinstance(document, dict) or not document.keys() >= {'facts', 'metric'} or not isinstance(
        document['facts'], dict):
      raise ValueError('its facts are incomplete')
    rebuild.check_size(document)   # other code recurses through the facts
    return document

  def _newest_readable(self, step: int | None, steps: Sequence[int], read: Callable[[int], Any]) -> Any:
    """Returns `read(step)`; for None, of the newest of `steps` that can be read, or None if there are no steps."""
    self.wait(alone=True)
    if step is not None and step not in steps:
      raise FileNotFoundError(f'there is no step {step} in {self.folder}, which has {steps}; choose one of these')
    candidates = steps[::-1] if step is None else [step]
    for candidate in [n for n in candidates if n not in self._damaged]:
      for _ in range(_ATTEMPTS):
        try:
          return read(candidate)
        except (Mismatch, MemoryError, jax.errors.JaxRuntimeError):  # the files are intact
          raise
        except Exception as error:  # missing, truncated and garbled files raise errors of any type
          problem = integrity.reason(error)
      self._damaged[candidate] = problem
      logging.warning('checkpoint %s is damaged: %s', self.folder / str(candidate), problem)
    if candidates:
      raise OSError(f'no checkpoint in {self.folder} can be read: ' + '; '.join(
          f'step {n} is damaged: {self._damaged[n]}' for n in candidates) + ' (nothing was deleted); restore '
                    'its files from a copy, or train anew in another workdir')
    return None

  def _set_damaged_aside(self) -> None:
    """Renames the folders of damaged steps, so that the run can save these steps again and resume from them."""
    for step in self._damaged:
      names = (f'{step}.damaged-{i}' for i in itertools.count(1))
      self._storage.set_aside(step, next(name for name in names if not (self.folder / name).exists()))
    self._damaged.clear()


def _raise_in_all(problem: str) -> None:
  """Raises ValueError in all processes where one has a problem, so that all go on to another step together."""
  problems = [text for text in hosts.from_all(problem) if text]
  if problems:
    raise ValueError(problems[0])


def stored_facts(folder: str | os.PathLike) -> dict | None:
  """Returns the facts of the newest readable checkpoint in a folder; None if there is none. It writes nothing."""
  if not os.path.isdir(folder):
    return None
  with Checkpoints(folder, create=False) as checkpoints:
    return checkpoints.facts()
