"""Beam search: it continues the most probable beginnings of each length, and returns the texts with the highest scores.

The score of a text is the sum of the log-probabilities of its tokens, with that of the end, divided by their number to
the power of the length penalty. As in `transformers`, a step considers (1 + E) K candidates of K beams for E ids that
end a text, so that K of them go on; those among the best K that end are finished.

The model computes log-probabilities and the best tokens of each beam; the bookkeeping is done in NumPy, for each prompt
on its own. Shapes: the legend in `models/transformer.py`; R are the rows, K of them for each prompt, and M candidates.
"""
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.completion import round_up_slots
from lm.generate.engine import last_logits, map_shards, replicate
from lm.generate.text import encode, token_count
from lm.generate.text_stream import TextStream


@dataclasses.dataclass(frozen=True)
class Beams:
  """How beams are searched.

  Args:
    count: the number of beams, and of texts that are kept.
    length_penalty: the power of the length by which a sum of log-probabilities is divided; more favours longer texts.
    early_stopping: when the search ends after `count` texts are finished. 'true' is at once; 'false' is when the best
      beam, with its present length, scores no higher than the worst of these texts; 'never' is when it would not score
      higher with any length.
  """
  count: int = 4
  length_penalty: float = 1.
  early_stopping: Literal['true', 'false', 'never'] = 'false'

  def __post_init__(self):
    if self.count < 1:
      raise ValueError(f'beams={self.count} must be at least 1')
    if not np.isfinite(self.length_penalty):
      raise ValueError(f'length_penalty={self.length_penalty} must be a finite number')
    if self.early_stopping not in ('true', 'false', 'never'):
      raise ValueError(f'early_stopping={self.early_stopping!r} must be true, false or never')

  def candidates(self, ends: Sequence[int]) -> int:
    """Returns the number of candidates of a step, so that `count` of them go on, whichever of them end."""
    return max(2, 1 + len(ends)) * self.count


class Hypothesis(NamedTuple):
  """A text that has ended: its new ids, with the one that ends it, and its score."""
  ids: np.ndarray
  score: float


class ScoredText(NamedTuple):
  """A text and its score."""
  text: str
  score: float


@dataclasses.dataclass
class _Search:
  """The search for one prompt. `beams` are ids and sums of log-probabilities, the best first."""
  settings: Beams
  ends: Sequence[int]
  max_tokens: int
  beams: list[tuple[tuple[int, ...], np.float32]]
  finished: list[Hypothesis] = dataclasses.field(default_factory=list)   # the best first
  is_done: bool = False

  def add(self, log_probabilities_KM: np.ndarray, ids_KM: np.ndarray) -> list[int]:
    """Adds a token to the beams, given the best tokens after each. Returns the beams which the new ones continue."""
    sums = log_probabilities_KM[:len(self.beams)] + np.float32([total for _, total in self.beams])[:, None]
    settings, width, parents, beams = self.settings, sums.shape[1], [], []
    candidates = np.argsort(-sums, axis=None, kind='stable')[:settings.candidates(self.ends)]
    length = len(self.beams[0][0]) + 1
    for rank, candidate in enumerate(candidates):
      parent, column = divmod(int(candidate), width)
      ids, total = (*self.beams[parent][0], int(ids_KM[parent, column])), sums[parent, column]
      if ids[-1] in self.ends or length == self.max_tokens:
        if rank < settings.count and total > -np.inf:
          self.finished.append(Hypothesis(np.int32(ids), float(total) / length ** settings.length_penalty))
      elif len(beams) < settings.count:
        parents.append(parent)
        beams.append((ids, total))
    self.finished = sorted(self.finished, key=lambda text: -text.score)[:settings.count]
    self.beams = beams
    self.is_done = not beams or self._is_decided(length)
    return parents

  def _is_decided(self, length: int) -> bool:
    """Returns whether no beam can improve what is finished."""
    settings = self.settings
    if len(self.finished) < settings.count:
      return False
    if settings.early_stopping == 'true':
      return True
    best_length = self.max_tokens if settings.early_stopping == 'never' and settings.length_penalty > 0 else length
    return float(self.beams[0][1]) / best_length ** settings.length_penalty <= self.finished[-1].score


