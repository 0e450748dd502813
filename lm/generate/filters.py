"""From the logits of a model to a token: bans, biases, penalties, the temperature and filters, then the draw.

The functions of filters and penalties map float32 logits [B, V] to logits; those of excluded tokens become -inf. Their
further argument is one number, or an array [B] with one for each row. Shapes: the legend in `models/transformer.py`.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.generate.sampling import BAD_WORD_LENGTH, RECENT, Sampling, Settings


class TokenHistory(NamedTuple):
  """What the draws of a row depend on besides its logits. `recent_BL` are the last tokens of the text, -1 before it."""
  prompt_BV: jax.Array    # whether a token occurs in the prompt
  counts_BV: jax.Array    # how often a token occurs in the output
  recent_BL: jax.Array    # RECENT of them
  written_B: jax.Array    # the number of tokens of the output

  def add(self, token_B: jax.Array, is_live_B: jax.Array) -> 'TokenHistory':
    """Returns the history after another token of each row that is live."""
    counts = self.counts_BV.at[jnp.arange(len(token_B)), token_B].add(is_live_B.astype(jnp.int32))
    recent = jnp.concatenate([self.recent_BL[:, 1:], token_B[:, None]], axis=1)
    return TokenHistory(self.prompt_BV, counts, recent, self.written_B + is_live_B)


def new_history(texts: Sequence[np.ndarray], vocab: int, written: int = 0) -> TokenHistory:
  """Returns the history of texts in NumPy, of each of which the last `written` tokens are output."""
  prompt, counts = np.zeros((len(texts), vocab), bool), np.zeros((len(texts), vocab), np.int32)
  recent = np.full((len(texts), RECENT), -1, np.int32)
  for row, ids in enumerate(texts):
    start = len(ids) - written
    prompt[row, ids[:start]] = True
    np.add.at(counts[row], ids[start:], 1)
    last = ids[-recent.shape[1]:]
    recent[row, recent.shape[1] - len(last):] = last
  return TokenHistory(prompt, counts, recent, np.full(len(texts), written, np.int32))


def _column(value: jax.Array | float) -> jax.Array:
  return jnp.reshape(jnp.asarray(value), (-1, 1))


def _exclude(logits_BV: jax.Array, ids_BN: jax.Array, is_banned_BN: jax.Array) -> jax.Array:
  """Excludes the tokens `ids_BN` where `is_banned_BN` is true."""
  ids = jnp.where(is_banned_BN & (ids_BN >= 0), ids_BN, logits_BV.shape[-1])
  return logits_BV.at[jnp.arange(len(ids))[:, None], ids].set(-jnp.inf, mode='drop')


def word_count(vocab: int) -> int:
  """Returns the number of words of 32 bits that have a bit for each token."""
  return -(-vocab // 32)


def keep_allowed(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
  """Excludes each token v whose bit is 0: bit v % 32 of word v // 32, int32. What no row needs costs nothing."""
  def exclude(logits, allowed):
    bits = (allowed[..., None] >> jnp.arange(32)[None, None]) & 1
    return jnp.where(bits.reshape(len(bits), -1)[:, :logits.shape[-1]] == 1, logits, -jnp.inf)

  return _apply_if(allowed_BW != -1, exclude, logits_BV, allowed_BW)


def exclude_bad_words(logits_BV: jax.Array, words_BNL: jax.Array, recent_BL: jax.Array) -> jax.Array:
  """Excludes the last token of each word whose other tokens are the last of the text; -1 in a word is no token."""
  beginnings = words_BNL[..., :-1]
  matches = ((beginnings < 0) | (beginnings == recent_BL[:, None, 1 - BAD_WORD_LENGTH:])).all(-1)
  return _exclude(logits_BV, words_BNL[..., -1], matches)


def exclude_ends(logits_BV: jax.Array, ends_BN: jax.Array, is_early_B: jax.Array) -> jax.Array:
  """Excludes the tokens that end a text in the rows that may not end yet."""
  return _exclude(logits_BV, ends_BN, jnp.broadcast_to(is_early_B[:, None], ends_BN.shape))


