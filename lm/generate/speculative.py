"""Speculative decoding: cheap modules draft a few tokens, one forward pass of the trunk judges them all.

  draft = speculative.SelfSpeculation()
  generate.generate(model, params, tokenizer, prompts, draft=draft)
  print(draft.acceptance, draft.tokens_per_pass)

What is written has the distribution that the trunk alone would give it (Leviathan et al. 2023, arXiv:2211.17192), and
is the same text where it is greedy, up to the rounding of sums of another shape. The drafts are made by the model's own
modules of multi-token prediction (DeepSeek-AI 2024). Shapes: the legend in `models/transformer.py`; here D are drafted
tokens, and W = D + 1 those of a forward pass.

Each row has its own place in the cache. What a pass wrote there of tokens that were then rejected lies behind that
place, where nothing sees it, and the next pass, as long, writes over it.
"""
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import seeds, sharding
from lm.data.batch import Batch
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.text import CHUNK, Sampling, process, streams
from lm.models.attention import Visible, write
from lm.models.context import Context
from lm.models.prediction_heads import MultiToken
from lm.models.transformer import Cache


class _State(NamedTuple):
  """What is carried from round to round. The last token of row b, not yet in the cache, is at slot `cache.index[b]`."""
  cache: Cache              # of the trunk; `index` is [B]
  depths: tuple[Any, ...]   # the caches of the modules
  hidden: jax.Array         # [B, n, width], the trunk's, at the n slots before `index`
  tokens_BS: jax.Array      # the text, then what is drafted
  drafted_BDV: jax.Array    # the probabilities that drafts were drawn from
  first_B: jax.Array        # slots of padding before the text
  done_B: jax.Array
  stream_B: jax.Array       # the random stream of each row
  key: jax.Array
  passes: jax.Array         # of the trunk, a row each
  accepted: jax.Array       # drafts that were right


def verify(p_BWV: jax.Array, q_BDV: jax.Array, drafts_BD: jax.Array, uniform_BD: jax.Array, keys_B: jax.Array
           ) -> tuple[jax.Array, jax.Array]:
  """How many drafts are accepted, [B], and the token after them.

  A draft x, drawn from q, is accepted with probability min(1, p(x) / q(x)); in place of the first that is not, a token
  is drawn from max(0, p - q), normalised; after the last, one from p. So each token is distributed as p, the model's
  probabilities: after none of the drafts, after the first, ..., after all. `uniform` is in [0, 1).
  """
  of = lambda table: jnp.take_along_axis(table, drafts_BD[..., None], axis=2)[..., 0]
  right = uniform_BD * of(q_BDV) < of(p_BWV[:, :-1])
  accepted = jnp.sum(jnp.cumprod(right, axis=1), axis=1)
  q = jnp.pad(q_BDV, ((0, 0), (0, 1), (0, 0)))   # nothing was drafted after the last
  p, q = (jnp.take_along_axis(table, accepted[:, None, None], axis=1)[:, 0] for table in (p_BWV, q))
  rest = jnp.maximum(p - q, 0)
  rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)   # they may be equal, but for rounding
  return accepted, jax.vmap(jax.random.categorical)(keys_B, jnp.log(rest))


def _probabilities(logits_BTV: jax.Array, sampling: Sampling, vocab: int) -> jax.Array:
  """What tokens are drawn from; all of it on the most probable one where that is taken."""
  size = logits_BTV.shape[-1]
  logits = jnp.where(jnp.arange(size)[None] < vocab, logits_BTV.reshape(-1, size), -jnp.inf)   # a padded vocabulary
  logits = process(logits, sampling)
  p = jax.nn.one_hot(jnp.argmax(logits, -1), size) if sampling.greedy else jax.nn.softmax(logits)
  return p.reshape(logits_BTV.shape)


def _keys(stream_B: jax.Array, place_B: jax.Array, key: jax.Array, purpose: int) -> jax.Array:
  """One a row, by its text and how far it is, not by its company: 0 draws a token, 1 judges drafts, 1 + k drafts."""
  def one(stream, place):
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, stream), place), purpose)
  return jax.vmap(one)(stream_B, place_B)


