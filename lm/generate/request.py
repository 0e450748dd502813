"""Requests to a `scheduler`, and the events with which it answers them."""
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm import seeds
from lm.generate.engine import TOP, Engine
from lm.generate.grammars import Grammar, check_sampling
from lm.generate.sampling import Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """A prompt to be continued. Requests are compared by identity.

  Args:
    ids: the prompt, with its control tokens such as bos; one token at least. For an encoder-decoder, the beginning of
      the text that it writes: the token that starts the decoder.
    sampling: how tokens are drawn.
    max_tokens: the largest number of tokens to write; None for as many as the context has room for. With 0, the prompt
      is only scored.
    seed: of the random numbers; choice i draws from stream i of the seed.
    choices: the number of continuations (`n`), which differ in their random numbers.
    top: the number of alternatives at each token whose log-probabilities are given.
    scores_prompt: whether the log-probabilities of the prompt's tokens are given too.
    grammar: what each continuation has to match, from `Grammars.compile`; None for any text.
    source: what the encoder of an encoder-decoder reads, with its control tokens; None for a decoder.
    adapter: the number of the engine's adapter that the model has for this request, from 1 on; 0 for none.
  """
  ids: Sequence[int]
  sampling: Sampling = Sampling()
  max_tokens: int | None = None
  seed: int = 0
  choices: int = 1
  top: int = 0
  scores_prompt: bool = False
  grammar: Grammar | None = None
  source: Sequence[int] | None = None
  adapter: int = 0

  @property
  def prompt_size(self) -> int:
    """The number of tokens of the prompt, which is the source of an encoder-decoder."""
    return len(self.ids if self.source is None else self.source)

  def limit(self, context: int) -> int:
    """Returns the largest number of tokens to write, in texts of `context` tokens."""
    return context - len(self.ids) if self.max_tokens is None else self.max_tokens

  def check(self, engine: Engine, context: int, adapters: int = 0) -> None:
    """Raises ValueError, which names the value, if an engine can never run the request in texts of `context` tokens.

    `adapters` is the number of adapters that the engine has.
    """
    size, model, sampling = len(self.ids), engine.model, self.sampling
    _check_ids('ids', self.ids, model.vocab)
    if model.reads_source and self.source is None:
      raise ValueError('source=None, and an encoder-decoder reads a source; give one, and as ids the token that starts '
                       'the decoder')
    if self.source is not None:
      if not model.reads_source:
        raise ValueError(f'a source of {len(self.source)} tokens is for an encoder-decoder; leave it out')
      _check_ids('source', self.source, model.vocab)
      if len(self.source) > context:
        raise ValueError(f'a source of {len(self.source)} tokens is more than the {context} that are read at once; '
                         'shorten it')
    sampling.check_ids(engine.vocab)
    if self.grammar is not None:
      check_sampling(sampling)
    if not 0 <= self.adapter <= adapters:
      raise ValueError(f'adapter={self.adapter} must be from 0, for none, to {adapters}')
    if self.choices < 1:
      raise ValueError(f'choices={self.choices} must be at least 1')
    if not 0 <= self.top <= min(TOP, engine.vocab):
      raise ValueError(f'top={self.top} must be from 0 to {min(TOP, engine.vocab)}')
    seeds.check(self.seed)
    if self.max_tokens is not None and self.max_tokens < 0:
      raise ValueError(f'max_tokens={self.max_tokens} must be 0 or more')
    needed = size + (1 if self.max_tokens is None else self.max_tokens)
    if needed > context:
      new = 'a new one' if self.max_tokens is None else f'max_tokens={self.max_tokens}'
      raise ValueError(f'a prompt of {size} tokens and {new} are more than the {context} of the context; shorten one '
                       'of them')
    if self.max_tokens is not None and sampling.min_tokens > self.max_tokens:
      raise ValueError(f'min_tokens={sampling.min_tokens} is more than max_tokens={self.max_tokens}')


def _check_ids(name: str, ids: Sequence[int], vocab: int) -> None:
  """Raises ValueError for no token ids, and for ids that a vocabulary does not have."""
  if not len(ids):
    raise ValueError(f'{name}=[] must have one token at least; begin an empty prompt with bos, and end a source with '
                     'eos')
  ids = np.asarray(ids)
  if ids.ndim != 1 or ids.dtype.kind not in 'iu' or ids.min() < 0 or ids.max() >= vocab:
    raise ValueError(f'{name} must be whole numbers from 0 to {vocab - 1}; they are {ids.min()} to {ids.max()}')


class Scores(NamedTuple):
  """Log-probabilities in nats at temperature 1, as from `evaluate.log_probabilities`, of the tokens of a text.

  `top_ids_TK` are the K = `Request.top` most probable tokens at each place, the most probable first.
  """
  log_probabilities_T: np.ndarray
  top_ids_TK: np.ndarray
  top_log_probabilities_TK: np.ndarray


class Event(NamedTuple):
  """New tokens of a choice of a request, or its end, or both.

  The first event of a choice has the scores of the prompt's tokens from the second on, if the request needs them;
  `reading_start`, the `time.perf_counter` at which the engine began to read the prompt; and `shared_tokens`, the number
  of the prompt's first tokens that were in pages, and so were not read again.
  """
  request: Request
  choice: int
  ids: list[int]
  scores: Scores
  finish_reason: str | None = None     # 'stop', 'length', 'abort' or 'grammar'; None if the choice goes on
  prompt_scores: Scores | None = None
  reading_start: float | None = None
  shared_tokens: int = 0

  @property
  def log_probabilities(self) -> list[float]:
    """The log-probabilities of `ids`."""
    return self.scores.log_probabilities_T.tolist()
