"""Speculative decoding by a model's own modules for further tokens: one pass of the trunk verifies their drafts.

  draft = module_drafts.SelfSpeculation()
  generate.generate(model, params, tokenizer, prompts, draft=draft)
  print(draft.acceptance, draft.tokens_per_pass)

The tokens have the same distribution as those of the trunk alone (Leviathan et al. 2023, arXiv:2211.17192). Greedy
text is the same, except where sums of another shape are rounded differently. The modules are in `module_drafts`; other
drafts are in `drafted_steps`. Shapes: the legend in `models/transformer.py`; here, D are the drafted tokens, and
W = D + 1 the tokens of a forward pass.

Each row has its own index in the cache. The entries of rejected tokens lie behind this index, where no query sees
them, and the next pass, which is as long, overwrites them.
"""
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.generate.drafted_steps import DraftCounter
from lm.generate.engine import (
    CHUNK,
    Engine,
    Tokens,
    map_shards,
    replicate,
    split_rows,
    token_log_probabilities,
)
from lm.generate.filters import process
from lm.generate.sampling import Settings, first_that_needs_history, row_keys
from lm.models.attention import write
from lm.models.transformer import Cache


class DraftState(NamedTuple):
  """The state between two rounds. The last token of row b is not in the cache yet; its slot is `cache.index[b]`."""
  cache: Cache              # of the trunk
  depths: tuple[Any, ...]   # the caches of the drafter
  hidden: jax.Array         # [B, n, width], the hidden states of the trunk at the n slots before `index`
  tokens_BS: jax.Array      # the text, then the drafted tokens
  drafted_BDV: jax.Array    # the probabilities that the drafts were drawn from
  first_B: jax.Array        # the number of padding slots before the text
  ended_B: jax.Array        # whether a row has ended, or is empty
  settings: Settings
  written_B: jax.Array      # the number of tokens written
  limit_B: jax.Array        # the number of tokens with which a row ends


class Counts(NamedTuple):
  """The forward passes of the trunk and the accepted drafts, summed over the rows that had not ended."""
  passes: jax.Array
  accepted: jax.Array


def verify(p_BWV: jax.Array, q_BDV: jax.Array, drafts_BD: jax.Array, uniform_BD: jax.Array, keys_B: jax.Array
           ) -> tuple[jax.Array, jax.Array]:
  """Returns how many drafts are accepted, [B], and the token after them, [B].

  A draft x, drawn from q, is accepted with probability min(1, p(x) / q(x)). The first rejected draft is replaced by a
  token drawn from max(0, p - q), normalised; if all are accepted, another token is drawn from p. Each token then has
  the distribution p. `p_BWV` are the model's probabilities after none of the drafts, after the first, ..., after all;
  `q_BDV` are those that the drafts were drawn from; `uniform_BD` is in [0, 1).
  """
  def of_drafts(table):
    return jnp.take_along_axis(table, drafts_BD[..., None], axis=2)[..., 0]

  is_right = uniform_BD * of_drafts(q_BDV) < of_drafts(p_BWV[:, :-1])
  accepted = jnp.sum(jnp.cumprod(is_right, axis=1), axis=1)
  q = jnp.pad(q_BDV, ((0, 0), (0, 1), (0, 0)))   # there is no draft after the last
  p, q = (jnp.take_along_axis(table, accepted[:, None, None], axis=1)[:, 0] for table in (p_BWV, q))
  excess = jnp.maximum(p - q, 0)
  excess = jnp.where(jnp.sum(excess, axis=-1, keepdims=True) > 0, excess, p)   # p and q may differ by rounding alone
  return accepted, jax.vmap(jax.random.categorical)(keys_B, jnp.log(excess))


def probabilities(logits_BTV: jax.Array, settings: Settings, vocab: int) -> jax.Array:
  """Returns the probabilities that tokens are drawn from; those of a greedy row are 0 and 1."""
  rows, time, size = logits_BTV.shape
  logits = jnp.where(jnp.arange(size)[None] < vocab, logits_BTV.reshape(-1, size), -jnp.inf)   # without the padding
  settings = jax.tree.map(lambda x: jnp.repeat(x, time, axis=0), settings)   # rows and times as one axis
  logits = process(logits, settings)
  greedy = settings.greedy[:, None]
  p = jnp.where(greedy, jax.nn.one_hot(jnp.argmax(logits, -1), size), jax.nn.softmax(logits))
  return p.reshape(rows, time, size)


