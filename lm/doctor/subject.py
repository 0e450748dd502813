"""The run that is examined, and what several probes read of it: small batches, and one forward and one backward pass.

Each program is compiled once, and run on a few short rows. Parameters are shaken before most of them: a weight that
starts at zero, such as an adapter's, would hide whatever lies behind it.
"""
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import optax

from lm import lora, seeds, sharding, train
from lm.data.batch import Batch, Special, special
from lm.data.batches import Batches
from lm.doctor import trained_labels
from lm.doctor.findings import DoesNotApply
from lm.doctor.small_batch import small_batch, text_tokens
from lm.objectives.objective import target_log_probabilities
from lm.optim import groups

LENGTH = 64   # positions of a short row
ROWS = 12     # of the batch with one change a row


def compiled_fast(function: Callable[..., Any]) -> Any:
  """Returns `jax.jit(function)` for a program that runs once, which takes longer to optimise than to run on a CPU."""
  return jax.jit(function, compiler_options=_fast_options())


@functools.cache
def _fast_options() -> dict[str, Any] | None:
  """Returns compiler options with which programs for a CPU compile in a third of the time."""
  if sharding.platform() != 'cpu':
    return None
  options = {'xla_backend_optimization_level': 0}
  if tuple(map(int, jaxlib.version.__version__.split('.')[:2])) < (0, 11):   # later versions have no other emitters
    options['xla_cpu_use_fusion_emitters'] = False
  return options


@dataclasses.dataclass(frozen=True)
class Quiet:
  """A model without dropout."""
  model: Any

  @property
  def max_length(self) -> float:
    return self.model.max_length

  def init(self, key: jax.Array) -> Any:
    return self.model.init(key)

  def apply(self, params: Any, batch: Batch, *, key: jax.Array | None = None, cache: Any = None) -> Any:
    del key
    return self.model.apply(params, batch, cache=cache)


@dataclasses.dataclass(frozen=True)
class Change:
  """One change to a row: the token at a position of `field`, 'tokens' or 'source'."""
  field: str
  position: int


@dataclasses.dataclass(frozen=True)
class Influence:
  """How far a change of one token changes the outputs of a row.

  Attributes:
    row: the row before the change, [1, T] each.
    change: the change.
    size_T: the largest change of a hidden state at each position, relative to their root mean square.
    noise: the same between two equal rows.
  """
  row: Batch
  change: Change
  size_T: np.ndarray
  noise: float


class Pass(NamedTuple):
  """A backward pass."""
  gradients: Any                   # a tree like the parameters
  metrics: dict[str, jax.Array]    # of the step


