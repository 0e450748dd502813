"""Text from a model: strings in, strings out, piece by piece; an `engine` writes the tokens.

  for (piece,) in generate.stream(model, params, tokenizer, ['def '], generate.Sampling(top_p=0.9)):
    print(piece, end='', flush=True)

A completion is a function of (seed, prompt, how many equal prompts stand before it): not of its company in the batch.
Shapes: the legend in `models/transformer.py`.
"""
import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.data.batch import Batch
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.completion import Draft, Request, complete, complete_past, prompts_of
from lm.generate.sampling import Sampling
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer import LanguageModel

PLAIN = Sampling()
DEFAULT = 128   # tokens to write where nothing else is said and there is room


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
    places = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
    self.done = bool(places)
    end = min(places, default=max(len(self._held) - self._hold, 0))
    text, self._held = self._held[:end], self._held[end:]
    return text


def _encoded(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], bos: bool | None
             ) -> tuple[list[np.ndarray], Batch]:
  encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(prompts)]
  if not isinstance(model, EncoderDecoder):
    encoded = [_begins(ids, tokenizer, bos) for ids in encoded]
  return encoded, prompts_of(model, encoded, tokenizer, adds_bos=False)


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
  request = Request(model, params, tokenizer, sampling, max_tokens, seed, draft)
  for pieces in _pieces(request, encoded, mark(batch)):
    yield [''.join(map(text.push, row)) for text, row in zip(texts, pieces)]
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
  batch = prompts_of(model, prompts, tokenizer)
  request = Request(model, params, tokenizer, sampling, _check(model, tokenizer, batch, max_tokens), seed)
  if not isinstance(model, EncoderDecoder):
    prompts = [np.int32([tokenizer.bos_id, *ids]) for ids in prompts]
  pieces = zip(*_pieces(request, prompts, mark(batch)))
  rows = [np.concatenate(row) for row in pieces]
  return [row[np.cumsum(np.isin(row, tokenizer.eos_ids)) == 0] for row in rows]


def _pieces(request: Request, prompts: Sequence[np.ndarray], batch: Batch) -> Iterator[list[np.ndarray]]:
  once = isinstance(request.model, EncoderDecoder) or request.draft is not None
  return (complete if once else complete_past)(request, prompts, batch)