def add_bias(logits_BV: jax.Array, ids_BN: jax.Array, values_BN: jax.Array) -> jax.Array:
  """Adds values to the logits of tokens; an id of -1 is no token."""
  ids = jnp.where(ids_BN >= 0, ids_BN, logits_BV.shape[-1])
  return logits_BV.at[jnp.arange(len(ids))[:, None], ids].add(values_BN, mode='drop')


def penalize(logits_BV: jax.Array, present_BV: jax.Array, penalty: jax.Array | float) -> jax.Array:
  """Divides the positive logits of the tokens in `present_BV` by `penalty`, and multiplies the negative ones by it."""
  penalty = _column(penalty)
  penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  return jnp.where(present_BV, penalized, logits_BV)


def penalize_counts(logits_BV: jax.Array, counts_BV: jax.Array, presence: jax.Array | float,
                    frequency: jax.Array | float) -> jax.Array:
  """Subtracts `presence` from the logits of the tokens that occur, and `frequency` once for each occurrence."""
  return logits_BV - _column(frequency) * counts_BV - _column(presence) * (counts_BV > 0)


def penalize_repetitions(logits_BV: jax.Array, recent_BL: jax.Array, breakers_BN: jax.Array,
                         multiplier: jax.Array | float, base: jax.Array | float, allowed_length: jax.Array | int
                         ) -> jax.Array:
  """Subtracts multiplier * base ** (n - allowed_length) from the logits of tokens that would continue a repetition.

  n is the greatest number of tokens that are the last of the text, and also stand before an earlier place of the token.
  It is at least `allowed_length`. No breaker is among these tokens, and none is penalised. At most 1e4 is subtracted.
  This is DRY, "don't repeat yourself", as text-generation-webui and llama.cpp have it.
  """
  size, places = recent_BL.shape[1], jnp.arange(recent_BL.shape[1])[None]
  is_breaker = (recent_BL < 0) | (recent_BL[..., None] == breakers_BN[:, None]).any(-1)

  def compare(carry):   # the token that is n places before the last one, with that n places before the one before each
    n, is_equal, lengths_BL = carry
    token, breaks = (jax.lax.dynamic_slice_in_dim(x, size - 1 - n, 1, 1) for x in (recent_BL, is_breaker))
    is_equal &= (jnp.roll(recent_BL, n + 1, axis=1) == token) & ~breaks & (places > n)
    return n + 1, is_equal, lengths_BL + is_equal

  carry = jnp.int32(0), jnp.ones_like(is_breaker), jnp.zeros_like(recent_BL)
  _, _, lengths_BL = jax.lax.while_loop(lambda carry: (carry[0] < size - 1) & carry[1].any(), compare, carry)
  rows, ids = jnp.arange(len(recent_BL))[:, None], jnp.where(is_breaker, logits_BV.shape[-1], recent_BL)
  excess = jnp.zeros(logits_BV.shape, jnp.int32).at[rows, ids].max(lengths_BL, mode='drop') - _column(allowed_length)
  penalties = jnp.minimum(_column(multiplier) * _column(base) ** excess, 1e4)
  return jnp.where((excess >= 0) & (_column(multiplier) > 0), logits_BV - penalties, logits_BV)


def keep_min_p(logits_BV: jax.Array, share: jax.Array | float) -> jax.Array:
  """Excludes tokens less probable than `share` times the most probable one; 0 excludes none."""
  return jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True) + jnp.log(_column(share)), logits_BV, -jnp.inf)


def keep_top_k(logits_BV: jax.Array, k: jax.Array | int) -> jax.Array:
  """Excludes tokens below the k-th greatest logit, and keeps those equal to it; 0 or less excludes none."""
  size, k = logits_BV.shape[-1], _column(k)
  least = kth_greatest(logits_BV, jnp.broadcast_to(jnp.clip(k, 1, size), (len(logits_BV), 1)))
  return jnp.where((k < 1) | (logits_BV >= least), logits_BV, -jnp.inf)


_SIGN = 1 << 31


