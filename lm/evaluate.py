"""Evaluation of a model over a fixed set of batches."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batches import Batch, Batches
from lm.objectives.objective import Objective


def make_step(apply: Callable[..., Any], objective: Objective, byte_lengths: np.ndarray) -> Callable:
  """A jitted `(params, batch) -> sums` over a batch, without dropout.

  Beside the objective's own sums: `loss`, `weight`, and `bytes`, UTF-8 bytes of the targets (`byte_lengths[V]` each).
  """
  def step(params, batch: Batch):
    loss, weight, sums = objective.loss(apply, params, batch, None)
    lengths = jnp.asarray(byte_lengths, jnp.int32).at[batch.targets].get(out_sharding=sharding.spec('BT'))
    return {'loss': loss, 'weight': weight, 'bytes': jnp.sum(jnp.where(batch.weights > 0, lengths, 0)), **sums}
  return jax.jit(step)


def evaluate(step: Callable, params: Any, batches: Batches, mesh: jax.sharding.Mesh,
             limit: int | None = None) -> dict[str, float]:
  """Metrics over all of `batches`, or the first `limit` of them: each target counts the same.

  Returns `loss` (the objective's), `nll` (nats a token), `perplexity` = exp(nll), `bits_per_byte` = nats / ln 2 over
  the UTF-8 bytes of the text (ends of documents cost bits and have no bytes), and `accuracy` of the likeliest token.
  """
  rows = sharding.local_rows(batches.rows, mesh)
  steps = batches.steps_per_epoch if limit is None else min(limit, batches.steps_per_epoch)
  pending = [step(params, sharding.shard_rows(batches(i, rows), mesh)) for i in range(steps)]
  total = {name: sum(float(sums[name]) for sums in pending) for name in pending[0]}
  if total['tokens'] == 0:
    raise ValueError('nothing to evaluate: the batches hold no targets')
  nll = total['nll'] / total['tokens']
  return {'loss': total['loss'] / total['weight'], 'nll': nll, 'perplexity': float(np.exp(nll)),
          'bits_per_byte': total['nll'] / np.log(2) / max(total['bytes'], 1),
          'accuracy': total['correct'] / total['tokens']}
