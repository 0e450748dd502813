"""The type of objectives, and the cross-entropy over a vocabulary, which most of them use."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch, Form

Sums = dict[str, Any]   # arrays, or (sum, count) of a metric of its own


TokenLoss = Callable[..., tuple[jax.Array, Sums]]   # (logits, targets, weights): as `cross_entropy`


def causal_prompt(batch: Batch) -> Batch:
  """Returns the batch as it is: a prompt is read from left to right."""
  return batch


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is predicted: how data become examples, and what a batch of examples costs.

  `forms` make the examples, in the input pipeline (see `lm.data.batch.Form`); rows take turns in them. `needs` is
  what the data has to hold: np.ndarray for documents, or `Dialogue`, `Pair`, `Rated`. `control` names the control
  tokens whose ids an example is given, in this order, as `special.control`.

  `loss(apply, params, batch, key)` runs inside `jit`; `apply(params, batch, key=key)` gives the model's outputs. It
  returns `(loss_sum, weight_sum, sums)`: the loss is `loss_sum / weight_sum`. Sums, not means, so that accumulation,
  sharding and uneven packing stay exact. `sums` holds at least `nll` (nats), `tokens` and `correct`, over targets; a
  metric of the objective's own is a pair `name: (sum, count)`.

  `token_loss` is the loss of a single target, for objectives that add losses of further targets. `denominator` returns
  what the sum of these losses is divided by; it is None where the loss has other terms, see `targets_of`.

  `prompt` marks the positions of a batch of prompts that are read bidirectionally, as in training. None means that the
  objective does not teach a model to write from left to right.
  """
  forms: tuple[Form, ...]
  loss: Callable[..., tuple[jax.Array, jax.Array, Sums]]
  needs: type = np.ndarray
  control: tuple[str, ...] = ()
  prompt: Callable[[Batch], Batch] | None = causal_prompt
  token_loss: TokenLoss | None = None   # None: cross_entropy
  denominator: Callable[[Batch], jax.Array] | None = dataclasses.field(default=None, compare=False)


def token_mean(batch: Batch) -> jax.Array:
  """Denominator of L = -sum_ij w_ij log p_ij / sum_ij w_ij: each target counts the same. The default."""
  return jnp.sum(batch.weights)


def sequence_mean(batch: Batch) -> jax.Array:
  """Denominator of L = -1/N sum_i sum_j w_ij log p_ij over N sequences: long sequences count for more."""
  if batch.segments is None:
    return jnp.float32(batch.tokens.shape[0])
  return jnp.sum(jnp.max(batch.segments, axis=1)).astype(jnp.float32)   # segments of a row are 1, 2, ..., n


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, Sums]:
  """Returns -sum w log softmax(logits)[target], and its sums; a target is correct if no logit is above its own."""
  highest = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1))
  shifted = logits_BTV - highest[..., None]
  # Compare and add, not gather: this stays local where the vocabulary is split over devices.
  picked = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[..., None]
  target = jnp.sum(jnp.where(picked, shifted, 0), axis=-1)
  nll = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - target
  loss = jnp.sum(nll * weights_BT)
  counted = (weights_BT > 0).astype(jnp.float32)
  return loss, {'nll': jnp.sum(nll * counted), 'tokens': jnp.sum(counted), 'correct': jnp.sum((target >= 0) * counted)}


def by_position(function: Callable[..., Any], hidden_BTD: jax.Array, head: Any, args: tuple = ()) -> Any:
  """Returns `function(head(hidden), *args)`, a tree of [B, T, ...], computed for one chunk of T at a time.

  It is differentiable: the backward pass computes the logits of each chunk again.
  """
  chunk = jax.checkpoint(lambda xs: function(head(xs[0]), *xs[1:]))

  chunks = jax.lax.map(chunk, _chunks(hidden_BTD, head, args))
  return jax.tree.map(lambda x: _joined(x, hidden_BTD.shape[1]), chunks)


def target_scores(hidden_BTD: jax.Array, head: Any, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns log softmax(head(hidden))[target] in nats, and whether no logit is above the target's, both [B, T]."""
  def scores(logits, targets):
    picked = jnp.arange(logits.shape[-1])[None, None, :] == targets[..., None]
    target = jnp.sum(jnp.where(picked, logits, 0), axis=-1)
    return target - jax.nn.logsumexp(logits, axis=-1), target >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)
  return by_position(scores, hidden_BTD, head, (targets_BT,))


def target_log_probabilities(hidden_BTD: jax.Array, head: Any, targets_BT: jax.Array) -> jax.Array:
  """Returns log softmax(head(hidden))[target] in nats, [B, T]."""
  return target_scores(hidden_BTD, head, targets_BT)[0]


