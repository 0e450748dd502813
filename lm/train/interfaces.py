"""The interfaces of models, data, feeds and evaluators. Packages from `train` on use these members and no others.

`tests/interfaces_test.py` trains, generates and scores with objects that have exactly these members. The interface of a
tokenizer is `lm.data.tokenizers.Tokenizer`, that of a source `lm.data.text.source.Source`.
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
  """The output of a model. `models.Output` also has the `readings` of taps."""
  hidden: jax.Array                          # [B, T, D]
  head: Callable[[jax.Array], jax.Array]     # from hidden states [B, T, D] to float32 logits; a pytree of its weights
  cache: Any                                 # the cache of the input, with these positions
  aux: Any                                   # a `models.context.Aux` with the reports of the blocks


class Model(Protocol):
  """A model that can be trained."""
  max_length: float   # the most positions of a row; math.inf, or a large int, for no limit
  def init(self, key: jax.Array) -> Any: ...
  def apply(self, params: Any, batch: Batch, *, key: jax.Array | None = None, cache: Any = None) -> OutputLike: ...


@runtime_checkable
class Decoder(Model, Protocol):
  """A model that can also score and generate text. `models.LanguageModel` and `Transformer` describe the methods.

  A cache is a pytree that `init_cache` makes and that `apply` takes and returns; only the model reads it. The first
  axis of each leaf is rows, some of which `insert` replaces.
  """
  causal: bool                   # whether an output depends only on tokens up to its own
  reads_source: bool             # whether a prompt is the source of an encoder, apart from the text that it writes
  vocab: int                     # the number of logits per position
  depths: int                    # the number of further tokens that it predicts, with which speculation drafts
  original_context: int | None   # in longer texts, the positions of all tokens are encoded differently
  def prompt(self, texts: Sequence[np.ndarray], rows: int, bos: int, eos: int, adds_bos: bool = True) -> Batch: ...
  def init_cache(self, batch_size: int, slots: int) -> Any: ...
  def insert(self, cache: Any, new: Any, rows: jax.Array) -> Any: ...
  def unstack(self, params: Any) -> Any: ...
  def with_dtype(self, dtype: Any) -> 'Decoder': ...


class OpenData(Protocol):
  """Data that has been opened."""
  tokenizer: Tokenizer
  fingerprint: str
  stores: Mapping[str, Sequence[np.ndarray]]   # by split, the tokens of each document, without bos and eos
  validation_sets: tuple[str, ...]   # names of further held-out sets, which are the splits 'validation/NAME'
  def batches(self, split: str, objective: Objective, rows: int, seed: int | None = 0, repeat: bool = True
              ) -> Batches: ...


class Data(Protocol):
  """A data set before it is opened. Only `text_fingerprint`, `questions` and the methods that open read files."""
  length: int                 # the number of positions of a row
  source_length: int | None   # that of a row of sources, for an encoder
  kind: type                  # the type of a record, one of `batch.KINDS`
  columns: Mapping[str, tuple[Any, tuple[int, ...]]]   # dtype, and shape after [B, T], of stored columns
  inputs: Mapping[str, tuple[Any, tuple[int, ...]]]    # dtype, and shape after [B], of other inputs of a model
  template: Template | None   # the chat template; None where the records are not dialogues
  text_fingerprint: str       # of the documents after cleaning, for any tokenizer and length
  def questions(self, split: str, count: int) -> list[tuple[Messages, str]]: ...   # see `Dialogues.questions`
  def open(self, workdir: pathlib.Path, *, control: tuple[str, ...] = (), check: Check = unchecked) -> OpenData: ...
  def load_tokenizer(self, workdir: pathlib.Path) -> Tokenizer: ...
  def verify(self, workdir: pathlib.Path) -> list[str]: ...   # see `dataset.verify`


@dataclasses.dataclass(frozen=True)
class Constants:
  """Parameters that training does not change, such as those of a teacher, or the matrices that adapters are added to.

  The model and the objective of a run get them as the entry `name` of the parameters. Checkpoints do not hold them:
  `load(model)` returns them at each start.
  """
  name: str
  model: Model
  load: Callable[[Model], Any]


# `(params, step) -> metrics`. `Run.evaluators` has functions that make these once the data of a run is opened. One that
# also has a method `metric_names()` declares the names of its metrics, so that `Run.best` is checked before training; a
# declared name that ends in / stands for all names that begin with it. One that reads files has a `fingerprint`, a hash
# of what they hold: an evaluation of the same parameters is done again only where it, or the settings, have changed.
Evaluator = Callable[[Any, int], Mapping[str, float]]


class Feed(abc.ABC):
  """Gives the batch of each step. `Run.feed(run, data, mesh)` makes one; by default it is `feed.DataFeed`."""

  @abc.abstractmethod
  def __call__(self, step: int, state: Any) -> Batch:
    """Returns the batch of a step on the mesh, with the arrays of `run.abstract_batch`.

    It has to be a pure function of the seed of the run, of `step` and of `state.params`, so that a run that continues
    from a checkpoint equals one without a stop. `step` is the number of steps before this one. `state` is the `State`
    before the step, with the constants of the run among its `params`.
    """

  def steps(self, planned: int) -> int:
    """Returns the number of planned steps that there are batches for."""
    return planned

  def summary(self, steps: int) -> list[str]:
    """Returns lines on what the first `steps` steps read."""
    del steps
    return []

  def close(self) -> None:
    """Ends the threads of the feed. It is called once, when training ends."""
    return