def _ordered(values: jax.Array) -> jax.Array:
  """Returns uint32 integers in the order of float32 values, none of which is NaN."""
  bits, sign = jax.lax.bitcast_convert_type(values, jnp.uint32), jnp.uint32(_SIGN)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _greatest(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
  """Returns the greatest uint32 number of each row, [B, 1], for which `holds` is true, [B, 1].

  `holds` is true for 0, and for every number below one for which it is true. So the number is determined bit by bit,
  from the highest, in 32 calls.
  """
  def set_bit(i, number):
    candidate = number | (jnp.uint32(_SIGN) >> i.astype(jnp.uint32))
    return jnp.where(holds(candidate), candidate, number)

  return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((rows, 1), jnp.uint32))


def kth_greatest(values_BV: jax.Array, k_B1: jax.Array) -> jax.Array:
  """The k-th greatest of the float32 values of each row, [B, 1]; `k_B1` is at least 1 and at most V.

  That takes 32 counts over the row, in place of sorting it, and k need not be static. No value is NaN.
  """
  ordered, sign = _ordered(values_BV), jnp.uint32(_SIGN)
  kth = _greatest(lambda number: jnp.sum(ordered >= number, axis=-1, keepdims=True) >= k_B1, len(values_BV))
  return jax.lax.bitcast_convert_type(jnp.where(kth >= sign, kth ^ sign, ~kth), jnp.float32)


def keep_top_p(logits_BV: jax.Array, mass: jax.Array | float) -> jax.Array:
  """Excludes the least probable tokens whose probabilities sum to at most 1 - `mass`; 1 excludes none.

  Of equally probable tokens, those with lower ids are excluded first. The most probable token stays.
  """
  return _keep_mass(logits_BV, logits_BV, mass)


def keep_typical(logits_BV: jax.Array, mass: jax.Array | float) -> jax.Array:
  """Excludes the tokens whose information, -log p, is the farthest from its mean, the entropy; 1 excludes none.

  The probabilities of those that are excluded sum to at most 1 - `mass`.
  """
  information, entropy = _information(logits_BV)
  return _keep_mass(logits_BV, -jnp.abs(information - entropy), mass)


def keep_eta(logits_BV: jax.Array, cutoff: jax.Array | float) -> jax.Array:
  """Excludes tokens less probable than min(`cutoff`, sqrt(`cutoff`) * exp(-entropy)), but not the most probable."""
  information, entropy = _information(logits_BV)
  cutoff = _column(cutoff)
  least = jnp.minimum(cutoff, jnp.sqrt(cutoff) * jnp.exp(-entropy))
  stays = (jnp.exp(-information) >= least) | (logits_BV == logits_BV.max(-1, keepdims=True))
  return jnp.where(stays, logits_BV, -jnp.inf)