def _by_row(function, *args: jax.Array, key: jax.Array):
  """Each shard does its own rows, over the whole vocabulary."""
  if (rows := sharding.spec('B')) is None:
    return function(*args, key)
  args = tuple(jax.sharding.reshard(x, P(*rows, *(None,) * (x.ndim - 1))) for x in args)
  return jax.shard_map(function, in_specs=(rows,) * len(args) + (P(),), out_specs=rows, check_vma=False)(*args, key)


def _take(x: jax.Array, at_BT: jax.Array) -> jax.Array:
  """`x[b, at[b, t]]`."""
  return jnp.take_along_axis(x, at_BT.reshape(*at_BT.shape, *(1,) * (x.ndim - 2)), axis=1)


def _draft(model: MultiToken, params: Any, head: Any, state: _State, sampling: Sampling, vocab: int, drafts: int
           ) -> _State:
  """Writes `drafts` tokens behind the last one, each by the module of its depth.

  The modules read all slots that the trunk's hidden states are given of: those since the last round, and those before
  whose tokens ahead were then drafted.
  """
  def propose(purpose, logits, stream, place, key):
    q = _probabilities(logits, sampling, vocab)[:, 0]
    return q, jax.vmap(jax.random.categorical)(_keys(stream, place, key, purpose), jnp.log(q))

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
    q, token = _by_row(functools.partial(propose, 1 + k), head(hidden[:, -1:]), state.stream_B, index - first,
                       key=state.key)
    tokens = write(tokens, token[:, None], index + k)
    caches.append(cache)
    drafted.append(q)
  return state._replace(tokens_BS=tokens, depths=tuple(caches), drafted_BDV=jnp.stack(drafted, axis=1))


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'vocab', 'slots', 'drafts'))
def _prefill(model, params, batch: Batch, stream_B, key, ends, *, sampling, vocab, slots, drafts) -> _State:
  """Reads prompts into new caches of `slots` slots, draws the first token and drafts the next. Empty rows are done."""
  def draw(logits, stream, place, key):
    p = _probabilities(logits, sampling, vocab)[:, 0]
    return jax.vmap(jax.random.categorical)(_keys(stream, place, key, 0), jnp.log(p))

  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  rows, width = batch.tokens.shape
  out = model.apply(params, batch, cache=model.init_cache(rows, slots))
  index, first = sharding.constrain(jnp.full(rows, width, jnp.int32), 'B'), jnp.sum(batch.segments == 0, axis=1)
  stream = sharding.constrain(stream_B, 'B')
  token = _by_row(draw, out.head(out.hidden[:, -1:]), stream, index - first - 1, key=key)
  tokens = jnp.pad(jnp.concatenate([batch.tokens, token[:, None]], axis=1), ((0, 0), (0, slots - width - 1)))
  done = (first == width) | (token[:, None] == ends[None]).any(-1)
  caches = model.init_depth_caches(rows, slots)[:drafts]
  state = _State(out.cache._replace(index=index), caches, out.hidden, tokens, None, first, done, stream, key,
                 jnp.int32(0), jnp.int32(0))
  return _draft(model, params, out.head, state, sampling, vocab, drafts)._replace(hidden=out.hidden[:, -2 * drafts:])


