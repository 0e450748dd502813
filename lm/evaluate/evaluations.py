"""The kinds of evaluations: each is called with a model and gives measures, and is a section of a suite."""
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.batch import Batch
from lm.data.chat.conversation import Template
from lm.data.text import corpora, source
from lm.evaluate import likelihood, text_scores
from lm.evaluate.report import Curve, Result
from lm.evaluate.score import check_window
from lm.objectives.objective import causal_prompt

CHUNK = 64   # documents between two saves


class Subject(NamedTuple):
  """What is evaluated: a model with its parameters, and the documents that were held out of its training.

  `mark` marks prompts as in training: the `prompt` of the objective; None for a model that writes no text. `template`
  is its chat template; None for a model that was not trained to chat.
  """
  model: Any
  params: Any
  tokenizer: Any
  held_out: Callable[[], Sequence[str]]   # ValueError if there are none
  mark: Callable[[Batch], Batch] | None = causal_prompt
  template: Template | None = None


class Progress(NamedTuple):
  """Where an evaluation keeps what it has measured so far, so that it can go on after a stop."""
  load: Callable[[], np.ndarray | None]
  save: Callable[[np.ndarray], None]         # all rows so far; those of earlier saves are not written again
  show: Callable[[int, int], None]   # documents or requests that are measured, and all


NO_PROGRESS = Progress(lambda: None, lambda rows: None, lambda count, total: None)


@dataclasses.dataclass(frozen=True)
class Documents:
  """Documents for an evaluation.

  Args:
    text: files of text, a glob pattern; a file is a document. Without files, the documents held out of the run.
    separator: what separates documents in a file of text.
    jsonl: files of JSON lines, a glob pattern; a line is a document.
    key: the field of a line that holds the text.
    limit: the first so many documents are read; none for all.
  """
  text: str | None = None
  separator: str | None = None
  jsonl: str | None = None
  key: str = 'text'
  limit: int | None = None

  def __post_init__(self):
    if self.text and self.jsonl:
      raise ValueError(f'text={self.text!r} and jsonl={self.jsonl!r} both name documents; give one of them, and the '
                       'other to another evaluation')
    if self.separator and not self.text:
      raise ValueError(f'separator={self.separator!r} is for files of text, and text is not given')
    if self.key != 'text' and not self.jsonl:
      raise ValueError(f'key={self.key!r} is for JSON lines, and jsonl is not given')
    if self.limit is not None and self.limit < 2:
      raise ValueError(f'limit={self.limit} is below 2, and one document gives no interval; give more, or null for all')

  def check_packages(self) -> None:
    """Raises ImportError, which says what to install, where a package is missing; most evaluations need none."""

  def documents(self, subject: Subject) -> list[str]:
    """Returns the documents. ValueError where there are none with text."""
    if self.text:
      separator = self.separator and source.unescaped(self.separator)
      documents = corpora.text(self.text, 0., separator).splits['train']
    elif self.jsonl:
      documents = corpora.jsonl(self.jsonl, self.key, 0.).splits['train']
    else:
      documents = subject.held_out()
    texts = [documents[i] for i in range(len(documents) if self.limit is None else min(self.limit, len(documents)))]
    texts = [text for text in texts if text.strip()]
    if not texts:
      raise ValueError(f'{self.text or self.jsonl or "what was held out"} has no document with text')
    return texts


@dataclasses.dataclass(frozen=True)
class Likelihood(Documents):
  """Cross-entropy of documents, and what follows from it; see `likelihood`, and `Documents` for the first settings.

  Args:
    bos: whether a document begins with bos; none does as the tokenizer does.
    window: tokens that are read at once; none for the context of the model.
    stride: tokens that each further window scores; none for half a window.
    contexts: further windows, each with half of it as the stride; the loss with each is given beside the others.
  """
  bos: bool | None = None
  window: int | None = None
  stride: int | None = None
  contexts: tuple[int, ...] = ()

  def digest(self, subject: Subject) -> str:
    """Returns a hash of the documents. Raises ValueError where there are none, or settings do not fit the model."""
    if not subject.model.causal or subject.model.reads_source:
      raise ValueError('likelihood is of decoders, and this model is none; leave it out of the --suite, and '
                       'score texts with experiments/score.py')
    check_window(self.window, self.stride, subject.model.max_length)
    for context in self.contexts:
      check_window(context, None, subject.model.max_length)
    state = hashlib.blake2b(digest_size=16)
    for i, text in enumerate(self.documents(subject), 1):
      try:
        state.update(text.encode() + b'\0')
      except UnicodeEncodeError as error:
        raise ValueError(f'document {i} with text has {text[error.start]!r} at character {error.start}, a lone '
                         'surrogate, which is no Unicode; repair the text') from None
    return state.hexdigest()

  def metric_names(self) -> list[str]:
    """Returns the names of the measures."""
    return [measure.name for measure in likelihood.measures(np.zeros((0, likelihood.COLUMNS)))]

  def __call__(self, subject: Subject, progress: Progress = NO_PROGRESS) -> Result:
    bos = subject.tokenizer.adds_bos if self.bos is None else self.bos
    texts, rows = self.documents(subject), progress.load()
    rows = np.zeros((0, likelihood.COLUMNS + len(self.contexts))) if rows is None else rows
    while len(rows) < len(texts):
      progress.show(len(rows), len(texts))
      chunk = texts[len(rows):len(rows) + CHUNK]
      scored = text_scores.scored(subject, chunk, None, bos, self.window, self.stride)
      new = np.stack([likelihood.row(text, one.predicted, one.size, not bos) for text, one in zip(chunk, scored)])
      losses = [[-one.scores.sum(dtype=np.float64) for one in text_scores.scored(subject, chunk, None, bos, context)]
                for context in self.contexts]
      rows = np.concatenate([rows, np.concatenate([new, np.reshape(losses, (-1, len(chunk))).T], axis=1)])
      progress.save(rows)
    if not rows[:, likelihood.TOKENS].any():
      raise ValueError('there is nothing to score: each document has one token, and no bos before it; give bos')
    documents = [source.digest(text).hex() for text in texts]
    return self._result(rows, subject, bos)._replace(documents=documents)

  def _result(self, rows: np.ndarray, subject: Subject, bos: bool) -> Result:
    window = self.window or subject.model.max_length
    stride = self.stride or max(window // 2, 1)
    signature = (f'window:{window}|stride:{stride}|bos:{"yes" if bos else "no"}|words:white space|'
                 f'tokens:{int(rows[:, likelihood.TOKENS].sum())}|bytes:{int(rows[:, likelihood.BYTES].sum())}')
    curves = [Curve('reliability', 'probability of the most likely token', 'share correct',
                    likelihood.reliability(rows, signature), diagonal=True),
              Curve('loss_by_position', 'tokens before a token', 'cross-entropy (nats a token)',
                    likelihood.by_position(rows, signature))]
    if self.contexts:
      columns = {**{length: likelihood.COLUMNS + i for i, length in enumerate(self.contexts)}, window: likelihood.NLL}
      points = [(length, likelihood.loss(rows, column, f'window:{length}')) for length, column in
                sorted(columns.items())]
      curves.append(Curve('loss_by_context', 'tokens of a window', 'cross-entropy (nats a token)', points))
    return Result(likelihood.measures(rows, signature), curves)