# Purposes of the random numbers of a row at a position: to draw a token, to verify drafts, and to draw draft k, whose
# number is DRAFT + k, with k from 1.
_TOKEN, _VERIFY, DRAFT = 0, 1, 1


def take(x: jax.Array, indices_BT: jax.Array) -> jax.Array:
  """Returns `x[b, indices[b, t]]`."""
  return jnp.take_along_axis(x, indices_BT.reshape(*indices_BT.shape, *(1,) * (x.ndim - 2)), axis=1)


class DraftingModules(Protocol):
  """Drafts tokens from hidden states; a hashable object, because a program is compiled for it.

  Attributes:
    drafts: the number of tokens that it drafts at a time.
    hidden: how many hidden states of the trunk, the last ones, it needs between two rounds.
  """
  drafts: int

  @property
  def hidden(self) -> int: ...

  def check(self, model: Any, width: int) -> None:
    """Raises ValueError where it cannot draft for a model after prompts in rows of this width."""

  def init_caches(self, model: Any, rows: int, slots: int) -> tuple[Any, ...]:
    """Returns its empty caches, led by rows."""

  def draft(self, model: Any, params: Any, head: Any, state: DraftState, vocab: int) -> DraftState:
    """Writes `drafts` tokens after the last one, and the probabilities that they were drawn from."""


@functools.partial(jax.jit, static_argnames=('model', 'vocab', 'slots', 'drafter'))
@sharding.whole_rows()
def _prefill(model, params, batch: Batch, settings, written, limit, ends, *, vocab, slots, drafter
             ) -> tuple[DraftState, Tokens]:
  """Reads prompts into new caches, draws the first token and drafts the next ones. Empty rows count as ended."""
  def first_token(logits, settings, place):
    p = probabilities(logits, settings, vocab)[:, 0]
    token = jax.vmap(jax.random.categorical)(row_keys(settings, place, _TOKEN), jnp.log(p))
    return token, token_log_probabilities(logits, token[:, None])

  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  settings, written, limit = split_rows((settings, written, limit))
  rows, width = batch.tokens.shape
  out = model.apply(params, batch, cache=model.init_cache(rows, slots))
  first = jnp.sum(batch.segments == 0, axis=1)
  logits = sharding.whole_logits(out.head, out.hidden[:, -1:])
  token, log_probability = map_shards(first_token, logits, settings, width - first - 1)
  tokens = jnp.pad(jnp.concatenate([batch.tokens, token[:, None]], axis=1), ((0, 0), (0, slots - width - 1)))
  is_empty = (first == width) | (written >= limit)
  total = written + ~is_empty
  ended = is_empty | (token[:, None] == ends[None]).any(-1) | (total >= limit)
  caches = drafter.init_caches(model, rows, slots)
  state = DraftState(out.cache, caches, out.hidden, tokens, None, first, ended, settings, total, limit)
  state = drafter.draft(model, params, out.head, state, vocab)
  state = state._replace(hidden=out.hidden[:, out.hidden.shape[1] - drafter.hidden:])
  ids = jnp.where(is_empty, ends[0], token)[:, None]
  return state, replicate(Tokens(ids, jnp.where(is_empty[:, None], 0, log_probability), total - written))