def _round(model, params, state: _State, stop, ends, sampling, vocab) -> _State:
  """One pass of the trunk over the last token and the drafts behind it; then new drafts."""
  def judge(logits, q, drafts, stream, place, key):
    uniform = jax.vmap(lambda key: jax.random.uniform(key, drafts.shape[1:]))(_keys(stream, place, key, 1))
    return verify(_probabilities(logits, sampling, vocab), q, drafts, uniform, _keys(stream, place, key, 0))

  index, first, drafts = state.cache.index, state.first_B, state.drafted_BDV.shape[1]
  slots = index[:, None] + jnp.arange(drafts + 1)[None]
  tokens = _take(state.tokens_BS, slots)
  positions = jnp.minimum(slots - first[:, None], model.max_length - 1)   # drafts may go beyond the last token
  out = model.apply(params, Batch(tokens, positions=positions), cache=state.cache)
  accepted, token = _by_row(judge, out.head(out.hidden), state.drafted_BDV, tokens[:, 1:], state.stream_B,
                            index - first, key=state.key)
  live = ~state.done_B
  accepted, steps = jnp.where(live, accepted, 0), jnp.where(live, accepted + 1, 0)
  tokens_BS = write(state.tokens_BS, token[:, None], index + accepted + 1)
  made = _take(tokens_BS, slots + 1)
  ended = (made[..., None] == ends[None, None]).any(-1) & (jnp.arange(drafts + 1)[None] <= accepted[:, None])
  n = state.hidden.shape[1]
  hidden = _take(jnp.concatenate([state.hidden, out.hidden], axis=1), steps[:, None] + jnp.arange(n)[None])
  state = state._replace(
      cache=out.cache._replace(index=index + steps), hidden=hidden, tokens_BS=tokens_BS,
      done_B=state.done_B | ended.any(-1) | (index + steps >= stop),
      passes=state.passes + jnp.sum(live), accepted=state.accepted + jnp.sum(accepted))
  return _draft(model, params, out.head, state, sampling, vocab, drafts)


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'vocab', 'rounds'), donate_argnames='state')
def _decode(model, params, state: _State, stop, ends, *, sampling, vocab, rounds) -> tuple[_State, tuple]:
  """Some rounds, fewer if all rows end; also the texts, how far they are, and the counts, on every device."""
  def go(carry):
    n, state = carry
    return n + 1, _round(model, params, state, stop, ends, sampling, vocab)

  _, state = jax.lax.while_loop(lambda carry: (carry[0] < rounds) & ~carry[1].done_B.all(), go, (jnp.int32(0), state))
  return state, _told(state)


@jax.jit
def _told(state: _State) -> tuple:
  return (sharding.constrain(state.tokens_BS, '--'), sharding.constrain(state.cache.index, '-'), state.done_B.all(),
          state.passes, state.accepted)


class SelfSpeculation:
  """For `generate.stream(..., draft=...)`, of a model that predicts further tokens; counts what came of it.

  Args:
    drafts: tokens that are drafted at a time; by default, as many as the model has depths.
  """

  def __init__(self, drafts: int | None = None):
    self.drafts, self.passes, self.accepted, self.proposed = drafts, 0, 0, 0

  @property
  def acceptance(self) -> float:
    """The share of the drafts that were accepted."""
    return self.accepted / max(self.proposed, 1)

  @property
  def tokens_per_pass(self) -> float:
    """Tokens that a forward pass of the trunk gave, on average, of a row that had not ended."""
    return 1 + self.accepted / max(self.passes, 1)

  def tokens(self, model: MultiToken, params: Any, texts: Sequence[np.ndarray], batch: Batch, tokenizer: Tokenizer,
             sampling: Sampling, max_tokens: int, seed: int) -> Iterator[list[np.ndarray]]:
    """See `generate.Draft`. ValueError where the model cannot draft so much, or with a repetition penalty."""
    rows, width = batch.tokens.shape
    depths = model.depths
    drafts = depths if self.drafts is None else self.drafts
    if not 1 <= drafts <= min(depths, width // 2):
      raise ValueError(f'drafts={drafts}: this model can draft 1 to {min(depths, width // 2)} tokens'
                       if depths else 'this model predicts no further tokens, so there is nothing to draft with')
    if sampling.repetition_penalty != 1:
      raise ValueError(f'repetition_penalty={sampling.repetition_penalty} is not supported with drafts; leave one out')
    ends, how = np.int32(tokenizer.eos_ids), {'sampling': sampling, 'vocab': tokenizer.vocab_size}
    params, stop = model.unstack(params), width + max_tokens - 1   # the slot of the last token
    state = _prefill(model, params, batch, streams(texts, rows, tokenizer.bos_id), seeds.key(seed), ends,
                     slots=-(-(stop + 2 + 2 * drafts) // 64) * 64, drafts=drafts, **how)
    shown, told, before = [width] * len(texts), _told(state), (self.passes, self.accepted)
    while True:
      made, index, done, passes, accepted = map(np.asarray, told)
      self.passes, self.accepted = before[0] + int(passes), before[1] + int(accepted)
      self.proposed = drafts * self.passes
      upto = np.minimum(index, stop) + 1
      yield [made[row, shown[row]:upto[row]] for row in range(len(texts))]
      if done:
        return
      shown = upto.tolist()
      state, told = _decode(model, params, state, np.int32(stop), ends, rounds=max(CHUNK // (drafts + 1), 1), **how)