def _best_tokens(out: Any, vocab: int, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns the log-probabilities and the ids of the most probable tokens of each row, [R, M], on all devices."""
  def local(logits):
    table = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jax.lax.top_k(table[:, :vocab], count)

  return replicate(map_shards(local, last_logits(out)))


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'vocab', 'count'))
@sharding.whole_rows()
def _prefill(model, params, batch: Batch, rows, *, slots, vocab, count) -> tuple[Any, Any]:
  """Reads prompts. Returns the cache of the prompts `rows`, and the best tokens after each prompt."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  out = model.apply(params, batch, cache=model.init_cache(len(batch.tokens), slots))
  return sharding.take_rows(out.cache, rows), _best_tokens(out, vocab, count)


@functools.partial(jax.jit, static_argnames=('model', 'vocab', 'count'), donate_argnames='cache')
@sharding.whole_rows()
def _step(model, params, cache, rows, tokens, positions, *, vocab, count) -> tuple[Any, Any]:
  """Continues the rows `rows` of a cache by a token each. Returns their cache, and the best tokens after each."""
  cache = sharding.take_rows(cache, rows)
  batch = Batch(tokens[:, None], positions=positions[:, None], segments=jnp.ones_like(tokens)[:, None])
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  out = model.apply(params, batch, cache=cache)
  return out.cache, _best_tokens(out, vocab, count)


def _check_memory(cache: Any, vocab: int, beams: int) -> None:
  """Raises ValueError where the caches and logits of all beams, given their shapes, need more memory than is free."""
  free, rows = sharding.free_memory(), len(jax.tree.leaves(cache)[0])
  # A step copies the cache, and has the logits of all rows and their log-probabilities, in float32.
  needed = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) + 8 * rows * vocab
  if free is not None and needed > free:
    raise ValueError(f'beams={beams} need {needed:,} bytes of memory for caches and logits, and {free:,} bytes are '
                     f'free; at most {beams * free // needed} beams fit')


def search_ids(model: Any, params: Any, batch: Batch, prompts: int, vocab: int, ends: Sequence[int], settings: Beams,
               max_tokens: int) -> list[list[Hypothesis]]:
  """Returns the texts that follow each of the first `prompts` rows of a batch, those of the highest scores first.

  Args:
    model: a decoder or an encoder-decoder.
    params: its parameters; those of `model.unstack` are the fastest.
    batch: the prompts, as `model.prompt` makes them.
    prompts: their number; other rows are padding.
    vocab: only ids below it are written.
    ends: the ids that end a text, and are part of it.
    settings: how beams are searched.
    max_tokens: the number of tokens with which a text ends.

  Raises:
    ValueError: the beams need more memory than is free.
  """
  beams, count = settings.count, min(settings.candidates(ends), vocab)   # of a beam, which has no more continuations
  rows, slots = sharding.padded_rows(prompts * beams), round_up_slots(batch.tokens.shape[1] + max_tokens)
  parents = np.zeros(rows, np.int32)
  parents[:prompts * beams] = np.repeat(np.arange(prompts), beams)
  positions = np.asarray(batch.positions)[parents, -1]
  prefill = functools.partial(_prefill, model, slots=slots, vocab=vocab, count=count)
  _check_memory(jax.eval_shape(prefill, params, batch, parents)[0], model.vocab, beams)
  cache, best = prefill(params, batch, parents)
  log_probabilities, ids = map(np.asarray, best)
  searches = [_Search(settings, ends, max_tokens, [((), np.float32(0))]) for _ in range(prompts)]
  for i, search in enumerate(searches):
    search.add(log_probabilities[i:i + 1], ids[i:i + 1])
  parents = np.arange(rows, dtype=np.int32)   # all beams of a prompt continue the same cache
  while not all(search.is_done for search in searches):
    tokens, positions = np.zeros(rows, np.int32), positions + 1
    for i, search in enumerate(searches):
      if not search.is_done:
        tokens[i * beams:][:len(search.beams)] = [beam[-1] for beam, _ in search.beams]
    cache, best = _step(model, params, cache, parents, tokens, positions, vocab=vocab, count=count)
    log_probabilities, ids = map(np.asarray, best)
    parents = np.arange(rows, dtype=np.int32)
    for i, search in enumerate(searches):
      if not search.is_done:
        own = slice(i * beams, (i + 1) * beams)
        continued = search.add(log_probabilities[own], ids[own])
        parents[own][:len(continued)] = np.int32(continued) + i * beams
  return [search.finished for search in searches]


def search(model: Any, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], settings: Beams, *,
           max_tokens: int | None = None, mark: Callable[[Batch], Batch] = lambda batch: batch, bos: bool | None = None
           ) -> list[list[ScoredText]]:
  """Returns the best texts after each prompt, `settings.count` of them, those of the highest scores first.

  The other arguments, and what is raised, are as in `generate.stream`.
  """
  encoded, batch = encode(model, tokenizer, prompts, bos)
  max_tokens = token_count(model, tokenizer, batch, max_tokens)
  longest = int((batch.segments > 0).sum(1).max()) + max_tokens
  if model.original_context is not None and longest > model.original_context:
    raise ValueError(f'beams are searched in the original context of {model.original_context} tokens, and the prompt '
                     f'and max_tokens={max_tokens} are {longest}; shorten one of them')
  hypotheses = search_ids(model, model.unstack(params), mark(batch), len(encoded), tokenizer.vocab_size,
                     tuple(tokenizer.eos_ids), settings, max_tokens)
  before = [ids[segments > 0] for ids, segments in zip(batch.tokens, batch.segments)]
  return [[ScoredText(_text(tokenizer, prompt, text.ids), text.score) for text in texts]
          for prompt, texts in zip(before, hypotheses)]


def _text(tokenizer: Tokenizer, prompt: np.ndarray, ids: np.ndarray) -> str:
  """Returns the text of new ids after a prompt."""
  stream = TextStream(tokenizer, prompt[int(prompt[0] == tokenizer.bos_id):], ())
  return ''.join([*map(stream.push, ids), stream.end()])