def _information(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns -log p of each token, inf for excluded ones, and the entropy of each row, [B, 1], in nats."""
  information = -jax.nn.log_softmax(logits_BV, axis=-1)
  terms = jnp.where(information < jnp.inf, information * jnp.exp(-information), 0)
  return information, jnp.sum(terms, axis=-1, keepdims=True)


def _keep_mass(logits_BV: jax.Array, ranks_BV: jax.Array, mass: jax.Array | float) -> jax.Array:
  """Excludes the tokens of the lowest ranks whose probabilities sum to at most 1 - `mass`; 1 excludes none.

  Of tokens with equal ranks, those with lower ids are excluded first. A token with the highest rank stays. The rank of
  the last token that stays takes 32 sums over the row, in place of sorting it.
  """
  mass, ordered = _column(mass), _ordered(ranks_BV)
  weights = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))

  def below(number):
    return jnp.sum(jnp.where(ordered < number, weights, 0), axis=-1, keepdims=True)

  excluded = (1 - mass) * jnp.sum(weights, axis=-1, keepdims=True)
  least = _greatest(lambda number: below(number) <= excluded, len(logits_BV))
  least = jnp.minimum(least, ordered.max(-1, keepdims=True))
  is_least = ordered == least
  weight = jnp.max(jnp.where(is_least, weights, 0), axis=-1, keepdims=True)
  ties = jnp.sum(is_least, axis=-1, keepdims=True)
  count = jnp.floor((excluded - below(least)) / jnp.maximum(weight, 1e-37))   # of these, that are excluded too
  count = jnp.clip(count, 0, ties - 1).astype(jnp.int32)
  is_first = jax.lax.cond(jnp.any(count > 0), lambda: is_least & (jnp.cumsum(is_least, axis=-1) <= count),
                          lambda: jnp.zeros_like(is_least))
  return jnp.where((mass < 1) & ((ordered < least) | is_first), -jnp.inf, logits_BV)


def process(logits_BV: jax.Array, sampling: Sampling | Settings, history: TokenHistory | None = None,
            ends_BE: jax.Array | None = None) -> jax.Array:
  """Returns the logits that tokens are drawn from; see `Sampling` for the order.

  Without a `history`, only the temperature and the filters are applied. `ends_BE` are the ids that end any text, for
  `min_tokens`. The logits of greedy rows are not filtered. What no row uses costs nothing.
  """
  logits = logits_BV.astype(jnp.float32)
  if history is not None:
    logits = _edit(logits, sampling, history, ends_BE)
  is_drawn = ~jnp.asarray(sampling.greedy)
  min_p, top_k, top_p = (jnp.asarray(x) for x in (sampling.min_p, sampling.top_k, sampling.top_p))
  typical_p, eta_cutoff = jnp.asarray(sampling.typical_p), jnp.asarray(sampling.eta_cutoff)
  filtered = logits / _column(jnp.maximum(jnp.asarray(sampling.temperature), 0.01))
  filtered = _apply_if(is_drawn & (min_p > 0), keep_min_p, filtered, min_p)
  filtered = _apply_if(is_drawn & (top_k > 0), keep_top_k, filtered, top_k)
  filtered = _apply_if(is_drawn & (top_p < 1), keep_top_p, filtered, top_p)
  filtered = _apply_if(is_drawn & (typical_p < 1), keep_typical, filtered, typical_p)
  filtered = _apply_if(is_drawn & (eta_cutoff > 0), keep_eta, filtered, eta_cutoff)
  return jnp.where(_column(is_drawn), filtered, logits)


def _apply_if(is_used, function, logits, *args):
  """Applies a function if any row uses it."""
  return jax.lax.cond(jnp.any(is_used), function, lambda logits, *_: logits, logits, *args)


def _edit(logits: jax.Array, settings: Settings, history: TokenHistory, ends_BE: jax.Array | None) -> jax.Array:
  """Applies what depends on the history of a row, and the biases."""
  ends = settings.stop_ids if ends_BE is None else jnp.concatenate([settings.stop_ids, ends_BE], axis=1)
  is_early = history.written_B < settings.min_tokens
  presence, frequency = settings.presence_penalty, settings.frequency_penalty
  logits = _apply_if(settings.bad_words >= 0, exclude_bad_words, logits, settings.bad_words, history.recent_BL)
  logits = _apply_if(is_early, exclude_ends, logits, ends, is_early)
  logits = _apply_if(settings.bias_ids >= 0, add_bias, logits, settings.bias_ids, settings.biases)
  penalty = settings.repetition_penalty
  logits = _apply_if(penalty != 1, lambda logits: penalize(logits, history.prompt_BV | (history.counts_BV > 0),
                                                           penalty), logits)
  logits = _apply_if((presence != 0) | (frequency != 0), penalize_counts, logits, history.counts_BV, presence,
                     frequency)
  dry = settings.breakers, settings.dry_multiplier, settings.dry_base, settings.dry_allowed_length
  return _apply_if(settings.dry_multiplier > 0, penalize_repetitions, logits, history.recent_BL, *dry)


def draw(logits_BV: jax.Array, settings: Settings, keys_B: jax.Array) -> jax.Array:
  """Draws a token of each row from processed logits; takes the most probable one if the row is greedy."""
  best = jnp.argmax(logits_BV, axis=-1)

  def draw_some():
    return jnp.where(settings.greedy, best, jax.vmap(jax.random.categorical)(keys_B, logits_BV))

  return jax.lax.cond(settings.greedy.all(), lambda: best, draw_some)
