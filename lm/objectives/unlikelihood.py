"""Unlikelihood training: tokens that occurred before become less likely, so that a model repeats itself less."""
import dataclasses

import jax
import jax.numpy as jnp

from lm import sharding
from lm.objectives.objective import Objective, over_vocabulary, targets_of


def _first_of_segment(tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """Returns which positions hold a token that did not occur before in their segment, [B, T]."""
  same = ((tokens_BT[:, :, None] == tokens_BT[:, None]) & (segments_BT[:, :, None] == segments_BT[:, None]))
  return ~jnp.any(jnp.tril(same, -1), axis=-1)


def _cost(logits_BTV, log_z_BT, candidates_BTS, tokens_BS):
  """Returns -sum over candidates of log(1 - p), [B, T]. The vocabulary may be split over devices."""
  def local(logits, log_z, candidates, tokens):
    is_local = candidates & ((tokens >= 0) & (tokens < logits.shape[-1]))[:, None]
    scores = jnp.take_along_axis(logits, jnp.clip(tokens, 0, logits.shape[-1] - 1)[:, None], axis=-1)
    complement = 1 - jnp.exp(jnp.minimum(scores - log_z[..., None], 0))   # 1 - p, bounded below as the authors do
    return -jnp.sum(jnp.where(is_local, jnp.log(jnp.maximum(complement, 1e-5)), 0), axis=-1)

  def on_shard(logits, log_z, candidates, tokens):
    tokens = tokens - sharding.part_index('V') * logits.shape[-1]
    return sharding.sum_of_parts(local(logits, log_z, candidates, tokens), 'V')

  if sharding.spec('B') is None:
    return local(logits_BTV, log_z_BT, candidates_BTS, tokens_BS)
  places, rows = sharding.spec('BT'), sharding.spec('B-')
  return jax.shard_map(on_shard, in_specs=(sharding.spec('BTV'), places, places, rows), out_specs=places,
                       check_vma=False)(logits_BTV, log_z_BT, candidates_BTS, tokens_BS)


def unlikelihood(objective: Objective, alpha: float = 1.) -> Objective:
  """Adds a loss of repetition to the `token_loss` of an objective (Welleck et al. 2020, arXiv:1908.04319).

  L = token_loss - alpha sum_t w_t sum_{c in C_t} log(1 - p_t(c)), where C_t are the tokens of the segment up to
  position t, each once, without the target of t: the token-level loss. The metric `unlikelihood` is its mean over
  targets.

  Raises:
    ValueError: the loss of `objective` has terms other than that of its targets (see `targets_of`).
  """
  token_loss, denominator = targets_of(objective)

  def both(logits, targets, weights, segments, places, tokens_BS, segments_BS, is_first_BS):
    loss, sums = token_loss(logits, targets, weights)
    is_earlier = places[..., None] >= jnp.arange(tokens_BS.shape[1])[None, None]
    occurred = is_earlier & (segments[..., None] == segments_BS[:, None]) & is_first_BS[:, None]
    candidates = occurred & (targets[..., None] != tokens_BS[:, None])
    cost = _cost(logits, jax.nn.logsumexp(logits, axis=-1), candidates, tokens_BS)
    counted = (weights > 0).astype(jnp.float32)
    return loss + alpha * jnp.sum(cost * weights), {**sums, 'unlikelihood': (jnp.sum(cost * counted), sums['tokens'])}

  def loss(apply, params, batch, key):
    outputs = apply(params, batch, key=key)
    segments = jnp.ones_like(batch.tokens) if batch.segments is None else batch.segments
    places = sharding.constrain(jnp.broadcast_to(jnp.arange(batch.tokens.shape[1])[None], batch.tokens.shape), 'BT')
    tokens, segments_BS = (sharding.constrain(x, 'B-') for x in (batch.tokens, segments))
    whole = tokens, segments_BS, _first_of_segment(tokens, segments_BS)
    args = batch.targets, batch.weights, segments, places
    loss_sum, sums = over_vocabulary(both, outputs.hidden, outputs.head, args, whole)
    return loss_sum, denominator(batch), sums

  return dataclasses.replace(objective, loss=loss, token_loss=token_loss, denominator=None)
