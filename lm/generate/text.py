"""Text from a model: sampling, decoding with a key/value cache, streaming.

  for (piece,) in generate.stream(model, params, tokenizer, ['def '], generate.Sampling(top_p=0.9)):
    print(piece, end='', flush=True)

A completion is a function of (seed, prompt, how many equal prompts stand before it): not of its company in the batch.
Shapes: the legend in `models/transformer.py`.
"""
import codecs
import collections
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import seeds, sharding
from lm.data.batch import Batch
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, penalize, process
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer import Cache, LanguageModel, Output

__all__ = ['Sampling', 'penalize', 'keep_min_p', 'keep_top_k', 'keep_top_p', 'process', 'stream', 'generate', 'tokens',
           'room']

PLAIN = Sampling()
DEFAULT = 128   # tokens to write where nothing else is said and there is room
CHUNK = 16   # tokens made between two looks at the text: few enough to read along, enough to hide the call


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
def _prefill(model, params, batch: Batch, seen_BV, stream_B, key, ends, step, *, sampling, vocab, slots) -> _State:
  """Reads prompts into a new cache of `slots` slots and draws the token after them, number `step`. Empty rows are done.
  """
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  out = model.apply(params, batch, cache=model.init_cache(len(batch.tokens), slots))
  seen = None if seen_BV is None else sharding.constrain(seen_BV, 'B-')
  state = _State(out.cache, batch.tokens[:, -1], batch.positions[:, -1], batch.segments[:, -1] == 0, seen,
                 sharding.constrain(stream_B, 'B'), key, step)
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


def _prompts(model: LanguageModel, texts: Sequence[np.ndarray], tokenizer: Tokenizer, adds_bos: bool = True) -> Batch:
  """A row for each text, after bos with `adds_bos`, and empty rows up to what the mesh can split."""
  return model.prompt(texts, sharding.padded_rows(len(texts)), tokenizer.bos_id, tokenizer.eos_id, adds_bos)


def _begins(ids: np.ndarray, tokenizer: Tokenizer, bos: bool | None) -> np.ndarray:
  """A prompt that begins with bos, or does not; None: as it was encoded, or as the tokenizer's rule says."""
  has = len(ids) > 0 and ids[0] == tokenizer.bos_id
  wanted = has or tokenizer.adds_bos if bos is None else bos
  return ids if has == wanted else np.int32([tokenizer.bos_id, *ids]) if wanted else ids[1:]


def _check(model: LanguageModel, tokenizer: Tokenizer, batch: Batch, max_tokens: int | None,
           window: bool = False) -> int:
  """The tokens to write; None: `DEFAULT`, or what the context has room for. ValueError where it cannot be done."""
  longest = int((batch.segments > 0).sum(1).max())
  if max_tokens is None:
    max_tokens = DEFAULT if window else max(min(DEFAULT, model.max_length - longest), 1)
  if max_tokens < 1:
    raise ValueError(f'max_tokens={max_tokens} must be at least 1')
  if window and (isinstance(model, EncoderDecoder) or longest >= model.max_length):
    raise ValueError('window=True goes on past the context of decoders alone, and leaves room for a token after a '
                     f'prompt; this one has {longest} tokens of {model.max_length} that the model reads at once')
  if tokenizer.vocab_size > model.vocab:
    raise ValueError(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab}; '
                     'use the tokenizer that the model was trained with')
  if longest + max_tokens > model.max_length and not window:
    raise ValueError(f'a prompt of {longest} tokens (with bos) and max_tokens={max_tokens} are more than the '
                     f'{model.max_length} that the model reads at once; shorten one of them, or go on past the context '
                     'with a window (--window)')
  return max_tokens


def streams(texts: Sequence[np.ndarray], rows: int, bos: int) -> np.ndarray:
  """The random stream of each row, uint32: of its text and how many equal ones stand before it."""
  found, copies = np.zeros(rows, np.uint32), collections.Counter()
  for row, ids in enumerate(texts):
    known = np.int32(ids if len(ids) and ids[0] == bos else [bos, *ids]).tobytes()
    found[row] = zlib.crc32(known, copies[known])
    copies[known] += 1
  return found


