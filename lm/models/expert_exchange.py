"""Exchanges rows between devices that have different experts. No row is dropped, however unequal the loads are.

Each device sends its rows to the devices of the experts that they choose, and gets the results back: two all-to-all
exchanges. Buffers have a static size, so the rows go in rounds: in each, a device sends at most so many rows to each
other device, and there are as many rounds as the fullest pair of devices needs. The backward pass repeats the rounds
and computes the rows again; what is stored for it does not depend on the loads.

Letters as in `moe.py`; N tokens of this device.
"""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding
from lm.models import grouped

# The rows that a device sends to another in a round, as a share of those that it sends with equal loads. A small share
# needs more rounds, each with less memory, and sends fewer empty rows; measured in BUILD_NOTES.md.
SHARE = 0.5
LEAST = 8   # rows that it may send to another in a round, however few there are

Compute = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def apply(compute: Compute, params: Any, x_ND: jax.Array, weights_Nk: jax.Array, chosen_Nk: jax.Array,
          experts: int) -> jax.Array:
  """Returns the sum over the chosen experts of each token, [N, D], in float32. Call it inside a `shard_map`.

  Args:
    compute: a function `(params, rows [R, D], weights [R, 1], chosen [R, 1])` that returns the results [R, D] of the
      experts of this device, in float32. `chosen` counts from 0; `experts` stands for none, whose result is 0.
    params: the weights of the experts of this device.
    x_ND: the tokens of this device.
    weights_Nk: the weights of the chosen experts.
    chosen_Nk: the chosen experts, counted over all devices. Numbers from the number of experts on stand for none.
    experts: the number of experts of this device.
  """
  devices, (tokens, k) = sharding.parts('E'), chosen_Nk.shape
  chosen = chosen_Nk.reshape(-1)
  counts = jnp.sum((chosen // experts)[:, None] == jnp.arange(devices)[None], axis=0)   # the rows for each device
  equal = -(-int(SHARE * chosen.size) // devices)
  size = min(tokens * min(k, experts), max(LEAST, equal))
  rounds = sharding.largest_of_all(-(-jnp.max(counts) // size))
  send = functools.partial(_send, compute, experts, size, x_ND.dtype)
  return _sum(send, rounds, (params, x_ND, weights_Nk.reshape(-1)), (jnp.argsort(chosen), chosen, counts))


def _send(compute, experts, size, dtype, number, values, choices):
  """Returns what the rows of one round add to the result."""
  (params, x, weights), (order, chosen, counts) = values, choices
  place = number * size + jnp.arange(size)[None]                   # in the queue of rows for a device
  is_row = (place < counts[:, None]).reshape(-1)
  place = (jnp.cumsum(counts) - counts)[:, None] + place
  row = order[jnp.minimum(place, order.size - 1).reshape(-1)]
  token = row // (order.size // x.shape[0])
  # Gathered from float32, so that the gradients of a token's rows are summed in float32.
  rows = jnp.where(is_row[:, None], x.astype(jnp.float32)[token], 0).astype(dtype)
  expert = jnp.where(is_row, chosen[row] % experts, experts)
  rows, expert, weights = (sharding.exchange_parts(a, 'E') for a in (rows, expert, weights[row]))
  y = sharding.exchange_parts(compute(params, rows, weights[:, None], expert[:, None]), 'E')
  return grouped.zeros(*x.shape).at[token].add(jnp.where(is_row[:, None], y, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(send, rounds, values, choices):
  """Returns the sum of `send(number, values, choices)` over all rounds."""
  return jax.lax.fori_loop(0, rounds, lambda number, y: y + send(number, values, choices),
                           grouped.zeros(*values[1].shape))


def _forward(send, rounds, values, choices):
  return _sum(send, rounds, values, choices), (rounds, values, choices)


def _backward(send, residuals, dy):
  rounds, values, choices = residuals
  params, x, weights = values
  operands = params, x.astype(jnp.float32), weights   # the gradient of x is summed over rounds, too

  def add(number, sums):
    gradients, = jax.vjp(lambda operands: send(number, operands, choices), operands)[1](dy)
    return jax.tree.map(lambda total, gradient: total + gradient.astype(jnp.float32), sums, gradients)

  sums = jax.lax.fori_loop(0, rounds, add, jax.tree.map(lambda x: grouped.zeros(*x.shape), values))
  return None, jax.tree.map(lambda total, x: total.astype(x.dtype), sums, values), None


_sum.defvjp(_forward, _backward)
