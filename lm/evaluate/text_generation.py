"""Evaluation of the texts that a model writes after prompts, by metrics of texts."""
import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm import generate, seeds
from lm.data.text import corpora, source
from lm.evaluate import score, texts
from lm.evaluate.evaluations import NO_PROGRESS, Documents, Progress, Subject
from lm.evaluate.measures import Measure, ratio
from lm.evaluate.report import Result

_BATCH = 16   # prompts at once, between two saves


def bits_per_byte(subject: Subject, prompts: Sequence[str], written: Sequence[str]) -> Measure:
  """Returns the bits that a decoder needs for each byte of the texts, given their prompts, without the ends of texts.

  As in generation, the tokens of the prompt and those of the text are made separately. Empty texts do not count.
  """
  tokenizer = subject.tokenizer
  before = [generate.with_bos(ids, tokenizer, None) for ids in map(tokenizer.encode, prompts)]
  texts_ids = [np.concatenate([first, tokenizer.encode(text)]).astype(np.int32) for first, text in zip(before, written)]
  log_p = score.log_probabilities(subject.model, subject.params, texts_ids)
  bits = [-values[len(first) - 1:].sum(dtype=np.float64) / np.log(2) for first, values in zip(before, log_p)]
  return Measure('bits_per_byte', np.float64([(cost, len(text.encode())) for cost, text in zip(bits, written)]), ratio,
                 '', 'of:texts after their prompts')


class Item(NamedTuple):
  """A prompt, and texts that could follow it; the id is the same for any model."""
  id: str
  prompt: str
  references: list[str]