def _round(model, params, state: DraftState, ends, vocab, drafter
           ) -> tuple[DraftState, jax.Array, jax.Array, jax.Array]:
  """Applies the trunk to the last token and the drafts after it, verifies the drafts, and makes new ones.

  Returns the state, the D + 1 tokens of the pass, of which the first are new, their log-probabilities, both
  [B, D + 1], and the number of accepted drafts, [B].
  """
  def verify_rows(logits, q, drafts, settings, place):
    keys = row_keys(settings, place, _VERIFY)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, drafts.shape[1:]))(keys)
    p = probabilities(logits, settings, vocab)
    accepted, token = verify(p, q, drafts, uniform, row_keys(settings, place, _TOKEN))
    new = jnp.pad(drafts, ((0, 0), (0, 1)))
    new = jnp.where(jnp.arange(new.shape[1])[None] == accepted[:, None], token[:, None], new)
    return accepted, token, new, token_log_probabilities(logits, new)

  index, first, drafts = state.cache.index, state.first_B, state.drafted_BDV.shape[1]
  columns = jnp.arange(drafts + 1)[None]
  tokens = take(state.tokens_BS, index[:, None] + columns)
  positions = jnp.minimum(index[:, None] + columns - first[:, None], model.max_length - 1)   # drafts may exceed it
  out = model.apply(params, Batch(tokens, positions=positions), cache=state.cache)
  accepted, token, new, log_probabilities = map_shards(
      verify_rows, sharding.whole_logits(out.head, out.hidden), state.drafted_BDV, tokens[:, 1:], state.settings,
      index - first)
  is_live = ~state.ended_B
  accepted = jnp.where(is_live, accepted, 0)
  tokens_BS = write(state.tokens_BS, token[:, None], index + accepted + 1)
  is_end = (new[..., None] == ends[None, None]).any(-1) & (columns <= accepted[:, None])
  until_end = jnp.where(is_end.any(-1), 1 + jnp.argmax(is_end, axis=1), drafts + 1)
  steps = jnp.minimum(jnp.minimum(accepted + 1, until_end), state.limit_B - state.written_B)
  steps = jnp.where(is_live, steps, 0)
  written, n = state.written_B + steps, state.hidden.shape[1]
  hidden = take(jnp.concatenate([state.hidden, out.hidden], axis=1), steps[:, None] + jnp.arange(n)[None])
  state = state._replace(cache=out.cache._replace(index=index + steps), hidden=hidden, tokens_BS=tokens_BS,
                         ended_B=state.ended_B | is_end.any(-1) | (written >= state.limit_B), written_B=written)
  return drafter.draft(model, params, out.head, state, vocab), new, log_probabilities, accepted


@functools.partial(jax.jit, static_argnames=('model', 'vocab', 'rounds', 'drafter'), donate_argnames='state')
@sharding.whole_rows()
def _rounds(model, params, state: DraftState, count, ends, *, vocab, rounds, drafter
            ) -> tuple[DraftState, Tokens, Counts]:
  """Computes `count` rounds, at most `rounds`; fewer if all rows end."""
  before = state.written_B

  def compute_round(carry):
    n, state, ids, log_probabilities, counts = carry
    is_live, start = ~state.ended_B, state.written_B - before
    state, new, scores, accepted = _round(model, params, state, ends, vocab, drafter)
    counts = Counts(counts.passes + jnp.sum(is_live), counts.accepted + jnp.sum(accepted))
    return n + 1, state, write(ids, new, start), write(log_probabilities, scores, start), counts

  shape = len(state.ended_B), rounds * (drafter.drafts + 1)
  ids, log_probabilities = (sharding.constrain(x, 'BT') for x in (jnp.full(shape, ends[0]), jnp.zeros(shape)))
  carry = jnp.int32(0), state, ids, log_probabilities, Counts(jnp.int32(0), jnp.int32(0))
  _, state, ids, log_probabilities, counts = jax.lax.while_loop(
      lambda carry: (carry[0] < count) & ~carry[1].ended_B.all(), compute_round, carry)
  return state, replicate(Tokens(ids, log_probabilities, state.written_B - before)), counts


@dataclasses.dataclass(frozen=True)
class DraftingEngine(Engine):
  """An engine whose drafts are by `drafter`. It counts passes and accepted drafts in `counter`."""
  drafter: DraftingModules
  counter: DraftCounter

  @property
  def spare_slots(self) -> int:
    return 1 + 2 * self.drafter.drafts   # for drafts after the last token

  def _prefill(self, batch, history, settings, limit, allowed):
    if allowed is not None:
      raise ValueError('a grammar is not supported with drafts; leave one out')
    self.drafter.check(self.model, batch.tokens.shape[1])
    name = first_that_needs_history(settings)
    if name is not None:
      raise ValueError(f'{name} is not supported with drafts; leave one out')
    return _prefill(self.model, self.params, batch, settings, history.written_B, limit, np.int32(self.ends),
                    vocab=self.vocab, slots=self.slots, drafter=self.drafter)

  def step(self, state: DraftState, count: int | None = None) -> tuple[DraftState, Tokens]:
    """Computes `count` rounds, each of which gives a row 1 to D + 1 tokens; by default about CHUNK tokens."""
    most = max(CHUNK // (self.drafter.drafts + 1), 1)
    count = most if count is None else count
    if not 1 <= count <= most:
      raise ValueError(f'count={count} rounds in one step must be 1 to {most}')
    state, tokens, counts = _rounds(self.model, self.params, state, np.int32(count), np.int32(self.ends),
                                    vocab=self.vocab, rounds=most, drafter=self.drafter)
    self.counter.passes += int(counts.passes)
    self.counter.accepted += int(counts.accepted)
    self.counter.proposed += int(counts.passes) * self.drafter.drafts
    return state, tokens
