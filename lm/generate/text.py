"""Text from a model: strings in, strings out, a piece at a time. An `engine` decodes the tokens.

  for (piece,) in generate.stream(model, params, tokenizer, ['def '], generate.Sampling(top_p=0.9)):
    print(piece, end='', flush=True)

A completion is a function of the seed, the prompt, and the number of equal prompts before it. The other prompts of the
batch do not change it. Shapes: the legend in `models/transformer.py`.
"""
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.data.batch import Batch
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.completion import Completion, Draft, complete, complete_past_context, prompt_batch
from lm.generate.drafted_steps import Drafter
from lm.generate.grammars import Grammar, check_sampling
from lm.generate.sampling import Sampling
from lm.generate.text_stream import TextStream, with_bos
from lm.models.transformer import LanguageModel

PLAIN = Sampling()
DEFAULT = 128   # the number of tokens to write if none is given and the context has room for them


def token_count(model: LanguageModel, tokenizer: Tokenizer, batch: Batch, max_tokens: int | None,
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


def encode(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], bos: bool | None
            ) -> tuple[list[np.ndarray], Batch]:
  """Returns the ids of each prompt, and the batch that the model reads of them."""
  encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(prompts)]
  if not model.reads_source:
    encoded = [with_bos(ids, tokenizer, bos) for ids in encoded]
  return encoded, prompt_batch(model, encoded, tokenizer, adds_bos=False)


def room(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], bos: bool | None = None) -> int:
  """Returns the number of tokens that the context has room for after the longest of the prompts."""
  _, batch = encode(model, tokenizer, prompts, bos)
  return model.max_length - int((batch.segments > 0).sum(1).max())


def stream(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling = PLAIN,
           *, max_tokens: int | None = None, stop: Sequence[str] = (), seed: int = 0,
           mark: Callable[[Batch], Batch] = lambda batch: batch, draft: Draft | Drafter | None = None,
           bos: bool | None = None, window: bool = False, grammar: Grammar | None = None) -> Iterator[list[str]]:
  """Yields the completions of all prompts piece by piece; each item has the next piece of each, which may be empty.

  Pieces hold whole characters. A completion ends before any of the tokenizer's `eos_ids` and of the `stop_ids` of the
  sampling, before the first of the `stop` strings, or after `max_tokens` tokens. On a mesh, call it inside
  `jax.set_mesh`.

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
    draft: drafts several tokens for each forward pass of the model; see `drafted_steps` and `speculative`.
    bos: whether a prompt begins with bos; None decides by `tokenizer.adds_bos`. An empty prompt always does.
    window: whether to go on past the context: where it is full, its last half is read again.
    grammar: what each completion has to match, from `Grammars.compile`; None for any text.

  Raises:
    ValueError: a prompt and `max_tokens` are longer than the model's `max_length`; `stop` has an empty string; the
      sampling names an id that the tokenizer does not have; the model is an encoder; the parser of the grammar reaches
      its limits.
  """
  if isinstance(prompts, str) or isinstance(stop, str) or '' in stop:
    raise ValueError(f'prompts and stop must be lists of strings, and no stop string empty; stop={stop!r}')
  if not prompts:
    return
  sampling.check_ids(tokenizer.vocab_size)
  encoded, batch = encode(model, tokenizer, prompts, bos)
  max_tokens = token_count(model, tokenizer, batch, max_tokens, window)
  if window and draft is not None and not isinstance(draft, Drafter):
    raise ValueError('these drafts are not made past the context; leave out either the drafts or the window')
  before = [ids[segments > 0] for ids, segments in zip(batch.tokens, batch.segments[:len(encoded)])]
  texts = [TextStream(tokenizer, ids[int(ids[0] == tokenizer.bos_id):], stop, sampling.stop_ids)   # without bos
           for ids in before]
  matchers = []
  if grammar is not None:
    check_sampling(sampling)
    matchers = [grammar.start(sampling.stop_ids) for _ in encoded]
  request = Completion(model, params, tokenizer, sampling, max_tokens, seed, draft, matchers)
  for pieces in _pieces(request, encoded, mark(batch)):
    yield [''.join(map(text.push, row)) for text, row in zip(texts, pieces)]
    if all(text.has_ended for text in texts):
      return
  yield [text.end() for text in texts]


def generate(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[str],
             sampling: Sampling = PLAIN, *, max_tokens: int | None = None, stop: Sequence[str] = (), seed: int = 0,
             mark: Callable[[Batch], Batch] = lambda batch: batch, draft: Draft | Drafter | None = None,
             bos: bool | None = None, window: bool = False, grammar: Grammar | None = None) -> list[str]:
  """Returns the completion of each prompt, without the prompt; see `stream`."""
  pieces = stream(model, params, tokenizer, prompts, sampling, max_tokens=max_tokens, stop=stop, seed=seed, mark=mark,
                  draft=draft, bos=bos, window=window, grammar=grammar)
  return [''.join(column) for column in zip(*pieces)]


def tokens(model: LanguageModel, params: Any, tokenizer: Tokenizer, prompts: Sequence[np.ndarray],
           sampling: Sampling = PLAIN, *, max_tokens: int | None = None, seed: int = 0,
           mark: Callable[[Batch], Batch] = lambda batch: batch) -> list[np.ndarray]:
  """Like `generate`, but takes token ids, without bos, and returns token ids, without the one that ends them."""
  sampling.check_ids(tokenizer.vocab_size)
  if not prompts:
    return []
  batch = prompt_batch(model, prompts, tokenizer)
  max_tokens = token_count(model, tokenizer, batch, max_tokens)
  request = Completion(model, params, tokenizer, sampling, max_tokens, seed)
  if not model.reads_source:
    prompts = [np.int32([tokenizer.bos_id, *ids]) for ids in prompts]
  pieces = zip(*_pieces(request, prompts, mark(batch)))
  rows = [np.concatenate(row) for row in pieces]
  return [row[np.cumsum(np.isin(row, request.ends)) == 0] for row in rows]


def _pieces(request: Completion, prompts: Sequence[np.ndarray], batch: Batch) -> Iterator[list[np.ndarray]]:
  if request.model.reads_source or request.draft is not None and not isinstance(request.draft, Drafter):
    return complete(request, prompts, batch)
  return complete_past_context(request, prompts, batch)
