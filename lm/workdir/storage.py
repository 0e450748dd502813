"""Steps of a run as folders that Orbax writes in the background, with checksums.

A step appears under its name when all of its files are written. Until then its folder has another name, or, on storage
that cannot rename folders, it lacks the file `commit_success.txt`.
"""
import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from lm.sharding import hosts
from lm.workdir import arrays, integrity

Tree = Any
# Sizes in bytes of a chunk of an array, and of a file of chunks. A file is assembled in memory before it is written. By
# default, Orbax writes files of 2 GB in chunks as large as a shard, which needs that much more memory and is slower.
CHUNK, FILE = 1 << 22, 1 << 24
_END = 'set_value'   # is in the names of the points of a save to which a process comes that failed
_saves = itertools.count(1)   # numbers them: all processes start the same saves
_UNFINISHED = re.compile(r'\d+\.orbax-checkpoint-tmp.*')


class Storage:
  """A folder of steps. After a save that failed, the steps before are as they were, and the next save starts anew.

  When a step is written, those that `preserved()` does not name are deleted.

  All processes of a cluster open a folder to write to it, and wait for one another. A save that fails in one of them
  fails in all. A process that only reads waits for no other, since each may see at another moment that the folder
  exists.
  """

  def __init__(self, folder: Any, preserved: Callable[[], set[int]], only_reads: bool = False):
    import orbax.checkpoint as ocp  # here, not at the top, because it takes half a second
    logging.get_absl_logger().addFilter(_is_relevant)
    _hide_abandoned_writes()
    self.folder, self._preserved, self._only_reads, self._ocp = folder, preserved, only_reads, ocp
    self._points = hosts.Channel('saves/0')   # of a save, see `_meet`
    self._manager = self._open()

  def _open(self) -> Any:
    ocp = self._ocp
    # Barriers of processes that are named go through JAX's coordination service, and not through the devices. Those of
    # a single one are left out.
    processes = {jax.process_index()} if self._only_reads else set(range(jax.process_count()))
    return ocp.CheckpointManager(
        self.folder, options=ocp.CheckpointManagerOptions(
            create=False, preservation_policy=self, save_root_metadata=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(min(processes), processes),
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._meet,
                                           post_finalization_callback=self._write_checksums)),
        item_handlers={**{part: ocp.PyTreeCheckpointHandler() for part in arrays.PARTS},
                       'facts': ocp.JsonCheckpointHandler()})

  def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
    """Implements Orbax's PreservationPolicy. Its own `BestN` cannot open a folder in which one metric is damaged."""
    del context
    preserved = self._preserved()
    return [checkpoint.step in preserved for checkpoint in checkpoints]

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, step: int, parts: Mapping[str, Tree], document: Mapping) -> None:
    """Starts to save the parts of a state (see `arrays.parts`), and a JSON document.

    The arrays are copied before it returns. No other save may be in progress. Raises OSError.
    """
    self._saving, ocp = (step, [*parts, 'facts']), self._ocp
    items = {part: ocp.args.PyTreeSave(tree, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), tree),
                                       ocdbt_target_data_file_size=FILE) for part, tree in parts.items()}
    args = ocp.args.Composite(facts=ocp.args.JsonSave(document), **items)

    self.write(self._prepare)
    self._points.close()
    self._points = hosts.Channel(f'saves/{next(_saves)}')
    self.write(lambda: self._manager.save(step, args=args, force=True))

  def is_saving(self) -> bool:
    return self._manager.is_saving_in_progress()

  def wait(self, alone: bool = False) -> None:
    """Waits until the save in progress is on disk. Raises OSError like `write` if it failed."""
    self.write(self._manager.wait_until_finished, alone)

  def close(self) -> None:
    """Ends the threads of Orbax, after `wait`."""
    self._manager.close()

  def write(self, write: Callable[[], Any], alone: bool = False) -> None:
    """Calls a function that writes into the folder. Raises OSError where it fails, whatever the type of its error.

    All processes of a cluster call it, and where it fails in one of them, all raise the error; with `alone`, a process
    does not ask the others.
    """
    problem, cause = '', None
    try:
      write()
    except Exception as error:  # TensorStore raises ValueError for a full disk
      problem, cause = integrity.reason(error), error
    problems = [problem] if alone else hosts.from_all(problem)
    if any(problems):
      if not alone or jax.process_count() == 1:   # the others could not do the same
        self._open_anew()
      reasons = '; '.join(dict.fromkeys(filter(None, problems)))   # each once
      raise OSError(f'a checkpoint could not be written to {self.folder}: {reasons} (the earlier ones are intact)'
                    ) from cause

  def _open_anew(self) -> None:
    """Replaces Orbax's manager after a save that failed, and removes what it has written, which may fill the disk.

    The manager lists the failed step, lacks those that it was about to delete, and says that a save is going on.
    """
    with contextlib.suppress(Exception):
      self._manager.close()
    with contextlib.suppress(OSError):
      self._remove_unfinished()
    with contextlib.suppress(OSError):   # the folder cannot be listed either: the next save tries again
      self._manager = self._open()

  def _meet(self, key: str, timeout_ms: int) -> None:
    """Waits until all processes come to the same point of a save; Orbax calls it in place of its own barrier.

    A process whose part of the save failed goes on to the end, where it waits. The others, which come to an earlier
    point, learn from this that it failed: they fail too, and go to the end, so that no process waits for files that
    will not come, and no step gets its name without them.
    """
    del timeout_ms   # a process that is lost is noticed by its heartbeat, and a slow one is waited for
    while True:
      points = self._points.from_all(key)
      if set(points) == {key}:
        return
      if _END not in key:
        failed = [str(process) for process, point in enumerate(points) if point != key]
        raise OSError(f'process {" and ".join(failed)} could not write its part')

  def set_aside(self, step: int, name: str) -> None:
    """Renames the folder of a damaged step in process 0. All processes call it; where it fails, all raise OSError."""
    problem = ''
    if jax.process_index() == 0:
      try:
        (self.folder / str(step)).rename(self.folder / name)
      except OSError as error:
        problem = integrity.reason(error)
    problem = hosts.from_process_0(problem)
    if problem:
      raise OSError(f'the damaged checkpoint of step {step} in {self.folder} cannot be renamed to {name}: {problem}; '
                    'make the folder writable')
    self._manager.reload()

  def document(self, step: int) -> Any:
    """Reads the JSON document of a step."""
    return self._ocp.JsonCheckpointHandler().restore(self.folder / str(step) / 'facts',
                                                     args=self._ocp.args.JsonRestore())

  def metadata(self, step: int, part: str) -> Tree:
    """Returns a part of a state with the shape and dtype of each array in its place."""
    return self._ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / part).tree

  def restore(self, step: int, metadata: Mapping[str, Tree], requested: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads the arrays that are `requested` by name, as `jax.ShapeDtypeStruct` with shardings, and no others.

    Unlike a restore by Orbax's manager, it waits for no other process, which may have failed to read.
    """
    ocp, leaves = self._ocp, {}
    for part, tree in metadata.items():
      template = jax.tree.map_with_path(lambda path, _: requested.get(arrays.name(path), ocp.PLACEHOLDER), tree)
      restored = ocp.PyTreeCheckpointHandler().restore(self.folder / str(step) / part, args=ocp.args.PyTreeRestore(
          template, ocp.checkpoint_utils.construct_restore_args(template)))
      leaves |= arrays.named(restored)
    return leaves

  def _write_checksums(self) -> None:
    """Orbax calls this when the files of a step are written, before it renames the folder. An error fails the save."""
    step, parts = self._saving
    unfinished = [*self.folder.glob(f'{step}.orbax-checkpoint-tmp*')]
    for folder in unfinished or [self.folder / str(step)]:   # some storage cannot rename: the name is final
      if jax.process_index() == 0:
        integrity.write_checksums(folder, parts)

  def _prepare(self) -> None:
    """Makes the folder ready for a save. Raises OSError where it cannot be written to."""
    self._remove_unfinished()
    if jax.process_index() == 0 and jax.process_count() > 1:
      integrity.check_writable(self.folder)   # the others would wait for minutes for a folder that cannot be made

  def _remove_unfinished(self) -> None:
    """Removes the folders of saves that a kill or an error ended, so that they do not fill the disk.

    Their names, which end in `.orbax-checkpoint-tmp`, show that they are unfinished. Where storage cannot rename
    folders, a step without the file `commit_success.txt` may be the copy of a finished one: such folders stay.
    """
    if jax.process_index() > 0:
      return
    for folder in self.folder.iterdir():
      if _UNFINISHED.fullmatch(folder.name):
        with contextlib.suppress(OSError):   # what a thread of a failed save still writes, the next save removes
          folder.rmtree()


def _is_relevant(record: Any) -> bool:
  """Filters out what Orbax logs at every save, and its tracebacks of errors, which are raised too."""
  return '/orbax/' not in record.pathname or record.levelname == 'WARNING'


def _hide_abandoned_writes() -> None:
  """Hides what Python prints of the writes that a failed save abandons: a traceback for each, hundreds on a full disk.

  Orbax closes its event loop at the first error, which `Storage.write` raises. TensorStore tries to tell the closed
  loop of each further write that ends.
  """
  former = sys.unraisablehook

  def hook(args):
    if args.object is not None or str(args.exc_value) != 'Event loop is closed':
      former(args)

  if getattr(former, '__qualname__', '') != hook.__qualname__:
    sys.unraisablehook = hook
