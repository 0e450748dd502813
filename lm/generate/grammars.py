"""Answers that have to match a JSON schema, a regular expression or a grammar: the tokens that may come next.

  grammars = Grammars(tokenizer, model.vocab)
  grammar = grammars.compile(of_json_schema({'type': 'integer'}))     # ValueError for what is no grammar
  scheduler.submit(Request(ids, grammar=grammar))                     # every answer that ends with 'stop' matches
  generate.generate(model, params, tokenizer, prompts, grammar=grammar)

A grammar is a text in the dialect of Lark that llguidance reads, and the whole answer has to match it. All ways to
spell an answer in tokens are allowed. The tokens that end a text are allowed exactly where the answer is complete; an
answer that reaches its largest number of tokens ('length') is only the beginning of one that matches.

Shapes: the legend in `models/transformer.py`; W = V / 32, rounded up, are words of 32 bits. Bit v % 32 of word v // 32
says whether token v is allowed.
"""
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.text.source import require
from lm.data.tokenizers.base import Tokenizer
from lm.generate.filters import word_count
from lm.generate.sampling import Sampling
from lm.workdir.parsing import read_object

# Between two parts of JSON: at most a line break and an indentation, because a model that is unsure writes space after
# space.
_SPACE = r'\n?[ ]{0,20}'
# The library needs about 170 bytes for each item of `minItems`, and far more for `maxItems`.
_MOST_ITEMS = 10_000
_ITEMS = re.compile(r'"(minItems|maxItems)"\s*:\s*(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)')
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'   # the library would allow one way to spell a text that is certain


def of_json_schema(schema: Mapping[str, Any]) -> str:
  """Returns the grammar of JSON texts that a schema allows. Parts of them are separated by at most 20 spaces."""
  return f'start: %json {json.dumps({"x-guidance": {"whitespace_pattern": _SPACE}, **schema})}'


def of_regex(pattern: str) -> str:
  """Returns the grammar of texts of which the whole matches a regular expression, in the syntax of Rust."""
  matcher = require('llguidance', 'serve').LLMatcher
  return json.loads(matcher.grammar_from_regex(pattern))['grammars'][0]['lark_grammar']


def read_grammar(schema_file: pathlib.Path | None, pattern: str | None) -> str | None:
  """Returns the grammar of the JSON schema in a file, or of a regular expression; None if neither is given.

  Raises ValueError if both are, or if the file has no JSON schema; ImportError without llguidance.
  """
  if schema_file is None and pattern is None:
    return None
  require('llguidance', 'serve')   # before a model is read
  if schema_file is None:
    return of_regex(pattern)
  if pattern is not None:
    raise ValueError(f'the JSON schema {schema_file} and the regular expression {pattern!r} cannot both constrain the '
                     'text; give one of them')
  return of_json_schema(read_object(schema_file))


