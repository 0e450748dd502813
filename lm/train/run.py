"""A training run: the `Run`, which describes it, and the `State`, which its steps change."""
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import declarations, optim, seeds, sharding
from lm.data.batch import Batch, Special, template
from lm.data.rows.augment import Augmentation
from lm.data.rows.stages import Schedule, Stage
from lm.objectives.objective import Objective
from lm.optim import averaging
from lm.train.gradient import Gradient, accumulate_gradients
from lm.train.guard import GoBack, Guard, Skip
from lm.train.interfaces import Constants, Data, Evaluator, Feed, Model, OpenData
from lm.workdir import rebuild
from lm.workdir.describe import describe


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that decides what a training run computes, and how often it evaluates and saves.

  To build a run computes nothing, and opens no file.

  Attributes:
    model: the model.
    objective: what it learns to predict.
    data: the data, before it is opened.
    optimizer: a function of `lm.optim`, or a transformation of Optax.
    steps: the number of steps.
    batch: the rows of a step, over all devices and parts.
    accumulate: the number of parts that a step is computed in, one after the other. On a mesh with stages, each part is
      a microbatch for each stage.
    seed: fixes the data order, the initial parameters and the losses.
    evaluate_every: the steps between evaluations.
    evaluate_batches: the batches of the validation split in each evaluation; None for all.
    save_every: the steps between checkpoints.
    keep: how many of the last checkpoints are kept, beside the best.
    keep_every: every checkpoint at a multiple of so many steps is kept for good; None for none.
    start: `start(model)` returns the parameters that training starts from; None initialises new ones.
    start_tokenizer: the fingerprint of the tokenizer that these parameters, or those of constants, are for; training
      with another tokenizer is refused. None allows any.
    constants: parameters that training does not change.
    augment: changes to the text of training, but not of validation.
    stages: batches of other shapes in the first steps.
    patience: training stops after so many evaluations in a row without an improvement, and the best checkpoint is then
      the result.
    guard: skips steps at which the loss spikes.
    not_finite: what happens at a step whose loss or gradient is not finite. By default the run stops, or, with a guard,
      leaves the update out.
    minutes: steps are left out where training would take longer. `launch` chooses `steps` where an experiment has none.
    gradient: computes the gradient of a step, see `lm.train.gradient`.
    offload_optimizer: whether the state of the optimizer is kept in the memory of the host between its updates.
    feed: `feed(run, data, mesh)` makes the feed, see `interfaces.Feed`; None reads the batches of the data.
    evaluators: `evaluators[name](run, data, mesh)` makes a function `(params, step) -> metrics`, which each
      evaluation calls. Its metrics are logged as `name/metric`.
    best: the logged name of the metric that chooses the best checkpoint, and that patience watches.
    better: whether a lower or a higher value of this metric is better.

  Raises:
    ValueError: a number is out of range, or fields contradict one another.
  """
  model: Model
  objective: Objective
  data: Data
  optimizer: optim.Optimizer
  steps: int
  batch: int
  accumulate: int = 1
  seed: int = 0
  evaluate_every: int = 250
  evaluate_batches: int | None = 20
  save_every: int = 1000
  keep: int = 2
  keep_every: int | None = None
  start: Callable[[Model], Any] | None = None
  start_tokenizer: str | None = None
  constants: tuple[Constants, ...] = ()
  augment: tuple[Augmentation, ...] = ()
  stages: tuple[Stage, ...] = ()
  patience: int | None = None
  guard: Guard | None = None
  not_finite: Skip | GoBack | None = None
  minutes: float | None = None
  gradient: Gradient = accumulate_gradients
  offload_optimizer: bool = False
  feed: 'Callable[[Run, OpenData, jax.sharding.Mesh], Feed] | None' = None   # None: `feed.DataFeed`
  evaluators: 'Mapping[str, Callable[[Run, OpenData, jax.sharding.Mesh], Evaluator]]' = dataclasses.field(
      default_factory=dict)
  best: str = 'validation/loss'
  better: Literal['lower', 'higher'] = 'lower'

  def __post_init__(self):
    for name in ('steps', 'batch', 'accumulate', 'evaluate_every', 'save_every', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not positive; give 1 or more')
    seeds.check(self.seed)
    if self.keep_every is not None and self.keep_every < 1:
      raise ValueError(f'keep_every={self.keep_every} is not positive; leave it out to keep no checkpoint for good')
    if self.minutes is not None and not 0 < self.minutes < 1e6:
      raise ValueError(f'minutes={self.minutes} is not between 0 and a million')
    if self.evaluate_batches is not None and self.evaluate_batches < 1:
      raise ValueError(f'evaluate_batches={self.evaluate_batches} is not positive; None evaluates all')
    if self.patience is not None and not 0 < self.patience < -(-self.steps // self.evaluate_every):
      raise ValueError(f'patience={self.patience} evaluations, one every {self.evaluate_every} steps, is not positive, '
                       f'or longer than the run of {self.steps} steps; lower evaluate_every, or the patience')
    self._check_evaluation()
    if self.feed is not None and (self.augment or self.stages):
      name = 'augment' if self.augment else 'stages'
      raise ValueError(f'{name}={getattr(self, name)} is for batches of the data, and feed={self.feed} gives others; '
                       'leave one of them out')
    if self.stages and isinstance(self.not_finite, GoBack):
      raise ValueError(f'stages={self.stages} give batches of a shape to certain steps, and not_finite=GoBack gives '
                       'steps other batches; leave one of them out')
    if self.stages and self.stages[-1].until > self.steps:
      raise ValueError(f'a stage ends at step {self.stages[-1].until}, beyond the {self.steps} steps of the run')

  @functools.cached_property
  def transformation(self) -> optax.GradientTransformationExtraArgs:
    """The transformation of the optimizer for the weights that the model declares."""
    return optim.bind(self.optimizer, declarations.of(self.model))

  def _check_evaluation(self) -> None:
    for name in self.evaluators:
      if not name or f'{name}/'.startswith('validation/'):
        raise ValueError(f'an evaluator is called {name!r}, and its metrics would be logged as those of the '
                         'validation data; choose another name')
    if self.better not in ('lower', 'higher'):
      raise ValueError(f"better={self.better!r} is not 'lower' or 'higher'")
    names = 'validation', *self.evaluators
    if not self.best.startswith(tuple(f'{name}/' for name in names)):
      raise ValueError(f"best={self.best!r} is not a metric of an evaluation; its name begins with "
                       + ' or '.join(f'{name}/' for name in names))
    if self.best.endswith('accuracy') and self.better == 'lower':
      raise ValueError(f"best={self.best!r} with better='lower' would keep the least accurate checkpoint; "
                       "set `better` to 'higher'")

  @property
  def schedule(self) -> Schedule:
    """The shape of the batch of each step."""
    return Schedule(self.stages, self.batch, self.data.length)


class State(NamedTuple):
  """The state of training, which a checkpoint holds.

  Attributes:
    step: the number of steps so far.
    params: the parameters.
    opt_state: the state of the optimizer.
    seen: the history of the guard (`guard.History`); checkpoints have it under this name.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  seen: Any = None


