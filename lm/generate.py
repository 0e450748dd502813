"""Text from a model: sampling, decoding with a key/value cache, streaming.

  for (piece,) in generate.stream(model, params, tokenizer, ['def '], generate.Sampling(top_p=0.9)):
    print(piece, end='', flush=True)

A completion is a function of (seed, prompt, how many equal prompts stand before it): not of its company in the batch.
Shapes: the legend in `models/transformer.py`.
"""
import codecs
import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import seeds, sharding
from lm.data.batches import Batch
from lm.data.tokenizer import Tokenizer
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer import Cache, Model, Output

CHUNK = 16   # tokens made between two looks at the text: few enough to read along, enough to hide the call


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. The filters apply in the order of vLLM: penalty, temperature, min_p, top_k, top_p.

  Args:
    temperature: divides the logits; 0 takes the most probable token (as below 1e-5; below 0.01 acts as 0.01).
    top_k: keeps the k most probable tokens, and ties of the last; 0 (or -1) keeps all.
    top_p: keeps the smallest set of tokens whose mass reaches p (Holtzman et al. 2020); 1 keeps all.
    min_p: keeps tokens of at least this share of the greatest probability (Nguyen et al. 2024); 0 keeps all.
    repetition_penalty: makes tokens of prompt and output less likely (Keskar et al. 2019); 1 does nothing.
  """
  temperature: float = 1.
  top_k: int = 0
  top_p: float = 1.
  min_p: float = 0.
  repetition_penalty: float = 1.

  def __post_init__(self):
    for name, valid, allowed in (
        ('temperature', 0 <= self.temperature < math.inf, '0 (greedy) or more'),
        ('top_k', self.top_k >= -1 and self.top_k % 1 == 0, 'a whole number, 0 (off) or more'),
        ('top_p', 0 < self.top_p <= 1, 'more than 0 and at most 1 (off)'),
        ('min_p', 0 <= self.min_p <= 1, 'between 0 (off) and 1'),
        ('repetition_penalty', 0 < self.repetition_penalty < math.inf, 'more than 0; 1 is off')):
      if not valid:
        raise ValueError(f'{name}={getattr(self, name)} must be {allowed}')

  @property
  def greedy(self) -> bool:
    return self.temperature < 1e-5


# Filters: float32 logits [B, V] -> logits, at -inf where a token is ruled out.


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
  """Divides the positive logits of seen tokens by `penalty`, multiplies the negative ones by it."""
  return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def keep_min_p(logits_BV: jax.Array, share: float) -> jax.Array:
  """Rules out tokens less probable than `share` times the most probable one."""
  return jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True) + math.log(share), logits_BV, -jnp.inf)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
  """Rules out tokens below the k-th greatest logit; its ties stay."""
  least = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
  return jnp.where(logits_BV >= least, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, mass: float) -> jax.Array:
  """Rules out the least probable tokens that together hold at most 1 - `mass`; of ties, the earlier ids first."""
  order = jnp.argsort(logits_BV, axis=-1)
  ascending = jax.nn.softmax(jnp.take_along_axis(logits_BV, order, -1))
  dropped = (jnp.cumsum(ascending, -1) <= 1 - mass).at[:, -1].set(False)
  return jnp.where(jnp.put_along_axis(dropped, order, dropped, axis=-1, inplace=False), -jnp.inf, logits_BV)


def process(logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None) -> jax.Array:
  """The logits that tokens are drawn from. `seen_BV`: tokens of prompt and output, where there is a penalty."""
  logits = logits_BV.astype(jnp.float32)
  if sampling.repetition_penalty != 1:
    logits = penalize(logits, seen_BV, sampling.repetition_penalty)
  if sampling.greedy:   # the filters keep the most probable token
    return logits
  logits = logits / max(sampling.temperature, 0.01)
  if sampling.min_p > 0:
    logits = keep_min_p(logits, sampling.min_p)
  if sampling.top_k > 0:
    logits = keep_top_k(logits, sampling.top_k)
  if sampling.top_p < 1:
    logits = keep_top_p(logits, sampling.top_p)
  return logits


# Decoding.


class _State(NamedTuple):
  """What decoding carries from token to token, for B rows."""
  cache: Cache
  token_B: jax.Array            # the last token of each row, not yet in the cache
  position_B: jax.Array         # and its place in the text
  done_B: jax.Array             # rows that have ended
  seen_BV: jax.Array | None     # tokens of prompt and output; None without a penalty
  stream_B: jax.Array           # the random stream of each row, uint32
  key: jax.Array
  step: jax.Array               # tokens made


def _draw(state: _State, out: Output, sampling: Sampling, vocab: int, ends: jax.Array) -> _State:
  """The state with one more token, from the last position of a forward pass."""
  def local(logits, seen, stream, key, step):
    logits = jnp.where(jnp.arange(logits.shape[-1])[None] < vocab, logits, -jnp.inf)   # a padded vocabulary
    logits = process(logits, sampling, seen)
    if sampling.greedy:
      token = jnp.argmax(logits, -1)
    else:
      keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), step))(stream)
      token = jax.vmap(jax.random.categorical)(keys, logits)
    return token, None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)

  if (rows := sharding.spec('B')) is not None:   # each shard draws for its own rows, over the whole vocabulary
    local = jax.shard_map(local, in_specs=(rows, rows, rows, P(), P()), out_specs=rows, check_vma=False)
  logits = sharding.constrain(out.head(out.hidden[:, -1:])[:, 0], 'B-')
  token, seen = local(logits, state.seen_BV, state.stream_B, state.key, state.step)
  token = jnp.where(state.done_B, ends[0], token)
  return state._replace(cache=out.cache, token_B=token, position_B=state.position_B + 1, seen_BV=seen,
                        done_B=state.done_B | (token[:, None] == ends[None]).any(-1), step=state.step + 1)


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'vocab', 'slots'))
def _prefill(model, params, batch: Batch, seen_BV, stream_B, key, ends, *, sampling, vocab, slots) -> _State:
  """Reads prompts into a new cache of `slots` slots and draws the first token. Empty rows are done."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  out = model.apply(params, batch, cache=model.init_cache(len(batch.tokens), slots))
  seen = None if seen_BV is None else sharding.constrain(seen_BV, 'B-')
  state = _State(out.cache, batch.tokens[:, -1], batch.positions[:, -1], batch.segments[:, -1] == 0, seen,
                 sharding.constrain(stream_B, 'B'), key, jnp.int32(0))
  return _draw(state, out, sampling, vocab, ends)


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'vocab'), donate_argnames='state')
def _decode(model, params, state: _State, limit, ends, *, sampling, vocab) -> tuple[_State, jax.Array]:
  """Up to `limit` more tokens, fewer if all rows end: [B, CHUNK], filled up with `ends[0]`, on every device."""
  def step(carry):
    n, state, made = carry
    batch = Batch(state.token_B[:, None], positions=state.position_B[:, None])
    state = _draw(state, model.apply(params, batch, cache=state.cache), sampling, vocab, ends)
    return n + 1, state, jax.lax.dynamic_update_slice(made, state.token_B[:, None], (0, n))

  made = sharding.constrain(jnp.full((len(state.token_B), CHUNK), ends[0]), 'BT')
  _, state, made = jax.lax.while_loop(lambda carry: (carry[0] < limit) & ~carry[1].done_B.all(), step,
                                      (jnp.int32(0), state, made))
  return state, sharding.constrain(made, '--')


