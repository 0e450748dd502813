"""Speculative decoding: cheap modules draft a few tokens, and one forward pass of the trunk verifies all of them.

  draft = speculative.SelfSpeculation()
  generate.generate(model, params, tokenizer, prompts, draft=draft)
  print(draft.acceptance, draft.tokens_per_pass)

The tokens have the same distribution as those of the trunk alone (Leviathan et al. 2023, arXiv:2211.17192). Greedy
text is the same, except where sums of another shape are rounded differently. The model's own modules for multi-token
prediction draft (DeepSeek-AI 2024). Shapes: the legend in `models/transformer.py`; here, D are the drafted tokens, and
W = D + 1 the tokens of a forward pass.

Each row has its own index in the cache. The entries of rejected tokens lie behind this index, where no query sees
them, and the next pass, which is as long, overwrites them.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.generate.completion import round_up_slots
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
from lm.models.attention import Visible, write
from lm.models.context import Context
from lm.models.prediction_heads import MultiToken
from lm.models.transformer import Cache


class DraftState(NamedTuple):
  """The state between two rounds. The last token of row b is not in the cache yet; its slot is `cache.index[b]`."""
  cache: Cache              # of the trunk
  depths: tuple[Any, ...]   # the caches of the modules
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


def _probabilities(logits_BTV: jax.Array, settings: Settings, vocab: int) -> jax.Array:
  """Returns the probabilities that tokens are drawn from; those of a greedy row are 0 and 1."""
  rows, time, size = logits_BTV.shape
  logits = jnp.where(jnp.arange(size)[None] < vocab, logits_BTV.reshape(-1, size), -jnp.inf)   # without the padding
  settings = jax.tree.map(lambda x: jnp.repeat(x, time, axis=0), settings)   # rows and times as one axis
  logits = process(logits, settings)
  greedy = settings.greedy[:, None]
  p = jnp.where(greedy, jax.nn.one_hot(jnp.argmax(logits, -1), size), jax.nn.softmax(logits))
  return p.reshape(rows, time, size)


# Purposes of the random numbers of a row at a position: to draw a token, to verify drafts, and to draw draft k, whose
# number is _DRAFT + k, with k from 1.
_TOKEN, _VERIFY, _DRAFT = 0, 1, 1


def _take(x: jax.Array, indices_BT: jax.Array) -> jax.Array:
  """Returns `x[b, indices[b, t]]`."""
  return jnp.take_along_axis(x, indices_BT.reshape(*indices_BT.shape, *(1,) * (x.ndim - 2)), axis=1)


def _draft(model: MultiToken, params: Any, head: Any, state: DraftState, vocab: int, drafts: int) -> DraftState:
  """Writes `drafts` tokens after the last one, each drawn by the module of its depth.

  The modules read the slots of `state.hidden`: those since the last round, and earlier ones, because in the last round
  the tokens ahead of them were drafts.
  """
  def draw_draft(purpose, logits, settings, place):
    q = _probabilities(logits, settings, vocab)[:, 0]
    return q, jax.vmap(jax.random.categorical)(row_keys(settings, place, purpose), jnp.log(q))

  index, first, n = state.cache.index, state.first_B, state.hidden.shape[1]
  slots = (index - n)[:, None] + jnp.arange(n)[None]
  positions = slots - first[:, None]
  key_positions = jnp.arange(state.tokens_BS.shape[1])[None] - first[:, None]
  segments, key_segments = ((x >= 0).astype(jnp.int32) for x in (positions, key_positions))
  visible = Visible(segments, key_segments, None, positions, key_positions, index - n)
  tokens, previous, drafted, caches = state.tokens_BS, state.hidden, [], []
  for k in range(1, drafts + 1):
    previous, hidden, cache, _ = model.depth(params, k, state.hidden, previous, _take(tokens, slots + k),
                                             Context(positions, visible), state.depths[k - 1])
    draw = functools.partial(draw_draft, _DRAFT + k)
    q, token = map_shards(draw, sharding.whole_logits(head, hidden[:, -1:]), state.settings, index - first)
    tokens = write(tokens, token[:, None], index + k)
    caches.append(cache)
    drafted.append(q)
  return state._replace(tokens_BS=tokens, depths=tuple(caches), drafted_BDV=jnp.stack(drafted, axis=1))


@functools.partial(jax.jit, static_argnames=('model', 'vocab', 'slots', 'drafts'))
@sharding.whole_rows()
def _prefill(model, params, batch: Batch, settings, written, limit, ends, *, vocab, slots, drafts
             ) -> tuple[DraftState, Tokens]:
  """Reads prompts into new caches, draws the first token and drafts the next ones. Empty rows count as ended."""
  def first_token(logits, settings, place):
    p = _probabilities(logits, settings, vocab)[:, 0]
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
  caches = model.init_depth_caches(rows, slots)[:drafts]
  state = DraftState(out.cache, caches, out.hidden, tokens, None, first, ended, settings, total, limit)
  state = _draft(model, params, out.head, state, vocab, drafts)._replace(hidden=out.hidden[:, -2 * drafts:])
  ids = jnp.where(is_empty, ends[0], token)[:, None]
  return state, replicate(Tokens(ids, jnp.where(is_empty[:, None], 0, log_probability), total - written))


def _round(model, params, state: DraftState, ends, vocab) -> tuple[DraftState, jax.Array, jax.Array, jax.Array]:
  """Applies the trunk to the last token and the drafts after it, verifies the drafts, and makes new ones.

  Returns the state, the D + 1 tokens of the pass, of which the first are new, their log-probabilities, both
  [B, D + 1], and the number of accepted drafts, [B].
  """
  def verify_rows(logits, q, drafts, settings, place):
    keys = row_keys(settings, place, _VERIFY)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, drafts.shape[1:]))(keys)
    p = _probabilities(logits, settings, vocab)
    accepted, token = verify(p, q, drafts, uniform, row_keys(settings, place, _TOKEN))
    new = jnp.pad(drafts, ((0, 0), (0, 1)))
    new = jnp.where(jnp.arange(new.shape[1])[None] == accepted[:, None], token[:, None], new)
    return accepted, token, new, token_log_probabilities(logits, new)

  index, first, drafts = state.cache.index, state.first_B, state.drafted_BDV.shape[1]
  columns = jnp.arange(drafts + 1)[None]
  tokens = _take(state.tokens_BS, index[:, None] + columns)
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
  hidden = _take(jnp.concatenate([state.hidden, out.hidden], axis=1), steps[:, None] + jnp.arange(n)[None])
  state = state._replace(cache=out.cache._replace(index=index + steps), hidden=hidden, tokens_BS=tokens_BS,
                         ended_B=state.ended_B | is_end.any(-1) | (written >= state.limit_B), written_B=written)
  return _draft(model, params, out.head, state, vocab, drafts), new, log_probabilities, accepted


@functools.partial(jax.jit, static_argnames=('model', 'vocab', 'rounds', 'drafts'), donate_argnames='state')
@sharding.whole_rows()
def _rounds(model, params, state: DraftState, count, ends, *, vocab, rounds, drafts
            ) -> tuple[DraftState, Tokens, Counts]:
  """Computes `count` rounds, at most `rounds`; fewer if all rows end."""
  before = state.written_B

  def compute_round(carry):
    n, state, ids, log_probabilities, counts = carry
    is_live, start = ~state.ended_B, state.written_B - before
    state, new, scores, accepted = _round(model, params, state, ends, vocab)
    counts = Counts(counts.passes + jnp.sum(is_live), counts.accepted + jnp.sum(accepted))
    return n + 1, state, write(ids, new, start), write(log_probabilities, scores, start), counts

  shape = len(state.ended_B), rounds * (drafts + 1)
  ids, log_probabilities = (sharding.constrain(x, 'BT') for x in (jnp.full(shape, ends[0]), jnp.zeros(shape)))
  carry = jnp.int32(0), state, ids, log_probabilities, Counts(jnp.int32(0), jnp.int32(0))
  _, state, ids, log_probabilities, counts = jax.lax.while_loop(
      lambda carry: (carry[0] < count) & ~carry[1].ended_B.all(), compute_round, carry)
  return state, replicate(Tokens(ids, log_probabilities, state.written_B - before)), counts


@dataclasses.dataclass(frozen=True)
class DraftingEngine(Engine):
  """An engine that drafts `drafts` tokens at a time, and counts passes and accepted drafts in `counter`."""
  drafts: int
  counter: 'SelfSpeculation'

  @property
  def spare_slots(self) -> int:
    return 1 + 2 * self.drafts   # for drafts after the last token

  def _prefill(self, batch, history, settings, limit, allowed):
    if allowed is not None:
      raise ValueError('a grammar is not supported with drafts; leave one out')
    most = min(self.model.depths, batch.tokens.shape[1] // 2)
    if most < self.drafts:
      raise ValueError(f'drafts={self.drafts}: this model can draft 1 to {most} tokens')
    name = first_that_needs_history(settings)
    if name is not None:
      raise ValueError(f'{name} is not supported with drafts; leave one out')
    return _prefill(self.model, self.params, batch, settings, history.written_B, limit, np.int32(self.ends),
                    vocab=self.vocab, slots=self.slots, drafts=self.drafts)

  def step(self, state: DraftState, count: int | None = None) -> tuple[DraftState, Tokens]:
    """Computes `count` rounds, each of which gives a row 1 to `drafts` + 1 tokens; by default about CHUNK tokens."""
    most = max(CHUNK // (self.drafts + 1), 1)
    count = most if count is None else count
    if not 1 <= count <= most:
      raise ValueError(f'count={count} rounds in one step must be 1 to {most}')
    state, tokens, counts = _rounds(self.model, self.params, state, np.int32(count), np.int32(self.ends),
                                    vocab=self.vocab, rounds=most, drafts=self.drafts)
    self.counter.add(int(counts.passes), int(counts.accepted), self.drafts)
    return state, tokens


class SelfSpeculation:
  """Drafts for `generate.stream(..., draft=...)`, by a model that predicts further tokens; counts accepted drafts.

  Args:
    drafts: the number of tokens that are drafted at a time; None is the number of the model's depths.
  """

  def __init__(self, drafts: int | None = None):
    self.drafts, self.passes, self.accepted, self.proposed = drafts, 0, 0, 0

  @property
  def acceptance(self) -> float:
    """The share of the drafts that were accepted."""
    return self.accepted / max(self.proposed, 1)

  @property
  def tokens_per_pass(self) -> float:
    """The mean number of tokens that a forward pass of the trunk gave a row that had not ended."""
    return 1 + self.accepted / max(self.passes, 1)

  def add(self, passes: int, accepted: int, drafts: int) -> None:
    """Counts passes of the trunk, each over `drafts` drafts."""
    self.passes += passes
    self.accepted += accepted
    self.proposed += drafts * passes

  def engine(self, model: MultiToken, params: Any, slots: int, vocab: int, ends: Sequence[int]) -> DraftingEngine:
    """See `generate.Draft`. Raises ValueError if the model cannot draft as many tokens."""
    depths = model.depths
    if not depths:
      raise ValueError('this model predicts no further tokens, so there is nothing to draft with')
    drafts = depths if self.drafts is None else self.drafts
    if not 1 <= drafts <= depths:
      raise ValueError(f'drafts={drafts}: this model can draft 1 to {depths} tokens')
    return DraftingEngine(model, params, round_up_slots(slots + 1 + 2 * drafts), vocab, ends, drafts, self)