@dataclasses.dataclass(frozen=True, eq=False)   # programs are cached for each object
class Subject:
  """A run to examine, on the mesh that is set.

  Attributes:
    run: the run.
    data: its data, opened.
    mesh: the mesh.
    params: the parameters, without constants.
    constants: the constants of the run, by name.
    feed: gives the batches of training.
    state: the state before the next step; None for a run that was opened without its optimizer.
    is_new: whether the parameters are new: neither trained nor loaded.
  """
  run: train.Run
  data: train.OpenData
  mesh: jax.sharding.Mesh
  params: Any
  constants: Mapping[str, Any]
  feed: train.Feed
  state: train.State | None = None
  is_new: bool = False

  @functools.cached_property
  def special(self) -> Special:
    return special(self.data.tokenizer, self.run.objective.control)

  @property
  def batches(self) -> Batches:
    """The batches of training. Raises DoesNotApply where they are not read from the data of the run."""
    if not isinstance(self.feed, train.DataFeed):
      raise DoesNotApply('the batches come from a feed of its own')
    return self.feed.rows

  @functools.cached_property
  def base_model(self) -> Any:
    """The model without adapters."""
    return lora.base_model(self.run.model)

  @functools.cached_property
  def length(self) -> int:
    """The number of positions of a short row."""
    return int(min(LENGTH, self.run.model.max_length))

  @functools.cached_property
  def shaken(self) -> Any:
    """The parameters with small changes to each."""
    return compiled_fast(_shake)(self.params)

  def small(self, parts: int = 1) -> Batch:
    """Returns a small batch of rows that differ, in NumPy; its rows can be split in `parts` on the mesh."""
    rows = sharding.parts('B', self.mesh) * parts
    source_length = None if self.run.data.source_length is None else self.length
    return small_batch(self.run, self.special, rows * -(-4 // rows), self.length, source_length)

  def on_mesh(self, batch: Batch) -> Batch:
    """Returns a batch, which all processes have whole, on the mesh."""
    rows = sharding.local_rows(len(batch.tokens), self.mesh)
    return sharding.shard_rows(jax.tree.map(lambda x: x[rows.start:rows.stop], batch), self.mesh)

  def with_constants(self, params: Any) -> Any:
    return train.with_constants(params, self.constants)

  @functools.cached_property
  def _forward(self):
    def forward(params, batch):
      outputs = self.run.model.apply(params, batch)
      hidden = sharding.constrain(outputs.hidden.astype(jnp.float32), '---')   # every process reads all rows
      size = jnp.sqrt(jnp.mean(jnp.square(hidden[:1])))
      changes = jnp.max(jnp.abs(hidden - hidden[:1]), axis=-1) / jnp.maximum(size, 1e-30)
      vocab = sharding.vocabulary_of(outputs.head, outputs.hidden)
      if vocab is None or hasattr(outputs, 'scores'):   # the loss is of scores, not of logits
        return changes, None, None
      log_p = target_log_probabilities(outputs.hidden, outputs.head, batch.targets)
      return changes, sharding.constrain(log_p, '--'), vocab

    static = {}   # the vocabulary of the model, which is known when the program is traced

    def arrays(params, batch):
      changes, log_p, static['vocab'] = forward(params, batch)
      return changes, log_p
    compiled = compiled_fast(arrays)
    return lambda params, batch: (*compiled(self.with_constants(params), batch), static['vocab'])

  @functools.cached_property
  def _changed_rows(self) -> tuple[Batch, list[Change]]:
    """Rows that are the first row of the small batch, the first and last as it is, the others with a change each."""
    rows = sharding.padded_rows(ROWS)
    row = jax.tree.map(lambda x: x[:1], self.small())
    batch = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), row)
    changes = _changes(row)[:rows - 2]
    ids = text_tokens(self.special)
    for r, change in enumerate(changes, 1):
      tokens = getattr(batch, change.field)
      other = ids[ids != tokens[r, change.position]]
      tokens[r, change.position] = other[(7 * r) % len(other)]
    return batch, changes

  @functools.cached_property
  def influences(self) -> list[Influence]:
    """What each of several changes of a token changes."""
    batch, changes = self._changed_rows
    sizes, _, _ = self._forward(self.shaken, self.on_mesh(batch))
    sizes = np.asarray(sizes)
    row = jax.tree.map(lambda x: x[:1], batch)
    return [Influence(row, change, sizes[r], float(sizes[-1].max())) for r, change in enumerate(changes, 1)]

  @functools.cached_property
  def loss_and_vocabulary(self) -> tuple[float, int]:
    """The mean -log p of the targets of the first row, in nats, and the number of logits.

    Raises:
      DoesNotApply: the model gives scores, not logits.
    """
    batch, _ = self._changed_rows
    _, log_p, vocab = self._forward(self.params, self.on_mesh(batch))
    if log_p is None:
      raise DoesNotApply('the model gives scores and no probabilities')
    counted = batch.weights[0] != 0
    return float(-np.asarray(log_p)[0][counted].mean()), vocab

  def gradient_pass(self, batch: Batch, parts: int = 1) -> Pass:
    """Returns the gradients of the shaken parameters as the step of the run gives them to its optimizer."""
    if parts not in self._gradient_programs:
      self._gradient_programs[parts] = compiled_fast(self._gradient_program(parts))
    program = self._gradient_programs[parts]
    return Pass(*program(self.shaken, self.on_mesh(batch), self.constants, seeds.key(self.run.seed)))

  @functools.cached_property
  def _gradient_programs(self) -> dict[int, Any]:
    """Compiled programs of `gradient_pass`, by the number of parts."""
    return {}

  def _gradient_program(self, parts: int) -> Callable[..., Any]:
    """Returns the step of the run, without dropout, and with an optimizer that returns the gradients."""
    record = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads))
    step = train.step_function(dataclasses.replace(self.run, model=Quiet(self.run.model), optimizer=record, guard=None,
                                                   not_finite=None, accumulate=parts, offload_optimizer=False))

    def gradients(params, batch, constants, key):
      state = train.State(jnp.int32(0), params, jax.tree.map(jnp.zeros_like, params))
      new, metrics = step(state, batch, constants, key)
      return new.opt_state, metrics
    return gradients

  @functools.cached_property
  def labels(self) -> trained_labels.Labels:
    """What the loss trains in the first rows of training, of which the last one is a row of short documents.

    Raises:
      DoesNotApply: the loss has no labels that are tokens, such as that of a reward model.
    """
    goal = self.run.objective
    vocab, batch = self.loss_and_vocabulary[1], self.batches(0, range(sharding.padded_rows(2)))
    short = small_batch(self.run, self.special, 1, batch.tokens.shape[1], self.run.data.source_length)
    batch = jax.tree.map(lambda x, y: np.concatenate([x[:-1], y.astype(x.dtype)]), batch, short)
    program = compiled_fast(trained_labels.gradient(goal, getattr(self.run.model, 'depths', 0)))
    gradient = program(trained_labels.table(vocab), self.on_mesh(batch), self.constants)
    return trained_labels.read(batch, np.asarray(gradient), vocab)


def _changes(row: Batch) -> list[Change]:
  """Returns the changes to make to a row: in each document, at its first, last and middle token, and in the padding."""
  segments = row.segments[0]
  spans = [np.flatnonzero(segments == s) for s in range(1, segments.max() + 1)]
  changes = []
  if row.source is not None:
    sources = row.source_segments[0]
    changes += [Change('source', int(np.flatnonzero(sources == s)[0])) for s in range(1, sources.max() + 1)]
  changes += [Change('tokens', int(span[len(span) // 2])) for span in spans[:3]]
  padding = np.flatnonzero(segments == 0)
  changes += [Change('tokens', int(i)) for i in padding[:1]]
  changes += [Change('tokens', int(i)) for span in spans for i in (span[-1], span[0])]
  return list(dict.fromkeys(changes))


def _shake(params: Any) -> Any:
  """Returns parameters to each of which a wave is added, of a tenth of its root mean square and at least 0.02."""
  leaves, tree = jax.tree.flatten(params)

  def shake(number, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    phase = sum((jax.lax.broadcasted_iota(jnp.float32, x.shape, axis) * (1.7 + 0.31 * axis) for axis in range(x.ndim)),
                jnp.full(x.shape, 0.1 + number, jnp.float32))
    size = jnp.maximum(0.1 * jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))), 0.02)
    return x + groups.laid_out_like((jnp.sin(phase) * size).astype(x.dtype), x)
  return jax.tree.unflatten(tree, [shake(number, x) for number, x in enumerate(leaves)])