def _prompts(model: Model, texts: Sequence[np.ndarray], tokenizer: Tokenizer, adds_bos: bool = True) -> Batch:
  """One row a text, after bos with `adds_bos`, and as many more as the mesh needs."""
  mesh = jax.sharding.get_abstract_mesh()
  multiple = 1 if mesh.empty else mesh.shape['data']
  return model.prompt(texts, -(-len(texts) // multiple) * multiple, tokenizer.bos_id, tokenizer.eos_id,
                      adds_bos)


def _begins(ids: np.ndarray, tokenizer: Tokenizer, bos: bool | None) -> np.ndarray:
  """A prompt that begins with bos, or does not; None: as it was encoded, or as the tokenizer's rule says."""
  has = len(ids) > 0 and ids[0] == tokenizer.bos_id
  wanted = has or tokenizer.adds_bos if bos is None else bos
  return ids if has == wanted else np.int32([tokenizer.bos_id, *ids]) if wanted else ids[1:]


def _check(model: Model, tokenizer: Tokenizer, batch: Batch, max_tokens: int) -> None:
  if max_tokens < 1:
    raise ValueError(f'max_tokens={max_tokens} must be at least 1')
  if tokenizer.vocab_size > model.vocab:
    raise ValueError(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab}; '
                     'use the tokenizer that the model was trained with')
  if (longest := int((batch.segments > 0).sum(1).max())) + max_tokens > model.max_length:
    raise ValueError(f'a prompt of {longest} tokens (with bos) and max_tokens={max_tokens} are more than the '
                     f'{model.max_length} that the model can place; shorten one of them')


