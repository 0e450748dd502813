"""Steps of a run as folders that Orbax writes in the background, with checksums.

A step appears under its name when all of its files are written. Until then its folder has another name, or, on storage
that cannot rename folders, it lacks the file `commit_success.txt`.
"""
import contextlib
import re
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
_UNFINISHED = re.compile(r'\d+\.orbax-checkpoint-tmp.*')


class Storage:
  """A folder of steps. After a save that failed, the steps before are as they were, and the next save starts anew.

  When a step is written, those that `preserved()` does not name are deleted.

  All processes of a cluster open a folder to write to it, and wait for one another. A process that only reads waits for
  no other, since each may see at another moment that the folder exists.
  """

  def __init__(self, folder: Any, preserved: Callable[[], set[int]], only_reads: bool = False):
    import orbax.checkpoint as ocp  # here, not at the top, because it takes half a second
    logging.get_absl_logger().addFilter(_is_relevant)
    self.folder, self._preserved, self._only_reads, self._ocp = folder, preserved, only_reads, ocp
    self._manager = self._open()

  def _open(self) -> Any:
    ocp = self._ocp
    # Barriers of processes that are named go through JAX's coordination service, and not through the devices. Those of
    # a single one are left out.
    processes = {jax.process_index()} if self._only_reads else set(range(jax.process_count()))
    return ocp.CheckpointManager(
        self.folder, options=ocp.CheckpointManagerOptions(
            create=False, preservation_policy=self,
            multiprocessing_options=ocp.options.MultiprocessingOptions(min(processes), processes),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)),
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

    def start():
      self._remove_unfinished()
      self._manager.save(step, args=args, force=True)
    self.write(start)

  def is_saving(self) -> bool:
    return self._manager.is_saving_in_progress()

  def wait(self) -> None:
    """Waits until the save in progress is on disk. Raises OSError if it failed."""
    self.write(self._manager.wait_until_finished)

  def close(self) -> None:
    """Ends the threads of Orbax, after `wait`."""
    self._manager.close()

  def write(self, write: Callable[[], Any]) -> None:
    """Calls a function that writes into the folder. Raises OSError where it fails, whatever the type of its error."""
    try:
      write()
    except Exception as error:  # TensorStore raises ValueError for a full disk
      if jax.process_count() == 1:   # in a cluster the error ends the process, and nothing may wait for the others
        # The manager lists the failed step, lacks those that it was about to delete, and says that a save is going on.
        with contextlib.suppress(Exception):
          self._manager.close()
        with contextlib.suppress(OSError):   # the folder cannot be listed either: the next save tries again
          self._manager = self._open()
      raise OSError(f'a checkpoint could not be written to {self.folder}: {integrity.reason(error)} (the earlier '
                    'ones are intact)') from error

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
    return self._manager.restore(step, args=self._ocp.args.Composite(facts=self._ocp.args.JsonRestore())).facts

  def metadata(self, step: int, part: str) -> Tree:
    """Returns a part of a state with the shape and dtype of each array in its place."""
    return self._ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / part).tree

  def restore(self, step: int, metadata: Mapping[str, Tree], requested: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads the arrays that are `requested` by name, as `jax.ShapeDtypeStruct` with shardings, and no others."""
    ocp, items = self._ocp, {}
    for part, tree in metadata.items():
      template = jax.tree.map_with_path(lambda path, _: requested.get(arrays.name(path), ocp.PLACEHOLDER), tree)
      items[part] = ocp.args.PyTreeRestore(template, ocp.checkpoint_utils.construct_restore_args(template))
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return {name: leaf for part in items for name, leaf in arrays.named(restored[part]).items()}

  def _write_checksums(self) -> None:
    """Orbax calls this when the files of a step are written, before it renames the folder. An error fails the save."""
    step, parts = self._saving
    unfinished = [*self.folder.glob(f'{step}.orbax-checkpoint-tmp*')]
    for folder in unfinished or [self.folder / str(step)]:   # some storage cannot rename: the name is final
      if jax.process_index() == 0:
        integrity.write_checksums(folder, parts)

  def _remove_unfinished(self) -> None:
    """Removes the folders of saves that a kill or an error ended, so that they do not fill the disk.

    Their names, which end in `.orbax-checkpoint-tmp`, show that they are unfinished. Where storage cannot rename
    folders, a step without the file `commit_success.txt` may be the copy of a finished one: such folders stay.
    """
    if jax.process_index() == 0:
      for folder in self.folder.iterdir():
        if _UNFINISHED.fullmatch(folder.name):
          with contextlib.suppress(OSError):   # what a thread of a failed save still writes, the next save removes
            folder.rmtree()


def _is_relevant(record: Any) -> bool:
  """Filters out what Orbax logs at every save, and its tracebacks of errors, which are raised too."""
  return '/orbax/' not in record.pathname or record.levelname == 'WARNING'