def _tokens(model: LanguageModel, params: Any, texts: Sequence[np.ndarray], batch: Batch, tokenizer: Tokenizer,
            sampling: Sampling, max_tokens: int, seed: int, stream: np.ndarray | None = None, step: int = 0,
            whole: Sequence[np.ndarray] = ()) -> Iterator[np.ndarray]:
  """New tokens after each text, [texts, 1 to CHUNK] at a time; after its end, a row repeats eos.

  `stream` and `step` are those of texts that go on, which have so many new tokens already. `whole` are the texts with
  what was left behind of them: a penalty is for all of their tokens.
  """
  rows, width = batch.tokens.shape
  stream, seen = streams(texts, rows, tokenizer.bos_id) if stream is None else stream, None
  if sampling.repetition_penalty != 1:
    seen = np.zeros((rows, model.vocab), bool)
    row, column = np.nonzero(batch.segments)
    seen[row, batch.tokens[row, column]] = True
    for row, ids in enumerate(whole):
      seen[row, ids] = True
  ends, how = np.int32(tokenizer.eos_ids), {'sampling': sampling, 'vocab': tokenizer.vocab_size}
  params = model.unstack(params)
  state = _prefill(model, params, batch, seen, stream, seeds.key(seed), ends, np.int32(step),
                   slots=-(-(width + max_tokens) // 64) * 64, **how)
  yield np.asarray(sharding.constrain(state.token_B, '-'))[:len(texts), None]
  for left in range(max_tokens - 1, 0, -CHUNK):
    state, made = _decode(model, params, state, np.int32(min(left, CHUNK)), ends, **how)
    yield np.asarray(made)[:len(texts), :left]


def _reread(model: LanguageModel, params: Any, texts: Sequence[np.ndarray], batch: Batch, tokenizer: Tokenizer,
            sampling: Sampling, max_tokens: int, seed: int) -> Iterator[np.ndarray]:
  """As `_tokens`, of texts with all control tokens, which are read again where a cache cannot go on.

  That is at the token with which a text passes LongRoPE's original context, as in transformers' `generate`; and where
  the context is full: then the last half of the text, after its bos, is the text.
  """
  original, step, stream = model.original_context, 0, None
  whole, prompts = list(texts), [len(ids) for ids in texts]
  texts = whole
  while step < max_tokens:
    if max(map(len, texts)) >= model.max_length:
      if batch.bidirectional is not None:
        raise ValueError('a prompt that is read bidirectionally cannot be left behind; leave out the window')
      half = model.max_length // 2
      texts = [ids if len(ids) <= half else np.r_[ids[:int(ids[0] == tokenizer.bos_id)], ids[-half:]] for ids in texts]
    if step:
      bidirectional = batch.bidirectional
      batch = _prompts(model, texts, tokenizer, adds_bos=False)
      if bidirectional is not None:   # of the prompts alone, as they were read at first
        columns = batch.positions < np.array([*prompts, *[0] * (len(batch.tokens) - len(texts))])[:, None]
        batch = batch._replace(bidirectional=columns & (batch.segments > 0))
    else:
      stream = streams(texts, len(batch.tokens), tokenizer.bos_id)
    passes = [original + 1 - len(ids) for ids in texts if original is not None and len(ids) <= original]
    count = min(max_tokens - step, model.max_length - max(map(len, texts)), *passes)
    pieces = []
    for piece in _tokens(model, params, texts, batch, tokenizer, sampling, count, seed, stream, step, whole):
      pieces.append(piece)
      yield piece
    step += count
    if step < max_tokens:
      new = np.concatenate(pieces, axis=1)
      texts, whole = ([np.r_[ids, row].astype(np.int32) for ids, row in zip(rows, new)] for rows in (texts, whole))


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


def _encoded(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], bos: bool | None
             ) -> tuple[list[np.ndarray], Batch]:
  encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(prompts)]
  if not isinstance(model, EncoderDecoder):
    encoded = [_begins(ids, tokenizer, bos) for ids in encoded]
  return encoded, _prompts(model, encoded, tokenizer, adds_bos=False)