def chunk_length(batch: int, time: int, vocab: int, limit: int | None = None) -> int:
  """Returns how many positions a chunk of logits has: the fewest equal chunks of at most `limit` elements on a device.

  `time` is the number of positions on a device. By default, chunks are small enough for the caches of a CPU, and larger
  elsewhere; they are never too small for an efficient matrix product.
  """
  if limit is None:
    limit = max(2 ** 22, 256 * vocab) if sharding.platform() == 'cpu' else max(2 ** 26, 2048 * vocab)
  row = batch * vocab / (sharding.parts('B') * sharding.parts('V'))
  chunks = -(-time // max(1, int(limit // row)))
  return -(-time // chunks)


def _add(sums, terms):
  return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, terms)


def _parts_of_rows() -> int:
  """Returns the number of parts into which the positions of rows are split here."""
  return 1 if sharding.spec('T') is None else sharding.parts('T')


def _chunks(hidden_BTD: jax.Array, head: Any, args: tuple) -> tuple:
  """Returns `(hidden, *args)` cut along T into chunks, `[n, B, c, ...]`; the last one is padded with zeros.

  Where T is split over devices, a chunk has positions of every part, so that all devices compute at the same time.
  """
  batch, parts = hidden_BTD.shape[0], _parts_of_rows()
  time = hidden_BTD.shape[1] // parts
  c = chunk_length(batch, time, jax.eval_shape(head, hidden_BTD).shape[-1])

  def cut(x):
    x = sharding.split_axis(sharding.constrain(x, 'BT' + '-' * (x.ndim - 2)), 1, (parts, time))
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -time % c)] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(sharding.split_axis(x, 2, (x.shape[2] // c, c)), 2, 0)
    return sharding.merge_axes(x, 2)
  return tuple(map(cut, (hidden_BTD, *args)))


def _joined(chunks: jax.Array, time: int) -> jax.Array:
  """Returns the chunks `[n, B, c, ...]` as `[B, time, ...]`, the reverse of `_chunks`."""
  parts = _parts_of_rows()
  x = sharding.split_axis(chunks, 2, (parts, chunks.shape[2] // parts))
  x = sharding.merge_axes(jnp.moveaxis(x, 0, 2), 2)[:, :, :time // parts]
  return sharding.merge_axes(x, 1)


def _zero_sums(token_loss, head, chunks, whole) -> tuple[jax.Array, Sums]:
  shapes = jax.eval_shape(lambda hidden, *args: token_loss(head(hidden), *args, *whole), *(x[0] for x in chunks))
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_vocabulary(token_loss: TokenLoss, hidden_BTD: jax.Array, head: Any, args: tuple, whole: tuple = ()
                    ) -> tuple[jax.Array, Sums]:
  """Returns `token_loss(head(hidden), *args, *whole)`, summed over chunks of T, so that [B, T, V] is never stored.

  The arrays of `args` are [B, T, ...] and are cut as the hidden states are; those of `whole` are passed as they are.
  Neither is differentiated, and the sums beside the loss are not differentiated either. A position at which all of
  `args` (so also the weights) are zero must add nothing. The gradient of a chunk is computed in the forward pass, while
  its logits exist: three matrix products, none of which is repeated.
  """
  chunks = _chunks(hidden_BTD, head, args)

  def chunk(sums, xs):
    return _add(sums, token_loss(head(xs[0]), *xs[1:], *whole)), None

  return jax.lax.scan(chunk, _zero_sums(token_loss, head, chunks, whole), chunks)[0]


def _forward(token_loss, hidden_BTD, head, args, whole):
  chunks = _chunks(hidden_BTD, head, args)

  def chunk(carry, xs):
    sums, head_grad = carry
    loss = lambda hidden, head: token_loss(head(hidden), *xs[1:], *whole)
    terms, (hidden_grad, head_terms) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(xs[0], head)
    return (_add(sums, terms), _add(head_grad, head_terms)), hidden_grad

  zero = jax.tree.map(sharding.zero_gradient, head)
  (sums, head_grad), hidden_grad = jax.lax.scan(chunk, (_zero_sums(token_loss, head, chunks, whole), zero), chunks)
  hidden_grad = _joined(hidden_grad, hidden_BTD.shape[1])
  return sums, (hidden_grad, jax.tree.map(lambda g, w: g.astype(w.dtype), head_grad, head))


def _backward(token_loss, grads, cotangents):
  return (*jax.tree.map(lambda g: sharding.scale_gradient(g, cotangents[0]), grads), None, None)


over_vocabulary.defvjp(_forward, _backward)


def token_objective(*forms: Form, control: tuple[str, ...] = (), needs: type = np.ndarray,
                    token_loss: TokenLoss = cross_entropy,
                    denominator: Callable[[Batch], jax.Array] = token_mean,
                    prompt: Callable[[Batch], Batch] | None = causal_prompt) -> Objective:
  """Returns an objective whose loss is a sum over the targets of its examples; most objectives are of this kind."""
  def loss(apply, params, batch, key):
    outputs = apply(params, batch, key=key)
    loss_sum, sums = over_vocabulary(token_loss, outputs.hidden, outputs.head, (batch.targets, batch.weights))
    return loss_sum, denominator(batch), sums

  return Objective(forms, loss, needs, control, prompt, token_loss, denominator)


def targets_of(objective: Objective) -> tuple[TokenLoss, Callable[[Batch], jax.Array]]:
  """Returns the token loss and the denominator of an objective whose loss consists of these alone.

  An objective that replaces the loss of another one calls it. ValueError where that loss has other terms, which would
  be lost.
  """
  if objective.denominator is None:
    raise ValueError('the loss of this objective has terms other than the loss of its targets, such as further tokens, '
                     'repetition or a teacher; they would be lost. Take a plain objective; further tokens are added '
                     'last, as in multi_token(unlikelihood(next_token()))')
  return objective.token_loss or cross_entropy, objective.denominator
