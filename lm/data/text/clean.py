"""Rules of cleaning: pure functions from a document to a document, or to a reason to drop it.

The same bytes in give the same bytes out on any machine. A rule is a function, or a frozen dataclass with `__call__`,
which can be pickled for worker processes and whose repr describes it. The rules of `DEFAULT` suit source code and any
language: they repair and tidy, and never change quotes, widths, entities, ligatures or indentation.
"""
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lm.data.text import source


class Drop(NamedTuple):
  reason: str


Rule = Callable[[str], str | Drop]


@dataclasses.dataclass(frozen=True)
class Unicode:
  """Repairs text decoded with the wrong encoding ('schÃ¶n' -> 'schön') and lone surrogates, line by line, with ftfy.

  The other defaults of ftfy are off: they would turn '，' into ',' in Chinese, '&lt;' into '<' and curly quotes into
  straight ones in source code, and compatibility ideographs into others (NFC).
  """

  def __call__(self, document: str) -> str:
    if document.isascii():
      return document
    fix, config = _ftfy()
    return '\n'.join(line if line.isascii() else fix(line, config) for line in document.split('\n'))


@dataclasses.dataclass(frozen=True)
class ControlCharacters:
  r"""Removes terminal escapes, byte-order marks, and control characters except \n and \t.

  Every end of a line or page becomes \n.
  """

  def __call__(self, document: str) -> str:
    if '\r' in document:
      document = document.replace('\r\n', '\n').replace('\r', '\n')
    return _CONTROL.sub('', _BREAK.sub('\n', document))


_BREAK = re.compile('[\x0b\x0c\x1c-\x1f\x85]')   # Python treats these as white space; removing them would join words
_CONTROL = re.compile('\x1b\\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]')


@dataclasses.dataclass(frozen=True)
class Whitespace:
  """Removes spaces at the ends of lines, empty lines at both ends, and all but two of several empty lines in a row."""

  def __call__(self, document: str) -> str:
    document = '\n'.join([line.rstrip() for line in document.split('\n')])
    return re.sub('\n{4,}', '\n\n\n', document).strip('\n')


@dataclasses.dataclass(frozen=True)
class Length:
  """Drops documents of fewer than `min` or more than `max` characters."""
  min: int = 1
  max: int | None = None

  def __post_init__(self):
    if self.max is not None and self.max < self.min:
      raise ValueError(f'Length: max={self.max} is below min={self.min}')

  def __call__(self, document: str) -> str | Drop:
    if len(document) < self.min:
      return Drop('too short')
    if self.max is not None and len(document) > self.max:
      return Drop('too long')
    return document


@dataclasses.dataclass(frozen=True)
class StopWords:
  """Removes the stop words of a language ('en', 'zh', ...: ISO 639-1; lists of stopwordsiso, Chinese cut by jieba).

  It is for bags of words, retrieval and keys for duplicates, not for training a language model: the model would learn a
  language without 'the' and 'not', and its perplexity would be that of another text.

  Raises ValueError if there is no list for the language.
  """
  language: str

  def __post_init__(self):
    _stop_words(self.language)

  def __call__(self, document: str) -> str:
    words = _stop_words(self.language)
    if self.language == 'zh':
      return ''.join(word for word in _jieba().cut(document) if word not in words)
    return _WORD.sub(lambda match: '' if match[1].lower().replace('’', "'") in words else match[0], document)


# A word, with inner apostrophes and hyphens, and the spaces after it, which are removed together with it.
_WORD = re.compile(r"(\w+(?:['’-]\w+)*)[ \t]*")

DEFAULT: tuple[Rule, ...] = (Unicode(), ControlCharacters(), Whitespace(), Length())


class Deduplicate:
  """Drops documents that are equal to an earlier one. It stores 16 bytes of each (BLAKE2b-128). Use one for all splits.
  """

  def __init__(self):
    self._digests = set()

  def __call__(self, document: str) -> str | Drop:
    digest = source.digest(document)
    if digest in self._digests:
      return Drop('duplicate')
    self._digests.add(digest)
    return document


def apply(rules: Sequence[Rule], document: str) -> str | Drop:
  """Returns the document after all rules in turn, or the first `Drop`."""
  for rule in rules:
    document = rule(document)
    if isinstance(document, Drop):
      return document
  return document


def clean(documents: Iterable[str], rules: Sequence[Rule] = DEFAULT, workers: int = 0,
          deduplicate: Deduplicate | None = None) -> Iterator[str | Drop]:
  """Yields the cleaned document, or a `Drop`, for each document in order; the second of two equal results is dropped.

  Args:
    documents: texts, of which at most a few hundred are read ahead.
    rules: are applied in turn.
    workers: the number of worker processes; with 0 or 1, this process does the work. Workers are spawned, because JAX's
      threads do not survive a fork. So rules must be defined in importable modules, and a script must guard its start
      with `if __name__ == '__main__'`.
    deduplicate: share one between all splits, so that no two splits have documents that are equal after cleaning.
  """
  deduplicate = deduplicate or Deduplicate()
  for document in _results(documents, functools.partial(apply, tuple(rules)), workers):
    yield document if isinstance(document, Drop) else deduplicate(document)


def _results(items: Iterable[Any], function: Callable[[Any], Any], workers: int, chunk: int = 32) -> Iterator[Any]:
  """Maps items in order, in `workers` processes. At most four chunks per process are ahead of the consumer."""
  if workers < 2:
    yield from map(function, items)
    return
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    items, pending = iter(items), collections.deque()
    try:
      while True:
        while len(pending) < 4 * workers and (batch := list(itertools.islice(items, chunk))):
          pending.append(pool.submit(_map, function, batch))
        if not pending:
          return
        yield from pending.popleft().result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _map(function: Callable[[Any], Any], batch: list[Any]) -> list[Any]:
  return [function(item) for item in batch]


@functools.cache
def _ftfy() -> tuple[Callable, Any]:
  import ftfy
  return ftfy.fix_text, ftfy.TextFixerConfig(
      unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
      uncurl_quotes=False, fix_line_breaks=False, remove_control_chars=False, normalization=None, explain=False)


@functools.cache
def _jieba() -> Any:
  with warnings.catch_warnings():   # its regular expressions and its import of pkg_resources cause warnings
    warnings.simplefilter('ignore')
    jieba = source.require('jieba', 'stopwords')
    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
  return jieba


@functools.cache
def _stop_words(language: str) -> frozenset[str]:
  stopwordsiso = source.require('stopwordsiso', 'stopwords')
  if language in ('ja', 'th'):
    raise ValueError(f'StopWords: {language!r} is written without spaces, which needs a segmenter; only zh has one')
  if not stopwordsiso.has_lang(language):
    raise ValueError(f'StopWords: no list for {language!r}; there is {", ".join(sorted(stopwordsiso.langs()))}')
  return frozenset(stopwordsiso.stopwords(language))