def streams(texts: Sequence[np.ndarray], rows: int, bos: int) -> np.ndarray:
  """The random stream of each row, uint32: of its text and how many equal ones stand before it."""
  found, copies = np.zeros(rows, np.uint32), collections.Counter()
  for row, ids in enumerate(texts):
    known = np.int32(ids if len(ids) and ids[0] == bos else [bos, *ids]).tobytes()
    found[row] = zlib.crc32(known, copies[known])
    copies[known] += 1
  return found


def _tokens(model: Model, params: Any, texts: Sequence[np.ndarray], batch: Batch, tokenizer: Tokenizer,
            sampling: Sampling, max_tokens: int, seed: int) -> Iterator[np.ndarray]:
  """New tokens after each text, [texts, 1 to CHUNK] at a time; after its end, a row repeats eos."""
  rows, width = batch.tokens.shape
  stream, seen = streams(texts, rows, tokenizer.bos_id), None
  if sampling.repetition_penalty != 1:
    seen = np.zeros((rows, model.vocab), bool)
    row, column = np.nonzero(batch.segments)
    seen[row, batch.tokens[row, column]] = True
  ends, how = np.int32(tokenizer.eos_ids), {'sampling': sampling, 'vocab': tokenizer.vocab_size}
  params = model.unstack(params)
  state = _prefill(model, params, batch, seen, stream, seeds.key(seed), ends,
                   slots=-(-(width + max_tokens) // 64) * 64, **how)
  yield np.asarray(sharding.constrain(state.token_B, '-'))[:len(texts), None]
  for left in range(max_tokens - 1, 0, -CHUNK):
    state, made = _decode(model, params, state, np.int32(min(left, CHUNK)), ends, **how)
    yield np.asarray(made)[:len(texts), :left]


class Draft(Protocol):
  def tokens(self, model: Any, params: Any, texts: Sequence[np.ndarray], batch: Batch, tokenizer: Tokenizer,
             sampling: Sampling, max_tokens: int, seed: int) -> Iterator[Sequence[np.ndarray]]:
    """New tokens after each text, some at a time, not as many for each; what comes after its end does not count."""


# Text.


class _Text:
  """One row's tokens, as text that is safe to show: whole characters, and no part of a stop string."""

  def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str]):
    # The prompt gives context: the first new token may or may not begin with a space.
    self._tokenizer, self._ids, self._shown, self._known = tokenizer, prompt.tolist(), 0, len(prompt)
    self._stop, self._hold, self._held, self.done = stop, max(map(len, stop), default=1) - 1, '', False

  def push(self, token: int) -> str:
    """Adds a token; returns the text that it makes certain."""
    if self.done or token in self._tokenizer.eos_ids:
      return self.end()
    self._ids.append(int(token))
    old, new = self._decode()
    if len(new) <= len(old) or new.endswith('\ufffd'):   # perhaps the first bytes of a character
      return ''
    self._shown, self._known = self._known, len(self._ids)
    return self._release(new[len(old):])

  def end(self) -> str:
    """What was held back. A character that is still incomplete is dropped."""
    if self.done:
      return ''
    old, new = self._decode()
    text = self._release(self._whole(new[len(old):]))
    if not self.done:   # no stop string
      text, self.done = text + self._held, True
    return text

  def _whole(self, text: str) -> str:
    """The last text without the U+FFFD of an incomplete character; one that the model wrote stays."""
    if not text.endswith('\ufffd'):
      return text
    complete = codecs.getincrementaldecoder('utf-8')('replace').decode(
        self._tokenizer.decode_bytes(self._ids[self._shown:]))
    written = len(complete) - len(complete.rstrip('\ufffd'))
    return text[:len(text.rstrip('\ufffd')) + written]

  def _decode(self) -> tuple[str, str]:
    """The text of the last piece, and of it with all that came since: what a token reads as depends on those before."""
    return self._tokenizer.decode(self._ids[self._shown:self._known]), self._tokenizer.decode(self._ids[self._shown:])

  def _release(self, text: str) -> str:
    self._held += text
    found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
    self.done = bool(found)
    at = min(found, default=max(len(self._held) - self._hold, 0))
    text, self._held = self._held[:at], self._held[at:]
    return text