class Matcher:
  """Follows one answer, and says which token may come next.

  `failure` is a message where the answer cannot be completed: the parser has reached one of its limits, or no token
  of the vocabulary continues the answer. Then only the tokens that end a text are allowed.
  """

  def __init__(self, matcher: Any, words: int, ends: Sequence[int]):
    """`matcher` is the library's, at the beginning of a text; `ends` are the ids that end it."""
    self._matcher, self._words, self.failure = matcher, words, ''
    self._ends = np.zeros(words, np.uint32)
    for i in ends:
      self._ends[i // 32] |= np.uint32(1 << i % 32)

  def allowed(self) -> np.ndarray:
    """Returns the tokens that may come next, int32 [W]; there is one at least."""
    bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[:self._words].copy()
    error = _line(self._matcher.get_error())
    if not bits.any() or error == 'NoExtensionBias':   # the library's word for it
      self.failure = 'no token of the vocabulary continues the answer as its grammar needs it'
    elif error:
      self.failure = error
    if self.failure:
      bits[:] = self._ends
    elif self._matcher.is_accepting():
      bits |= self._ends
    return bits.view(np.int32)

  def add(self, ids: Sequence[int]) -> None:
    """Adds the next tokens of the answer. One that ends the text may be the last."""
    for i in ids:
      is_end = self._ends[i // 32] >> i % 32 & 1
      if not is_end and not self.failure and not self._matcher.consume_token(i):
        self.failure = _line(self._matcher.get_error())


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
  """A compiled grammar. `matcher` is the library's, and is only copied; `ends` are the ids that end any text."""
  matcher: Any
  words: int
  ends: tuple[int, ...]

  def start(self, stop_ids: Sequence[int] = ()) -> Matcher:
    """Returns the matcher of a new answer, which `stop_ids` end too."""
    return Matcher(self.matcher.deep_copy(), self.words, (*self.ends, *stop_ids))


class Grammars:
  """Compiles grammars for a tokenizer and a model's number of token ids, V, which may be padded."""

  def __init__(self, tokenizer: Tokenizer, vocab: int):
    self._tokenizer, self._vocab = tokenizer, vocab

  @functools.cached_property
  def _library_tokenizer(self) -> Any:
    library = require('llguidance', 'serve')
    return library.LLTokenizer(_Tokens(self._tokenizer, self._vocab), n_vocab=self._vocab)

  def compile(self, grammar: str) -> Grammar:
    """Returns a grammar that is ready for answers.

    Raises ValueError, with what is wrong, for a text that is no grammar, or one that is too large or that no text
    matches; ImportError without llguidance.
    """
    for name, number in _ITEMS.findall(grammar):
      if float(number) > _MOST_ITEMS:
        raise ValueError(f'{name}={number} is more than {_MOST_ITEMS:,}, which would take too much memory; give a '
                         'smaller number, or leave it out')
    library = require('llguidance', 'serve')
    limits = library.LLParserLimits(verbose_errors=False)
    text = library.LLMatcher.grammar_from_lark(grammar + _NO_FORCING)
    matcher = library.LLMatcher(self._library_tokenizer, text, log_level=0, limits=limits)
    if matcher.is_error():
      raise ValueError(_line(matcher.get_error()))
    compiled = Grammar(matcher, word_count(self._vocab), self._tokenizer.eos_ids)
    first = compiled.start()
    first.allowed()
    if first.failure:
      raise ValueError(first.failure)
    return compiled


class _Tokens:
  """The bytes of each token, as the library reads them. Those that it must not write have none."""
  is_tokenizer_wrapper, bos_token_id, special_token_ids = True, None, ()

  def __init__(self, tokenizer: Tokenizer, vocab: int):
    self.eos_token_id = tokenizer.eos_id
    pieces = [b'' if i in tokenizer.eos_ids else tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    self.tokens = pieces + [b''] * (vocab - len(pieces))

  def __call__(self, text: str) -> list[int]:
    raise NotImplementedError('without forced tokens, the library encodes no text')


def _line(message: str) -> str:
  """Returns a message of the library as one line, without the grammar and the state of the parser."""
  message = re.split(r'\n *1 \| |<non-verbose/>|<backtrace>', message)[0]
  return ' '.join(message.split())[:300]


def check_sampling(sampling: Sampling) -> None:
  """Raises ValueError for settings that exclude tokens which a grammar may need."""
  for name, is_used in ('min_tokens', sampling.min_tokens > 0), ('bad_words', bool(sampling.bad_words)):
    if is_used:
      raise ValueError(f'{name}={getattr(sampling, name)} excludes tokens that a grammar may need; leave one of the '
                       'two out')


def allowed_tokens(matchers: Sequence[Matcher | None], vocab: int) -> np.ndarray | None:
  """Returns the tokens that may come next in each row, int32 [B, W]; all of them in a row without a matcher.

  Returns None if no row has one.
  """
  if not any(matchers):
    return None
  every = np.full(word_count(vocab), -1, np.int32)
  return np.stack([every if matcher is None else matcher.allowed() for matcher in matchers])