def init(run: Run, key: jax.Array | None = None) -> State:
  """Returns the state before the first step, with new parameters. Call it inside `jax.jit`.

  The key is by default that of the run's seed.
  """
  params = run.model.init(jax.random.fold_in(seeds.key(run.seed) if key is None else key, 0))
  return begin(run, params)


def begin(run: Run, params: Any) -> State:
  """Returns the state before the first step, with these parameters."""
  opt_state = run.transformation.init(params)
  return State(jnp.int32(0), params, sharding.to_host(opt_state) if run.offload_optimizer else opt_state,
               run.guard and run.guard.init())


def advance(state: State, steps: int) -> State:
  """Returns the state after so many more steps that change no parameters."""
  return state._replace(step=state.step + steps, opt_state=optim.advance(state.opt_state, steps))


def abstract_state(run: Run, mesh: jax.sharding.Mesh) -> State:
  """Returns the shapes, dtypes and shardings of the state, which a checkpoint is restored into."""
  state = with_shardings(jax.eval_shape(lambda: init(run)), mesh)
  return state._replace(opt_state=sharding.abstract_on_host(state.opt_state)) if run.offload_optimizer else state


def with_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns a tree of `jax.ShapeDtypeStruct` with shardings on a mesh; those without a spec are replicated."""
  def add(s):
    return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding.layout(mesh, s.sharding and s.sharding.spec))
  return jax.tree.map(add, abstract)


def load_constants(run: Run) -> dict[str, Any]:
  """Returns the parameters of the run's constants by name, on the mesh that is set."""
  return {constant.name: constant.load(constant.model) for constant in run.constants}