def stream(model: Model, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling = Sampling(),
           *, max_tokens: int = 128, stop: Sequence[str] = (), seed: int = 0,
           mark: Callable[[Batch], Batch] = lambda batch: batch, draft: Draft | None = None, bos: bool | None = None
           ) -> Iterator[list[str]]:
  """Completions of all prompts, piece by piece: each item holds the next piece (perhaps empty) of each completion.

  A prompt begins with bos where `tokenizer.adds_bos`, or as `bos` says, and where it is empty; an encoder-decoder reads
  the prompt as its source, and bos starts what it writes. A completion ends at any of the tokenizer's `eos_ids`, before
  the first of the `stop` strings, or after `max_tokens` tokens. Pieces hold whole characters. With
  `mark=objective.prompt`, prompts are read as in training. With a `draft`, several tokens may come of one forward pass
  (see `speculative`). On a mesh, call it inside `jax.set_mesh`.

  Raises:
    ValueError: a prompt and `max_tokens` are longer than the model's `max_length`; `stop` has an empty string; the
      model is an encoder.
  """
  if isinstance(prompts, str) or isinstance(stop, str) or '' in stop:
    raise ValueError(f'prompts and stop must be lists of strings, and no stop string empty; stop={stop!r}')
  if not prompts:
    return
  encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(prompts)]
  if not isinstance(model, EncoderDecoder):
    encoded = [_begins(ids, tokenizer, bos) for ids in encoded]
  batch = _prompts(model, encoded, tokenizer, adds_bos=False)
  _check(model, tokenizer, batch, max_tokens)
  before = [ids[segments > 0] for ids, segments in zip(batch.tokens, batch.segments[:len(encoded)])]
  texts = [_Text(tokenizer, ids[int(ids[0] == tokenizer.bos_id):], stop) for ids in before]   # without bos
  make = _tokens if draft is None else draft.tokens
  for made in make(model, params, encoded, mark(batch), tokenizer, sampling, max_tokens, seed):
    yield [''.join(map(text.push, row)) for text, row in zip(texts, made)]
    if all(text.done for text in texts):
      return
  yield [text.end() for text in texts]


def generate(model: Model, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling = Sampling(),
             *, max_tokens: int = 128, stop: Sequence[str] = (), seed: int = 0,
             mark: Callable[[Batch], Batch] = lambda batch: batch, draft: Draft | None = None, bos: bool | None = None
             ) -> list[str]:
  """The completion of each prompt, without the prompt; see `stream`."""
  pieces = stream(model, params, tokenizer, prompts, sampling, max_tokens=max_tokens, stop=stop, seed=seed, mark=mark,
                  draft=draft, bos=bos)
  return [''.join(column) for column in zip(*pieces)]


def tokens(model: Model, params: Any, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], sampling=Sampling(), *,
           max_tokens: int = 128, seed: int = 0, mark: Callable[[Batch], Batch] = lambda batch: batch
           ) -> list[np.ndarray]:
  """As `generate`, from token ids (bos is put in front) to token ids (without the eos that ends them)."""
  _check(model, tokenizer, batch := _prompts(model, prompts, tokenizer), max_tokens)
  made = list(_tokens(model, params, prompts, mark(batch), tokenizer, sampling, max_tokens, seed))
  return [row[np.cumsum(np.isin(row, tokenizer.eos_ids)) == 0] for row in np.concatenate(made, axis=1)]