def room(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], bos: bool | None = None) -> int:
  """The tokens that the context has room for after the longest of the prompts."""
  return model.max_length - int((_encoded(model, tokenizer, prompts, bos)[1].segments > 0).sum(1).max())


def stream(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling = PLAIN,
           *, max_tokens: int | None = None, stop: Sequence[str] = (), seed: int = 0,
           mark: Callable[[Batch], Batch] = lambda batch: batch, draft: Draft | None = None, bos: bool | None = None,
           window: bool = False) -> Iterator[list[str]]:
  """Completions of all prompts, piece by piece: each item holds the next piece (perhaps empty) of each completion.

  A prompt begins with bos where `tokenizer.adds_bos`, or as `bos` says, and where it is empty; an encoder-decoder reads
  the prompt as its source, and bos starts what it writes. A completion ends at any of the tokenizer's `eos_ids`, before
  the first of the `stop` strings, or after `max_tokens` tokens: None are 128, or as many as the context has room for,
  see `room`. With a `window`, it goes on past the context: where that is full, the last half of it is read again.
  Pieces hold whole characters. With `mark=objective.prompt`, prompts are read as in training. With a `draft`, several
  tokens may come of one forward pass (see `speculative`). On a mesh, call it inside `jax.set_mesh`.

  Raises:
    ValueError: a prompt and `max_tokens` are longer than the model's `max_length`; `stop` has an empty string; the
      model is an encoder.
  """
  if isinstance(prompts, str) or isinstance(stop, str) or '' in stop:
    raise ValueError(f'prompts and stop must be lists of strings, and no stop string empty; stop={stop!r}')
  if not prompts:
    return
  encoded, batch = _encoded(model, tokenizer, prompts, bos)
  max_tokens = _check(model, tokenizer, batch, max_tokens, window)
  if window and draft is not None:
    raise ValueError('drafts are not made past the context; leave out either the drafts or the window')
  before = [ids[segments > 0] for ids, segments in zip(batch.tokens, batch.segments[:len(encoded)])]
  texts = [_Text(tokenizer, ids[int(ids[0] == tokenizer.bos_id):], stop) for ids in before]   # without bos
  make = _tokens if isinstance(model, EncoderDecoder) else _reread
  make = make if draft is None else draft.tokens
  for made in make(model, params, encoded, mark(batch), tokenizer, sampling, max_tokens, seed):
    yield [''.join(map(text.push, row)) for text, row in zip(texts, made)]
    if all(text.done for text in texts):
      return
  yield [text.end() for text in texts]


def generate(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[str],
             sampling: Sampling = PLAIN,
             *, max_tokens: int | None = None, stop: Sequence[str] = (), seed: int = 0,
             mark: Callable[[Batch], Batch] = lambda batch: batch, draft: Draft | None = None, bos: bool | None = None,
             window: bool = False) -> list[str]:
  """The completion of each prompt, without the prompt; see `stream`."""
  pieces = stream(model, params, tokenizer, prompts, sampling, max_tokens=max_tokens, stop=stop, seed=seed, mark=mark,
                  draft=draft, bos=bos, window=window)
  return [''.join(column) for column in zip(*pieces)]


def tokens(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[np.ndarray],
           sampling: Sampling = PLAIN, *, max_tokens: int | None = None, seed: int = 0,
           mark: Callable[[Batch], Batch] = lambda batch: batch) -> list[np.ndarray]:
  """As `generate`, from token ids (bos is put in front) to token ids (without the eos that ends them)."""
  max_tokens = _check(model, tokenizer, batch := _prompts(model, prompts, tokenizer), max_tokens)
  make = _tokens
  if not isinstance(model, EncoderDecoder):
    make, prompts = _reread, [np.int32([tokenizer.bos_id, *ids]) for ids in prompts]
  made = list(make(model, params, prompts, mark(batch), tokenizer, sampling, max_tokens, seed))
  return [row[np.cumsum(np.isin(row, tokenizer.eos_ids)) == 0] for row in np.concatenate(made, axis=1)]
