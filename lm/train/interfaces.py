"""What the packages from `train` on know of a model, of data, and of what gives batches: these members, and no others.

`tests/interfaces_test.py` trains, generates and scores with objects that have exactly these members. What is known of a
tokenizer is `lm.data.tokenizers.Tokenizer`; a source is a `lm.data.text.source.Source`.
"""
import abc
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from lm.data.batch import Batch
from lm.data.batches import Batches
from lm.data.chat.conversation import Template
from lm.data.chat.messages import Messages
from lm.data.dataset import Check, unchecked
from lm.data.tokenizers import Tokenizer
from lm.objectives.objective import Objective


class OutputLike(Protocol):
  """What a model returns: `models.Output` is one, with `readings` of taps as well."""
  hidden: jax.Array                          # [B, T, D]
  head: Callable[[jax.Array], jax.Array]     # a pytree of its weights; hidden states [B, T, D] to float32 logits
  cache: Any                                 # the cache that was given, continued
  aux: Any                                   # what the blocks report, a `models.context.Aux`


class Model(Protocol):
  """What training needs."""
  max_length: float   # positions of a row; math.inf, or a large int, if there is no limit
  def init(self, key: jax.Array) -> Any: ...
  def apply(self, params: Any, batch: Batch, *, key: jax.Array | None = None, cache: Any = None) -> OutputLike: ...


@runtime_checkable
class Decoder(Model, Protocol):
  """What scoring and generation need as well; the methods are described at `models.LanguageModel` and `Transformer`.

  A cache is a pytree that `init_cache` makes and that `apply` takes and returns; nothing else looks into it. Each
  of its leaves is led by rows, and `insert` replaces some rows.
  """
  causal: bool                   # whether an output depends on its own and earlier tokens alone
  reads_source: bool             # whether a prompt is the source of an encoder, apart from the text that it writes
  vocab: int                     # logits per position
  depths: int                    # further tokens that it predicts at each position; speculation drafts with them
  original_context: int | None   # the length from which on the positions of all tokens are encoded differently
  def prompt(self, texts: Sequence[np.ndarray], rows: int, bos: int, eos: int, adds_bos: bool = True) -> Batch: ...
  def init_cache(self, batch_size: int, slots: int) -> Any: ...
  def insert(self, cache: Any, new: Any, rows: jax.Array) -> Any: ...
  def unstack(self, params: Any) -> Any: ...
  def with_dtype(self, dtype: Any) -> 'Decoder': ...


class OpenData(Protocol):
  """Data that can be read."""
  tokenizer: Tokenizer
  fingerprint: str
  stores: Mapping[str, Sequence[np.ndarray]]   # by split, the tokens of each document, without bos and eos
  validation_sets: tuple[str, ...]   # names of held-out sets that are evaluated too: the splits 'validation/NAME'
  def batches(self, split: str, objective: Objective, rows: int, seed: int | None = 0, repeat: bool = True
              ) -> Batches: ...


class Data(Protocol):
  """A data set before it is opened. Reading it touches no file, except for `text_fingerprint` and `questions`."""
  length: int                 # positions of a row
  source_length: int | None   # positions of a row of sources, for an encoder
  kind: type                  # what a record is, one of `batch.KINDS`
  columns: Mapping[str, tuple[Any, tuple[int, ...]]]   # dtype and shape, beyond [B, T], of what is stored with it
  inputs: Mapping[str, tuple[Any, tuple[int, ...]]]    # likewise, beyond [B], of what else a model reads of a row
  template: Template | None   # of chats; None: the records are no dialogues
  text_fingerprint: str       # of the documents after cleaning, whatever the tokenizer and the length are
  def questions(self, split: str, count: int) -> list[tuple[Messages, str]]: ...   # see `Dialogues.questions`
  def open(self, workdir: pathlib.Path, *, control: tuple[str, ...] = (), check: Check = unchecked) -> OpenData: ...
  def load_tokenizer(self, workdir: pathlib.Path) -> Tokenizer: ...
  def verify(self, workdir: pathlib.Path) -> list[str]: ...   # see `dataset.verify`


@dataclasses.dataclass(frozen=True)
class Constants:
  """Parameters that a loss reads and that training does not change: a teacher's, or the matrices under adapters.

  The model and the objective of a run get them as the entry `name` of the parameters. Checkpoints do not hold them;
  `load(model)` is called at each start.
  """
  name: str
  model: Model
  load: Callable[[Model], Any]


# `(params, step) -> metrics`. `Run.evaluators` has functions that make these: a run is built before its data is opened.
Evaluator = Callable[[Any, int], Mapping[str, float]]


class Feed(abc.ABC):
  """Gives the batch of each step. `Run.feed(run, data, mesh)` makes one; by default it is `feed.DataFeed`."""

  @abc.abstractmethod
  def __call__(self, step: int, state: Any) -> Batch:
    """Returns the batch of a step, on the mesh, with the arrays that `run.abstract_batch` says.

    It has to be a pure function of the seed of the run, `step`, which is how many steps were taken before, and
    `state.params`: a run that goes on from a checkpoint is then the same as one without a stop. `state` is the `State`
    before the step; its `params` include the constants of the run.
    """

  def steps(self, planned: int) -> int:
    """Returns for how many of the planned steps there are batches."""
    return planned

  def summary(self, steps: int) -> list[str]:
    """Returns lines that say what so many steps read."""
    del steps
    return []

  def close(self) -> None:
    """Ends what the feed does beside the loop. It is called once, when training ends."""
    return