@dataclasses.dataclass(frozen=True)
class Generation(Documents):
  """Texts that a model writes, scored by metrics; see `Documents` for the first settings.

  A prompt is the beginning of a document, and its reference what follows there; or both are fields of JSON lines.

  Args:
    prompt_key: the field of a line of jsonl that holds the prompt; none takes prompts from the beginnings of documents.
    references_key: the field of such a line that holds a reference, or a list of several.
    prompt_tokens: of the beginning of a document. Documents without a token after it are left out.
    max_tokens: the most tokens to write, and those of a reference that follows in a document.
    stop: a text ends before any of these.
    metrics: names of metrics; see `texts.NAMES`.
    language: of the texts; see `texts.Settings`.
    temperature: divides the logits; 0 takes the most probable token each time.
    top_k: draw among the k most probable tokens; 0 among all.
    top_p: draw among the fewest tokens whose probabilities reach this sum.
    seed: of the draws.
  """
  prompt_key: str | None = None
  references_key: str = 'references'
  prompt_tokens: int = 64
  max_tokens: int = 64
  stop: tuple[str, ...] = ()
  metrics: tuple[str, ...] = ('distinct', 'repetition', 'self_bleu', 'length_ratio')
  language: str | None = None
  temperature: float = 1.
  top_k: int = 0
  top_p: float = 1.
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    texts.check_names(self.metrics)
    texts.Settings(self.language).check(self.metrics)
    if self.prompt_key is not None and not self.jsonl:
      raise ValueError(f'prompt_key={self.prompt_key!r} is a field of lines of jsonl, which is not given')
    if self.prompt_key is None and self.references_key != 'references':
      raise ValueError(f'references_key={self.references_key!r} goes with prompt_key, which is not given')
    if min(self.prompt_tokens, self.max_tokens) < 1 or '' in self.stop:
      raise ValueError(f'prompt_tokens={self.prompt_tokens} and max_tokens={self.max_tokens} have to be at least 1, '
                       'and no stop string may be empty')
    seeds.check(self.seed)
    self.sampling()

  def check_packages(self) -> None:
    texts.Settings(self.language).check_packages(self.metrics)

  def sampling(self) -> generate.Sampling:
    """Returns how a token is drawn. ValueError for values that are out of range."""
    return generate.Sampling(self.temperature, self.top_k, self.top_p)

  def items(self, subject: Subject) -> list[Item]:
    """Returns the prompts with their references. ValueError, which names the line, where there is none."""
    if self.prompt_key is not None:
      return self._records()
    if subject.model.reads_source:
      raise ValueError('an encoder-decoder does not go on with a document; give jsonl with a prompt_key')
    if self.prompt_tokens + self.max_tokens + 1 > subject.model.max_length:
      raise ValueError(f'prompt_tokens={self.prompt_tokens} and max_tokens={self.max_tokens}, with bos, are more than '
                       f'the {subject.model.max_length} that the model reads at once; give less')
    documents = self.documents(subject)
    items = []
    for document, ids in zip(documents, subject.tokenizer.encode_batch(documents)):
      # A token may be a part of a character, which shows as U+FFFD.
      prompt, whole = (subject.tokenizer.decode(ids[:size]).rstrip('\ufffd')
                       for size in (self.prompt_tokens, self.prompt_tokens + self.max_tokens))
      if len(ids) > self.prompt_tokens and whole.startswith(prompt) and len(whole) > len(prompt):
        items.append(Item(source.digest(document).hex(), prompt, [whole[len(prompt):]]))
    if not items:
      raise ValueError(f'none of the {len(documents)} documents has more than prompt_tokens={self.prompt_tokens}; give '
                       'less')
    return items

  def _records(self) -> list[Item]:
    lines = corpora.jsonl(self.jsonl, None, 0.).splits['train']
    needs_references = not set(self.metrics) <= set(texts.WITHOUT_REFERENCES)
    items = []
    for i in range(len(lines) if self.limit is None else min(self.limit, len(lines))):
      record = json.loads(lines[i])
      prompt, references = record.get(self.prompt_key), record.get(self.references_key, [])
      references = [references] if isinstance(references, str) else references
      if not isinstance(prompt, str) or not all(isinstance(reference, str) for reference in references):
        raise ValueError(f'{self.jsonl}: record {i + 1} has {self.prompt_key}={json.dumps(prompt)[:50]} and '
                         f'{self.references_key}={json.dumps(references)[:50]}; texts are needed')
      if needs_references and not references:
        raise ValueError(f'{self.jsonl}: record {i + 1} has no {self.references_key}, which {", ".join(self.metrics)} '
                         'compare with; give them, or metrics of '
                         f'{", ".join(texts.WITHOUT_REFERENCES)} alone')
      items.append(Item(str(record.get('id', i)), prompt, references))
    if not items:
      raise ValueError(f'{self.jsonl} has no lines')
    return items

  def digest(self, subject: Subject) -> str:
    """Returns a hash of the prompts and references.

    Raises ValueError where there are none, or settings do not fit the model, and ImportError where a metric lacks a
    package.
    """
    if subject.mark is None or not (subject.model.causal or subject.model.reads_source):
      raise ValueError('this model writes no text from left to right; leave the generation out')
    items = self.items(subject)
    few = [item.references or [item.prompt] for item in items[:2] * 2]
    self._measures([several[0] for several in few], few)   # each metric is computed once, before texts are written
    return source.digest(json.dumps(items)).hex()

  def metric_names(self) -> list[str]:
    """Returns the names of the measures. Raises ImportError where a metric lacks a package."""
    return [measure.name for measure in self._measures(['a text'] * 2, [['a text']] * 2)]

  def __call__(self, subject: Subject, progress: Progress = NO_PROGRESS) -> Result:
    items = self.items(subject)
    references = [item.references for item in items]
    rows = progress.load()
    written = [] if rows is None else [json.loads(row) for row in rows]
    while len(written) < len(items):
      progress.show(len(written), len(items))
      prompts = [item.prompt for item in items[len(written):len(written) + _BATCH]]
      written += generate.generate(subject.model, subject.params, subject.tokenizer, prompts, self.sampling(),
                                   max_tokens=self.max_tokens, stop=self.stop, seed=self.seed, mark=subject.mark)
      progress.save(np.array([json.dumps(text) for text in written]))
    outputs = [{'id': item.id, 'prompt': item.prompt, 'text': text, 'references': item.references}
               for item, text in zip(items, written)]
    notes = [f'up to {self.max_tokens} tokens after each prompt, {self.sampling()}, seed {self.seed}']
    if empty := sum(not text.strip() for text in written):
      notes.append(f'{empty:,} of {len(written):,} texts are empty')
    if note := texts.Settings(self.language).note(references):
      notes.append(note)
    return Result(self._measures(written, references), (), notes, [item.id for item in items], outputs)

  def _measures(self, written: Sequence[str], references: Sequence[Sequence[str]]) -> list[Measure]:
    settings = texts.Settings(self.language)
    return [measure for name in self.metrics for measure in settings.scores(name, written, references)]
