"""Evaluates a model on held-out batches, and runs all evaluators of a run between its steps."""
import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.data.batches import Batches
from lm.data.tokenizers.folder import Tokenizer
from lm.objectives.objective import Objective
from lm.train.interfaces import OpenData
from lm.train.run import Run, abstract_constants, with_constants
from lm.workdir.describe import describe, digest


def make_step(apply: Callable[..., Any], objective: Objective, tokenizer: Tokenizer) -> Callable:
  """Returns a jitted function `(params, batch) -> sums`, without dropout.

  Beside the sums of the objective, it returns `loss`, `weight` and `spelled`, the bytes of the targets by the table of
  the tokenizer. Where they are known, it also returns `bytes`, the UTF-8 bytes of the text of the targets: from the
  batches, see `Batches.with_bytes`, or by the table of a lossless tokenizer.
  """
  byte_lengths, lossless = tokenizer.byte_lengths(), tokenizer.lossless

  def step(params, batch: Batch):
    loss, weight, sums = objective.loss(apply, params, batch, None)
    total = lambda sizes: jnp.sum(jnp.where(batch.weights > 0, sizes, 0))
    spelled = total(jnp.asarray(byte_lengths, jnp.int32).at[batch.targets].get(out_sharding=sharding.spec('BT')))
    if 'bytes' in (batch.columns or {}):
      sums = {'bytes': total(batch.columns['bytes']), **sums}
    elif lossless:
      sums = {'bytes': spelled, **sums}
    return {'loss': loss, 'weight': weight, 'spelled': spelled, **sums}
  return jax.jit(step)


