"""What training knows of a model and of data: no more than this."""
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from lm.data.batch import Batch, Batches
from lm.data.dataset import Check, unchecked
from lm.objectives.objective import Objective


class Model(Protocol):
  def init(self, key: jax.Array) -> Any: ...
  def apply(self, params: Any, batch: Batch, *, key: jax.Array | None = None, cache: Any = None) -> Any: ...


class OpenData(Protocol):
  """Data that is ready to be read."""
  tokenizer: Any
  fingerprint: str
  def batches(self, split: str, objective: Objective, rows: int, seed: int | None = 0, repeat: bool = True
              ) -> Batches: ...


class Data(Protocol):
  length: int                 # of a row
  source_length: int | None   # of a row of sources, for an encoder
  kind: type                  # what it holds, of `batches.KINDS`
  columns: Mapping[str, tuple[Any, tuple[int, ...]]]   # dtype and shape, beyond [B, T], of what is stored with it
  def open(self, workdir: pathlib.Path, *, control: tuple[str, ...] = (), check: Check = unchecked) -> OpenData: ...
  def load_tokenizer(self, workdir: pathlib.Path) -> Any: ...
  def verify(self, workdir: pathlib.Path) -> list[str]: ...   # see `dataset.verify`


@dataclasses.dataclass(frozen=True)
class Constants:
  """Parameters that a loss reads and training leaves alone: a teacher's, or those that lie under adapters.

  They are the entry `name` of the parameters that the model and the objective of a run are given; no checkpoint has
  them, so `load(model)` is asked at each start.
  """
  name: str
  model: Model
  load: Callable[[Model], Any]
