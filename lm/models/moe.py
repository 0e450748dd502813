"""Mixtures of experts: a feed-forward layer that routes each token to a few experts. Shape legend: `transformer.py`.

Further letters: E experts, k chosen experts per token, R rows, one for each pair of a token and a chosen expert. No
token is dropped: an expert computes all the rows that choose it.
"""
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm import sharding
from lm.declarations import Role
from lm.models import expert_exchange, grouped, layers
from lm.models.context import Aux, Context


def _logits(module: nn.Module, x_BTD: jax.Array, experts: int, std: float, bias: bool = False) -> jax.Array:
  """Declares a router's weight and returns its logits [B, T, E], in float32 because rounding can change the choice."""
  w = layers.weight(module, 'router', 'DX', (x_BTD.shape[-1], experts), nn.initializers.normal(std),
                    role=Role.ROUTER)   # X stands for E, not sharded
  with jax.default_matmul_precision('highest'):
    logits = layers.einsum('BTD,DX->BTX', x_BTD.astype(jnp.float32), w)
  return layers.add_bias(module, 'router_bias', '-', logits) if bias else logits


class Routing(NamedTuple):
  """A router's choice of experts for each token."""
  weights: jax.Array    # [B, T, k], float32, the weights of the chosen experts
  chosen: jax.Array     # [B, T, k], int32
  scores: jax.Array     # [B, T, E], float32, nonnegative scores of all experts, which balancing losses make equal
  correction: jax.Array | None = None   # [E], added to the scores only for the choice

  def loads(self, mask_BT: jax.Array) -> jax.Array:
    """Returns how many tokens of each row chose each expert, [B, E]."""
    choices_BTE = jnp.sum(jax.nn.one_hot(self.chosen, self.scores.shape[-1]), axis=2)
    return jnp.sum(jnp.where(mask_BT[..., None], choices_BTE, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class SwitchBalance:
  """The loss coefficient * E * sum_e f_e p_e (Fedus et al. 2021, arXiv:2101.03961, eq. 4).

  f_e is how often a token of the batch chooses expert e on average, and p_e the mean probability of e. As in the
  library `transformers`, the loss is k * coefficient if all experts are chosen equally often.
  """
  coefficient: float = 0.01

  def __call__(self, routing: Routing, mask_BT: jax.Array) -> jax.Array:
    tokens = jnp.maximum(jnp.sum(mask_BT), 1)
    p = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
    p = jnp.sum(jnp.where(mask_BT[..., None], p, 0), axis=(0, 1)) / tokens
    return self.coefficient * p.size * jnp.sum(jnp.sum(routing.loads(mask_BT), axis=0) / tokens * p)


@dataclasses.dataclass(frozen=True)
class SequenceBalance:
  """The loss of `SwitchBalance` for each row, divided by k, averaged over rows (DeepSeek-AI 2024, DeepSeek-V3, eq. 17).
  """
  coefficient: float = 1e-4

  def __call__(self, routing: Routing, mask_BT: jax.Array) -> jax.Array:
    tokens = jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)
    p = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
    p = jnp.sum(jnp.where(mask_BT[..., None], p, 0), axis=1) / tokens
    k, experts = routing.chosen.shape[-1], p.shape[-1]
    return self.coefficient * jnp.mean(jnp.sum(experts / k * routing.loads(mask_BT) / tokens * p, axis=1))


@dataclasses.dataclass(frozen=True)
class BiasBalance:
  """Balances experts by the router's correction instead of a loss (Wang et al. 2024, arXiv:2408.15664).

  The correction of an expert that is chosen too often falls by a fixed rate at each step; that of an expert that is
  chosen too rarely rises. The value of this loss is zero. Its gradient for the correction is each expert's share of the
  choices minus the mean share; `optim.with_router_balance` takes steps by the sign of this gradient.
  """

  def __call__(self, routing: Routing, mask_BT: jax.Array) -> jax.Array:
    if routing.correction is None:
      raise ValueError('BiasBalance moves the correction of a router, which this one has not; use SigmoidGroupRouter')
    loads = jnp.sum(routing.loads(mask_BT), axis=0)
    excess = jax.lax.stop_gradient(loads / jnp.maximum(jnp.sum(loads), 1) - 1 / loads.size)
    linear = jnp.sum(routing.correction * excess)
    return linear - jax.lax.stop_gradient(linear)   # zero, whose gradient is the excess


def _choose(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the k highest scores of each token, and the numbers of their experts."""
  experts = scores.shape[-1]
  if not 0 < k <= experts:
    raise ValueError(f'top_k={k} experts of each token cannot be chosen from experts={experts}; give more experts, or '
                     'another top_k')
  return sharding.top_k(scores, k)


class SoftmaxRouter(nn.Module):
  """Chooses the k most probable experts, weighted by their probabilities (Shazeer et al. 2017).

  With `renormalize`, the weights sum to 1 (Mixtral, Qwen3), which equals a softmax over the k largest logits (gpt-oss).
  """
  top_k: int
  renormalize: bool = True
  bias: bool = False
  std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD: jax.Array, experts: int, context: Context) -> Routing:
    logits = context.tap('router', _logits(self, x_BTD, experts, self.std, self.bias))
    scores = jax.nn.softmax(logits)
    if self.renormalize:
      logits, chosen = _choose(logits, self.top_k)
      return Routing(jax.nn.softmax(logits), chosen, scores)
    return Routing(*_choose(scores, self.top_k), scores)


class SigmoidRouter(nn.Module):
  """Chooses the k experts with the largest logits, weighted by the sigmoids of the logits (Llama 4)."""
  top_k: int = 1
  std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD: jax.Array, experts: int, context: Context) -> Routing:
    logits = context.tap('router', _logits(self, x_BTD, experts, self.std))
    best, chosen = _choose(logits, self.top_k)
    return Routing(jax.nn.sigmoid(best), chosen, jax.nn.sigmoid(logits))


class SigmoidGroupRouter(nn.Module):
  """Chooses the k best experts of the `top_groups` best groups, weighted by the sigmoids of their logits (DeepSeek-V3).

  `correction` is added to the sigmoids only for the choice, which has no gradient. The score of a group is the sum of
  its two best experts' scores. With `renormalize`, the weights are divided by their sum; then `scale` multiplies them.
  """
  top_k: int
  groups: int = 1
  top_groups: int = 1
  scale: float = 1.
  renormalize: bool = True
  std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD: jax.Array, experts: int, context: Context) -> Routing:
    if experts % self.groups or self.top_k > experts // self.groups * self.top_groups:
      raise ValueError(f'top_k={self.top_k} experts cannot be chosen from top_groups={self.top_groups} of '
                       f'groups={self.groups} groups of {experts} experts; lower top_k, or raise top_groups')
    scores = jax.nn.sigmoid(context.tap('router', _logits(self, x_BTD, experts, self.std)))
    correction = layers.weight(self, 'correction', '-', (experts,), nn.initializers.zeros, role=Role.CORRECTION)
    corrected = jax.lax.stop_gradient(scores + layers.row(correction, scores))
    if self.groups > 1:
      by_group = sharding.split_axis(corrected, 2, (self.groups, experts // self.groups))
      best = jnp.sum(sharding.top_k(by_group, min(2, by_group.shape[-1]))[0], axis=-1)
      chosen = jnp.any(jax.nn.one_hot(sharding.top_k(best, self.top_groups)[1], self.groups, dtype=bool), axis=-2)
      corrected = sharding.merge_axes(jnp.where(chosen[..., None], by_group, -jnp.inf), 2)
    chosen = sharding.top_k(corrected, self.top_k)[1]
    weights = jnp.sum(jax.nn.one_hot(chosen, experts) * scores[:, :, None], axis=-1)
    if self.renormalize:
      weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(weights * self.scale, chosen, scores, correction)


@dataclasses.dataclass(frozen=True)
class ClampedGated:
  """gate * sigmoid(alpha gate) * (up + 1), with gate clipped to at most `limit`, and up to +-`limit` (gpt-oss)."""
  limit: float = 7.
  alpha: float = 1.702

  def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
    return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


class Experts(nn.Module):
  """The sum of w_e * down_e(activation(gate_e(x), up_e(x))) over the experts e that `router` chooses with weight w_e.

  With `weight_inputs`, w_e multiplies x instead (Llama 4). `shared` is a feed-forward layer for every token, whose
  output is added (Dai et al. 2024); with `shared_gate`, the sigmoid of a projection of x multiplies it (Qwen2-MoE).
  `balance` are losses that training adds: functions of the routing and of a mask [B, T], false for padding. The metric
  `router/violation` is the load of the most chosen expert over the mean load, minus 1 (MaxVio in Wang et al. 2024),
  averaged over layers.
  """
  router: nn.Module
  experts: int
  hidden: int
  activation: Callable[[jax.Array, jax.Array], jax.Array] = layers.silu_gated
  bias: bool = False
  weight_inputs: bool = False
  shared: nn.Module | None = None
  shared_gate: bool = False
  std: float = 0.02
  out_std: float = 0.02
  balance: tuple[Callable[[Routing, jax.Array], jax.Array], ...] = ()

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Aux]:
    width, init, x_BTD = x_BTD.shape[-1], nn.initializers.normal, sharding.constrain(x_BTD, 'BTD')
    into, out = (self.experts, width, self.hidden), (self.experts, self.hidden, width)
    params = {'gate': layers.weight(self, 'gate', 'EDF', into, init(self.std), x_BTD.dtype),
              'up': layers.weight(self, 'up', 'EDF', into, init(self.std), x_BTD.dtype),
              'down': layers.weight(self, 'down', 'EFD', out, init(self.out_std), x_BTD.dtype)}
    if self.bias:
      biases = {'gate_bias': self.hidden, 'up_bias': self.hidden, 'down_bias': width}
      params |= {name: layers.weight(self, name, 'E-', (self.experts, size), nn.initializers.zeros, role=Role.VECTOR)
                 for name, size in biases.items()}
    routing = self.router(x_BTD, self.experts, context)
    weights, chosen, aux = routing.weights, routing.chosen, self._aux(routing, context.visible.segments_BT)
    if sharding.spec('B') is None:
      y = self._local(params, x_BTD, weights, chosen)
    else:
      y = self._on_mesh(params, x_BTD, weights, chosen)
    y = sharding.spread(y.astype(x_BTD.dtype))
    if self.shared is None:
      return y, aux
    shared, _ = self.shared(x_BTD, context)
    if self.shared_gate:
      w = layers.weight(self, 'shared_gate', 'DX', (width, 1), init(self.std), x_BTD.dtype, Role.ROUTER)
      shared = shared * sharding.spread(jax.nn.sigmoid(layers.einsum('BTD,DX->BTX', x_BTD, w)))
    return y + shared, aux

  def _aux(self, routing, segments_BT):
    mask = jnp.ones(routing.chosen.shape[:2], bool) if segments_BT is None else segments_BT > 0
    loads = jnp.sum(routing.loads(mask), axis=0)
    violation = jnp.max(loads) * loads.size / jnp.maximum(jnp.sum(loads), 1) - 1
    losses = [balance(routing, mask) for balance in self.balance]
    return Aux(sum(losses[1:], losses[0]) if losses else None, {'router/violation': (violation, jnp.float32(1))})

  def _on_mesh(self, params, x_BTD, weights_BTk, chosen_BTk):
    """Computes each position on one device, which has it between products too, or on those of the chosen experts."""
    time = x_BTD.shape[1]

    def split(x, value):
      padding = sharding.padded_length(time) - time
      if padding:
        x = jnp.pad(sharding.constrain(x, 'B--'), ((0, 0), (0, padding), (0, 0)), constant_values=value)
      return sharding.spread(x)

    rows = split(x_BTD, 0), split(weights_BTk, 0), split(chosen_BTk, self.experts)   # no expert for added positions
    y = sharding.per_device(self._on_shard, jax.typeof(rows[0]).sharding.spec)(params, *rows)
    return y if y.shape[1] == time else sharding.constrain(y, 'B--')[:, :time]

  def _on_shard(self, params, x, weights, chosen):
    # In float32, because gradients are summed over the shards.
    params = {name: sharding.mark_varying(a.astype(jnp.float32), 'BTF', 'E').astype(a.dtype)
              for name, a in params.items()}
    if sharding.parts('E') == 1:
      return self._local(params, x, weights, chosen)
    k, width = chosen.shape[-1], x.shape[-1]
    y = expert_exchange.apply(self._local, params, x.reshape(-1, width), weights.reshape(-1, k), chosen.reshape(-1, k),
                              params['up'].shape[0])
    return y.reshape(x.shape)

  def _local(self, params, x_BTD, weights_BTk, chosen_BTk):
    """Computes rows with the experts of this device. The number of these experts stands for none."""
    experts, k, width = params['up'].shape[0], chosen_BTk.shape[-1], x_BTD.shape[-1]
    chosen = chosen_BTk.reshape(-1)
    order = jnp.argsort(chosen)   # rows of no expert come last
    token, weights, is_local = order // k, weights_BTk.reshape(-1)[order][:, None], (chosen[order] < experts)[:, None]
    sizes = jnp.sum(chosen[:, None] == jnp.arange(experts)[None], axis=0)

    def product(name, x, dtype):
      y = grouped.product(dtype, x, params[name], sizes)
      if self.bias:
        y = (y.astype(jnp.float32) + params[name + '_bias'][jnp.minimum(chosen[order], experts - 1)]).astype(dtype)
      return checkpoint_name(y, name)

    # Float32, so that the gradients of a token's rows are summed in float32.
    rows = jnp.where(is_local, x_BTD.astype(jnp.float32).reshape(-1, width)[token], 0)
    rows = (rows * weights if self.weight_inputs else rows).astype(x_BTD.dtype)
    hidden = self.activation(product('gate', rows, x_BTD.dtype), product('up', rows, x_BTD.dtype))
    y = product('down', hidden, jnp.float32)
    y = jnp.where(is_local, y if self.weight_inputs else y * weights, 0)
    return grouped.zeros(token.size // k, width).at[token].add(y).reshape(x_BTD.shape)