def evaluate(step: Callable, params: Any, batches: Batches, mesh: jax.sharding.Mesh,
             limit: int | None = None, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
  """Computes metrics over all batches, or over the first `limit` of them. All targets have the same weight.

  Args:
    step: the function of `make_step`.
    params: the parameters, with constants among them.
    batches: the held-out batches.
    mesh: the mesh that is set.
    limit: the number of batches; None for all.
    stop: is called before each batch; evaluation ends where it returns True.

  Returns:
    None where `stop` returned True. Otherwise `loss` (that of the objective), `nll` (nats per token), `perplexity` =
    exp(nll), `bits_per_byte` = nats / ln 2 / the UTF-8 bytes of the text (the ends of documents cost bits and have no
    bytes), `accuracy` of the likeliest token, and the metrics of the objective. There is no `nll`, `perplexity` and
    `bits_per_byte` where targets are not text, as those of a reward model. There is no `bits_per_byte` where the bytes
    of the targets are not known: the tokenizer is not lossless, and the targets are not the text in its order, or an
    older version of lm stored the data.

  Raises:
    ValueError: the batches have no targets.
  """
  batches = batches.with_bytes()
  rows = sharding.local_rows(batches.rows, mesh)
  steps = batches.steps_per_epoch if limit is None else min(limit, batches.steps_per_epoch)
  total, count = None, 0
  # The sums of a batch are read while the next one runs.
  for sums in read_behind(step(params, sharding.shard_rows(batches(i, rows), mesh))
                          for i in itertools.takewhile(lambda _: not stop(), range(steps))):
    count += 1
    total = jax.tree.map(lambda x: np.float64(x), sums) if total is None else jax.tree.map(np.add, total, sums)
  if count < steps:
    return None
  if total['tokens'] == 0:
    raise ValueError('nothing to evaluate: the batches hold no targets')
  nll = total['nll'] / total['tokens']
  own = {name: pair[0] / max(pair[1], 1) for name, pair in total.items() if isinstance(pair, tuple)}
  text = {}
  if total['spelled']:
    with np.errstate(over='ignore'):   # the perplexity of a model that has diverged is infinite
      text = {'nll': nll, 'perplexity': np.exp(nll)}
    if total.get('bytes'):
      text['bits_per_byte'] = total['nll'] / np.log(2) / total['bytes']
  return {name: float(value) for name, value in {
      'loss': total['loss'] / total['weight'], **text, 'accuracy': total['correct'] / total['tokens'], **own}.items()}


def metric_names(step: Callable, params: Any, batches: Batches, mesh: jax.sharding.Mesh) -> list[str]:
  """Returns the names of the metrics that `evaluate` may return, without computing them; `params` may be abstract."""
  batches = batches.with_bytes()
  batch = sharding.shard_rows(batches(0, sharding.local_rows(batches.rows, mesh)), mesh)
  sums = jax.eval_shape(step, params, batch)
  own = [name for name, pair in sums.items() if isinstance(pair, tuple)]
  return ['loss', 'nll', 'perplexity', *(['bits_per_byte'] if 'bytes' in sums else []), 'accuracy', *own]


class Evaluation:
  """Evaluates a run: on its validation sets, then by its evaluators.

  Metrics have their names in the log: `validation/loss`, `validation/NAME/loss` for a validation set that the data
  names, and `NAME/metric` for an evaluator.

  Attributes:
    fingerprint: a hash of what is measured, and how. An evaluator that reads files has a `fingerprint` of them, see
      `interfaces.Evaluator`.

  Raises:
    ValueError: the metric that chooses the best checkpoint is not one of the validation sets, or of an evaluator that
      declares its metrics.
  """

  def __init__(self, run: Run, data: OpenData, mesh: jax.sharding.Mesh):
    self._mesh, self._limit = mesh, run.evaluate_batches
    self._step = make_step(run.model.apply, run.objective, data.tokenizer)
    self._sets = {name: data.batches(name, run.objective, run.batch, seed=0, repeat=False)
                  for name in ('validation', *(f'validation/{name}' for name in data.validation_sets))}
    if run.best.startswith('validation/') and run.best != 'validation/loss':
      params = jax.eval_shape(lambda constants: with_constants(run.model.init(jax.random.key(0)), constants),
                              abstract_constants(run))
      metrics = metric_names(self._step, params, self._sets['validation'], mesh)
      check_best(run.best, [f'{name}/{metric}' for name in self._sets for metric in metrics])
    self._evaluators = {name: make(run, data, mesh) for name, make in run.evaluators.items()}
    for name, evaluator in self._evaluators.items():
      if run.best.startswith(f'{name}/') and hasattr(evaluator, 'metric_names'):
        check_best(run.best, [f'{name}/{metric}' for metric in evaluator.metric_names()])
    self.fingerprint = digest({
        'objective': describe(run.objective, inside=True), 'batches': run.evaluate_batches, 'sets': list(self._sets),
        'evaluators': describe(run.evaluators),
        'inputs': {name: getattr(evaluator, 'fingerprint', None) for name, evaluator in self._evaluators.items()}})

  def summary(self) -> list[str]:
    """Returns a line for each validation set on the batches that are read of it."""
    return [f'{name.replace("validation", "val", 1)}: {describe_batches(batches, self._limit)}'
            for name, batches in self._sets.items()]

  def __call__(self, params: Any, step: int, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
    """Returns the metrics of parameters; None where `stop`, called before each batch and evaluator, returns True."""
    metrics = {}
    for name, batches in self._sets.items():
      measured = evaluate(self._step, params, batches, self._mesh, self._limit, stop)
      if measured is None:
        return None
      metrics |= {f'{name}/{metric}': value for metric, value in measured.items()}
    for name, evaluator in self._evaluators.items():
      if stop():
        return None
      metrics |= {f'{name}/{metric}': float(value) for metric, value in evaluator(params, step).items()}
    return metrics


def check_best(best: str, names: Iterable[str]) -> None:
  """Raises ValueError where the metric that compares checkpoints is not among these names.

  A name that ends in / stands for all names that begin with it.
  """
  names = list(names)
  if best not in names and not best.startswith(tuple(name for name in names if name.endswith('/'))):
    nearest = ' or '.join(difflib.get_close_matches(best, names, n=2, cutoff=0))
    raise ValueError(f'best={best!r} is not a metric that is evaluated; the nearest is {nearest}; there are '
                     + ', '.join(names))


def describe_batches(batches: Batches, limit: int | None = None) -> str:
  """Says in words what `evaluate` reads, since losses over other rows or with another context are not comparable."""
  total, context = batches.steps_per_epoch, batches.context
  count = f'all {total:,}' if limit is None or limit >= total else f'the first {limit:,} of {total:,}'
  rows = f'{count} batches of {batches.rows} rows of {batches.length} positions'
  if context:
    return f'{rows}, of which {context} repeat the row before'
  return rows if context is None else f'{rows}, each without the text before it'


def read_behind(calls: Iterable[Any]) -> Iterator[Any]:
  """Yields the results of calls, which are trees of arrays; each is read while the devices compute the next one."""
  previous = None
  for result in calls:
    if previous is not None:
      yield jax.tree.map(np.asarray, previous)
    previous = result
  if previous is not None:
    yield jax.tree.map(np.asarray, previous)
