"""Layers as a pipeline over the stages of a mesh, in a circular schedule (Narayanan et al. 2021, arXiv:2104.04473).

Each of S stages has R layers, and computes one of them at a time. A microbatch goes around the stages R times, once for
each layer of a stage. Microbatches come in G groups of S: a group fills all stages, and the next group follows it
without a gap, so that no microbatch waits in a queue. At iteration t, stage s works on visit u = t - s. That is round
u // S mod R of microbatch u mod S in group u // (R S). Each stage works in G R S of the G R S + S - 1 iterations. The
others are the bubble, in which it computes what is not used.

Microbatch i of a group starts and ends on stage i. Its inputs wait there until the group starts, and then move towards
stage 0 by one stage at each iteration. Results move from the last stage in the same direction.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.sharding import pipeline_arrays
from lm.sharding.each_stage import for_each_stage

Visit = Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def run(visit: Visit, layers: Any, x: jax.Array, rows: Any, groups: int, policy: Callable[..., bool]
        ) -> tuple[jax.Array, Any]:
  """Returns x [B, T, D] after all layers, and the sum over layers and microbatches of what `visit` returns beside it.

  Args:
    visit: a function `(layer, microbatch, x, rows) -> (x, sums)` that applies a layer to a microbatch, given the number
      of the microbatch.
    layers: a tree of arrays [L, ...], where the number of stages divides L.
    x: the input.
    rows: a tree of arrays [B, ...] that layers read too.
    groups: the number of groups of microbatches.
    policy: what is stored of a visit for the backward pass; see `jax.checkpoint_policies`.
  """
  stages, stage_S = pipeline_arrays.number_of_stages(), pipeline_arrays.stage_numbers()
  rounds = jax.tree.leaves(layers)[0].shape[0] // stages
  visits = rounds * stages   # of a stage, to a group
  layers, inputs = pipeline_arrays.layers_to_stages(layers), pipeline_arrays.rows_to_stages((x, rows), groups)

  # The selection is inside, because selected weights would be stored for each iteration.
  def compute(layers, number_S, *args):
    return for_each_stage(visit)(pipeline_arrays.take_round(layers, number_S), *args)

  compute = jax.checkpoint(compute, policy=policy, prevent_cse=False)

  def iterate(carry, t):
    received, fresh, results, outputs = carry
    u_S = t - stage_S
    group_S, number_S = u_S // visits, u_S // stages % rounds
    group = jnp.minimum(t // visits, groups - 1)   # of stage 0
    fresh = pipeline_arrays.choose(t % visits == 0, _take(inputs, group), fresh)
    x, rows = pipeline_arrays.choose((stage_S == 0) & (number_S == 0), fresh, received)
    y, sums = compute(layers, number_S, group_S * stages + u_S % stages, x, rows)
    works_S = (u_S >= 0) & (group_S < groups)
    sums = jax.tree.map(lambda each: jnp.sum(jnp.where(_expanded(works_S, each.ndim), each, 0), axis=0), sums)
    results = pipeline_arrays.choose(stage_S == stages - 1, y, pipeline_arrays.shift(results, -1))
    finished = jnp.maximum((t - (stages - 1)) // visits, 0)   # complete when the last of its results has come
    outputs = jax.lax.dynamic_update_index_in_dim(outputs, results, finished, 1)
    return (pipeline_arrays.shift((y, rows), 1), pipeline_arrays.shift(fresh, -1), results, outputs), sums

  first = _take(inputs, 0)
  carry = first, first, first[0], jnp.zeros_like(inputs[0])
  (_, _, _, outputs), sums = jax.lax.scan(iterate, carry, jnp.arange(groups * visits + stages - 1))
  return pipeline_arrays.rows_from_stages(outputs), jax.tree.map(lambda each: jnp.sum(each, axis=0), sums)


def _expanded(flags_S, ndim):
  return jnp.expand_dims(flags_S, tuple(range(1, ndim)))


def _take(inputs, group):
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, group, 1, keepdims=False), inputs)
