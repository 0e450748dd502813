"""Text from a model: strings in, strings out, a piece at a time. An `engine` decodes the tokens.

  for (piece,) in generate.stream(model, params, tokenizer, ['def '], generate.Sampling(top_p=0.9)):
    print(piece, end='', flush=True)

A completion is a function of the seed, the prompt, and the number of equal prompts before it. The other prompts of the
batch do not change it. Shapes: the legend in `models/transformer.py`.
"""
import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.data.batch import Batch
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.completion import Draft, Request, complete, complete_past_context, prompt_batch
from lm.generate.sampling import Sampling
from lm.models.transformer import LanguageModel

PLAIN = Sampling()
DEFAULT = 128   # the number of tokens to write if none is given and the context has room for them


def _with_bos(ids: np.ndarray, tokenizer: Tokenizer, bos: bool | None) -> np.ndarray:
  """Returns a prompt with or without bos; None adds it if the tokenizer does, and keeps one that is in the prompt."""
  has_bos = len(ids) > 0 and ids[0] == tokenizer.bos_id
  needs_bos = has_bos or tokenizer.adds_bos if bos is None else bos
  if has_bos == needs_bos:
    return ids
  return np.int32([tokenizer.bos_id, *ids]) if needs_bos else ids[1:]


def _token_count(model: LanguageModel, tokenizer: Tokenizer, batch: Batch, max_tokens: int | None,
                 window: bool = False) -> int:
  """Returns the largest number of tokens to write; for `max_tokens=None`, DEFAULT or what the context has room for.

  Raises ValueError if the prompts and so many tokens do not fit the model, or if the tokenizer has too many tokens.
  """
  longest = int((batch.segments > 0).sum(1).max())
  if max_tokens is None:
    max_tokens = DEFAULT if window else max(min(DEFAULT, model.max_length - longest), 1)
  if max_tokens < 1:
    raise ValueError(f'max_tokens={max_tokens} must be at least 1')
  if window and (model.reads_source or longest >= model.max_length):
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
  """Decodes the tokens of one row into text that later tokens cannot change.

  It releases whole characters, and holds back text that may be the beginning of a stop string.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str]):
    # The prompt is context: whether the first new token begins with a space may depend on it.
    self._tokenizer, self._ids = tokenizer, prompt.tolist()
    # The text of ids[_start:_end] has been decoded. It is decoded again with the tokens that follow.
    self._start, self._end = 0, len(prompt)
    self._stop = stop
    self._stop_overlap = max(map(len, stop), default=1) - 1   # characters that may belong to a stop string
    self._pending = ''                                        # decoded text that is held back
    self.has_ended = False

  def push(self, token: int) -> str:
    """Adds a token. Returns the text that is certain now and was not before."""
    if self.has_ended or token in self._tokenizer.eos_ids:
      return self.end()
    self._ids.append(int(token))
    old, new = self._decode()
    if len(new) <= len(old) or new.endswith('\ufffd'):   # the token may end within a character
      return ''
    self._start, self._end = self._end, len(self._ids)
    return self._release(new[len(old):])

  def end(self) -> str:
    """Returns the text that was held back. A character that is still incomplete is dropped."""
    if self.has_ended:
      return ''
    old, new = self._decode()
    text = self._release(self._without_incomplete(new[len(old):]))
    if not self.has_ended:   # there is no stop string in it
      text += self._pending
      self.has_ended = True
    return text

  def _without_incomplete(self, text: str) -> str:
    """Returns the last text without the U+FFFD of an incomplete character; one that the model wrote stays."""
    if not text.endswith('\ufffd'):
      return text
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    complete = decoder.decode(self._tokenizer.decode_bytes(self._ids[self._start:]))
    written = len(complete) - len(complete.rstrip('\ufffd'))
    return text[:len(text.rstrip('\ufffd')) + written]

  def _decode(self) -> tuple[str, str]:
    """Returns the text of the last piece, and that of the piece with all tokens after it.

    They are decoded together, because the text of a token may depend on the tokens before it.
    """
    last = self._tokenizer.decode(self._ids[self._start:self._end])
    return last, self._tokenizer.decode(self._ids[self._start:])

  def _release(self, text: str) -> str:
    """Adds text, and returns what no stop string can cut off: the text before the first stop string ends the row."""
    self._pending += text
    places = [place for place in (self._pending.find(stop) for stop in self._stop) if place >= 0]
    self.has_ended = bool(places)
    end = min(places, default=max(len(self._pending) - self._stop_overlap, 0))
    text, self._pending = self._pending[:end], self._pending[end:]
    return text


def _encode(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], bos: bool | None
            ) -> tuple[list[np.ndarray], Batch]:
  """Returns the ids of each prompt, and the batch that the model reads of them."""
  encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(prompts)]
  if not model.reads_source:
    encoded = [_with_bos(ids, tokenizer, bos) for ids in encoded]
  return encoded, prompt_batch(model, encoded, tokenizer, adds_bos=False)


def room(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], bos: bool | None = None) -> int:
  """Returns the number of tokens that the context has room for after the longest of the prompts."""
  _, batch = _encode(model, tokenizer, prompts, bos)
  return model.max_length - int((batch.segments > 0).sum(1).max())


def stream(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling = PLAIN,
           *, max_tokens: int | None = None, stop: Sequence[str] = (), seed: int = 0,
           mark: Callable[[Batch], Batch] = lambda batch: batch, draft: Draft | None = None, bos: bool | None = None,
           window: bool = False) -> Iterator[list[str]]:
  """Yields the completions of all prompts piece by piece; each item has the next piece of each, which may be empty.

  Pieces hold whole characters. A completion ends at any of the tokenizer's `eos_ids`, before the first of the `stop`
  strings, or after `max_tokens` tokens. On a mesh, call it inside `jax.set_mesh`.

  Args:
    model: a decoder, or an encoder-decoder, which reads the prompt as its source and writes after bos.
    params: its parameters.
    tokenizer: the tokenizer that the model was trained with.
    prompts: the texts to continue.
    sampling: how a token is drawn.
    max_tokens: the largest number of tokens to write; None is 128, or as many as the context has `room` for.
    stop: strings that end a completion, and are not part of it.
    seed: of the random numbers.
    mark: marks the prompts as in training: the `prompt` of the run's objective.
    draft: drafts several tokens for each forward pass of the model; see `speculative`.
    bos: whether a prompt begins with bos; None decides by `tokenizer.adds_bos`. An empty prompt always does.
    window: whether to go on past the context: where it is full, its last half is read again.

  Raises:
    ValueError: a prompt and `max_tokens` are longer than the model's `max_length`; `stop` has an empty string; the
      model is an encoder.
  """
  if isinstance(prompts, str) or isinstance(stop, str) or '' in stop:
    raise ValueError(f'prompts and stop must be lists of strings, and no stop string empty; stop={stop!r}')
  if not prompts:
    return
  encoded, batch = _encode(model, tokenizer, prompts, bos)
  max_tokens = _token_count(model, tokenizer, batch, max_tokens, window)
  if window and draft is not None:
    raise ValueError('drafts are not made past the context; leave out either the drafts or the window')
  before = [ids[segments > 0] for ids, segments in zip(batch.tokens, batch.segments[:len(encoded)])]
  texts = [_Text(tokenizer, ids[int(ids[0] == tokenizer.bos_id):], stop) for ids in before]   # without bos
  request = Request(model, params, tokenizer, sampling, max_tokens, seed, draft)
  for pieces in _pieces(request, encoded, mark(batch)):
    yield [''.join(map(text.push, row)) for text, row in zip(texts, pieces)]
    if all(text.has_ended for text in texts):
      return
  yield [text.end() for text in texts]


def generate(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[str],
             sampling: Sampling = PLAIN, *, max_tokens: int | None = None, stop: Sequence[str] = (), seed: int = 0,
             mark: Callable[[Batch], Batch] = lambda batch: batch, draft: Draft | None = None, bos: bool | None = None,
             window: bool = False) -> list[str]:
  """Returns the completion of each prompt, without the prompt; see `stream`."""
  pieces = stream(model, params, tokenizer, prompts, sampling, max_tokens=max_tokens, stop=stop, seed=seed, mark=mark,
                  draft=draft, bos=bos, window=window)
  return [''.join(column) for column in zip(*pieces)]


def tokens(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[np.ndarray],
           sampling: Sampling = PLAIN, *, max_tokens: int | None = None, seed: int = 0,
           mark: Callable[[Batch], Batch] = lambda batch: batch) -> list[np.ndarray]:
  """Like `generate`, but takes token ids, without bos, and returns token ids, without the eos that ends them."""
  batch = prompt_batch(model, prompts, tokenizer)
  max_tokens = _token_count(model, tokenizer, batch, max_tokens)
  request = Request(model, params, tokenizer, sampling, max_tokens, seed)
  if not model.reads_source:
    prompts = [np.int32([tokenizer.bos_id, *ids]) for ids in prompts]
  pieces = zip(*_pieces(request, prompts, mark(batch)))
  rows = [np.concatenate(row) for row in pieces]
  return [row[np.cumsum(np.isin(row, tokenizer.eos_ids)) == 0] for row in rows]


def _pieces(request: Request, prompts: Sequence[np.ndarray], batch: Batch) -> Iterator[list[np.ndarray]]:
  if request.model.reads_source or request.draft is not None:
    return complete(request, prompts, batch)
  return complete_past_context(request, prompts, batch)