def abstract_constants(run: Run) -> dict[str, Any]:
  """Returns the shapes, dtypes and shardings of the run's constants by name."""
  return {constant.name: jax.eval_shape(lambda constant=constant: constant.model.init(jax.random.key(0)))
          for constant in run.constants}


def with_constants(params: Any, constants: Mapping[str, Any]) -> Any:
  """Returns parameters as models and objectives get them, with the constants among them."""
  return {**params, **constants} if constants else params


def abstract_batch(run: Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
                   shape: tuple[int, int] | None = None) -> Batch:
  """Returns the shapes and shardings of a packed batch of `shape` [B, T], by default that after the last stage."""
  row = template(run.objective, Special(0, 1, 3, (2,) * len(run.objective.control)), run.data.length,
                 run.data.source_length)
  stored = {name: np.zeros((1, run.data.length, *shape), dtype) for name, (dtype, shape) in run.data.columns.items()}
  inputs = {name: np.zeros((1, *shape), dtype) for name, (dtype, shape) in run.data.inputs.items()}
  inputs = {**(row.inputs or {}), **inputs}
  row = row._replace(columns={**(row.columns or {}), **stored} or None, inputs=None)
  rows, length = shape or (run.batch, run.data.length)
  parts, layout = run.data.length // length, sharding.row_layout(mesh)

  def rows_of(x: np.ndarray, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *shape), x.dtype, sharding=layout)

  batch = jax.tree.map(lambda x: rows_of(x, x.shape[1] // parts, *x.shape[2:]), row)
  return batch._replace(inputs={name: rows_of(x, *x.shape[1:]) for name, x in inputs.items()} or None)


# Fields that nothing needs which reads the result of a run: to generate, to score, to export, or to start from it.
_NOT_STORED = {'optimizer', 'save_every', 'keep_every', 'start', 'augment', 'guard', 'not_finite', 'minutes',
               'gradient', 'offload_optimizer', 'feed', 'evaluators', 'best', 'better'}
_STORED = tuple(field.name for field in dataclasses.fields(Run) if field.name not in _NOT_STORED)


def run_to_json(run: Run) -> dict[str, Any]:
  """Returns a description of a run as JSON. Its `average` says where the state of the optimizer has an average."""
  fields = {name: rebuild.stored(getattr(run, name)) for name in _STORED}
  start = rebuild.stored(run.start)   # a function of a script is left out: readers use the checkpoint
  state = jax.eval_shape(lambda: init(run).opt_state)
  return {**fields, 'start': None if rebuild.outside(start) else start, 'average': averaging.average_path(state)}


def run_from_json(tree: Mapping[str, Any]) -> Run:
  """Returns the run that `run_to_json` described, without its optimizer.

  Raises:
    rebuild.Unknown: the description is damaged, or names classes of other packages.
  """
  if not isinstance(tree, Mapping) or tree.keys() != {*_STORED, 'start', 'average'}:
    raise rebuild.Unknown('its description does not have the fields of a run')
  fields = rebuild.rebuilt({'dict': [[name, item] for name, item in tree.items() if name != 'average']})
  is_run = isinstance(fields['objective'], Objective) and hasattr(fields['model'], 'init')
  if not is_run or not hasattr(fields['data'], 'open'):
    raise rebuild.Unknown('its description is not of a model, an objective and data')
  try:
    return Run(optimizer=optax.GradientTransformation(_no_optimizer, _no_optimizer), **fields)
  except TypeError as error:
    raise rebuild.Unknown(f'its description has values of another type ({error})') from None


def _no_optimizer(*args: Any) -> Any:
  raise ValueError('the run was opened from its workdir, which does not describe its optimizer; to train, build it '
                   'by its script')


def identity(run: Run, data: str, tokenizer: str) -> dict[str, Any]:
  """Returns the facts of a run that have to be those of the checkpoint that it continues from.

  They are the model, the objective, the data and its order. `data` and `tokenizer` are fingerprints.
  """
  constants = {'constants': {constant.name: describe(constant) for constant in run.constants}} if run.constants else {}
  settings = {name: describe(getattr(run, name)) for name in ('augment', 'stages', 'feed') if getattr(run, name)}
  if run.gradient is not accumulate_gradients:
    settings['gradient'] = describe(run.gradient)
  return {'model': describe(run.model), 'objective': describe(run.objective, inside=True), 'batch': run.batch,
          'length': run.data.length, 'seed': run.seed, 'data': data, 'tokenizer': tokenizer, **constants, **settings}
