"""Probes of text: whether the tokenizer gives a text back, and what the mask of a chat template covers."""
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data import dataset
from lm.data.chat import dialogues, messages
from lm.data.text import clean
from lm.doctor.findings import DoesNotApply, Finding, Verdict, judge
from lm.doctor.subject import Subject
from lm.evaluate import annotate

TEXTS = 32            # texts, or dialogues, of the run that are read
CHARACTERS = 10_000   # the most characters of each


def own_data(subject: Subject) -> Any:
  """Returns the data of a run without the columns that a model has added to it."""
  data = subject.run.data
  while isinstance(data, annotate.Annotated):
    data = data.data
  return data


def tokenizer_round_trips(subject: Subject) -> Finding:
  """Whether the tokens of the run's texts spell these texts again."""
  tokenizer, texts = subject.data.tokenizer, _texts(subject)
  changed = [(text, spelled) for text, ids in zip(texts, tokenizer.encode_batch(texts))
             if (spelled := tokenizer.decode(ids)) != text]
  if not changed:
    return judge(True, f'{len(texts)} texts of the run are the same after encoding and decoding')
  before, after = _first_difference(*changed[0])
  text = (f'{len(changed)} of {len(texts)} texts are changed by encoding and decoding, such as {before!r} into '
          f'{after!r}')
  if tokenizer.lossless:
    return judge(False, text, 'the tokenizer says that it changes none, and it does')
  return judge(False, text, 'the model never sees what is lost', Verdict.WARNING)


def _texts(subject: Subject) -> list[str]:
  """Returns texts of the run as its tokenizer reads them; where the run has only tokens, what they spell."""
  data = own_data(subject)
  if isinstance(data, dataset.Text):
    documents = itertools.islice(data.source.splits['train'], TEXTS)
    cleaned = [text for text in clean.clean(list(documents), data.rules) if not isinstance(text, clean.Drop)]
  elif isinstance(data, dialogues.Dialogues):
    cleaned = [message['content'] for prompt, answers, _ in _records(data) for message in (*prompt, *answers[0])]
  else:
    cleaned = []
  if not cleaned:
    stored = subject.data.stores.get('train', ()) if isinstance(data, dataset.Text) else ()
    cleaned = [subject.data.tokenizer.decode(stored[i]) for i in range(min(TEXTS, len(stored)))]
  if not cleaned:
    raise DoesNotApply('the run has no texts to read')
  return [text[:CHARACTERS] for text in cleaned[:TEXTS]]


def _first_difference(before: str, after: str) -> tuple[str, str]:
  """Returns 20 characters of two texts around the first place where they differ."""
  place = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
  start = max(place - 5, 0)
  return before[start:place + 15], after[start:place + 15]


def _records(data: dialogues.Dialogues) -> list[messages.Record]:
  """Returns the first training records."""
  return [messages.read(record, data.kind, data.keys) for record in
          itertools.islice(data.source.splits['train'], TEXTS)]


def mask_covers_answers(subject: Subject) -> Finding:
  """Whether the tokens that a chat template marks as learned are the answers, all of them, and no other message."""
  data, tokenizer = own_data(subject), subject.data.tokenizer
  if not isinstance(data, dialogues.Dialogues):
    raise DoesNotApply('the data has no dialogues')
  records = _records(data)
  if not records:
    raise DoesNotApply('the workdir does not hold the text of the records')
  missing, foreign = [], []
  for prompt, answers, _ in records:
    for answer in answers:
      learned, others = _learned(tokenizer, data, prompt, answer), _contents(prompt, answer, learned=False)
      expected = _contents(prompt, answer, learned=True)
      missing += [text for text in expected if tokenizer.decode(tokenizer.encode(text)).strip() not in learned]
      remaining = learned
      for text in sorted(expected, key=len, reverse=True):
        remaining = remaining.replace(text, '', 1)
      foreign += [text for text in others if len(text) > 2 and text in remaining]
  if foreign:
    return judge(False, f'the mask of the chat template covers {len(foreign)} messages that are no answers, such as '
                 f'{foreign[0][:40]!r}', 'the model would learn to write the words of others')
  if missing:
    return judge(False, f'the mask of the chat template misses {len(missing)} answers, or parts of them, such as '
                 f'{missing[0][:40]!r}', 'they would not be learned')
  return judge(True, f'the mask of the chat template covers the answers of {len(records)} records, and nothing else')


def _learned(tokenizer: Any, data: dialogues.Dialogues, prompt: messages.Messages, answer: messages.Messages) -> str:
  """Returns the text that the mask covers, whose parts are separated by a line."""
  ids, mask = data.template.encode(tokenizer, [*prompt, *answer], first=len(prompt))
  parts = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
  starts = np.cumsum([0, *map(len, parts)])[:-1]
  return '\n'.join(tokenizer.decode(part) for start, part in zip(starts, parts) if len(part) and mask[start])


def _contents(prompt: Sequence[Any], answer: Sequence[Any], learned: bool) -> list[str]:
  """Returns the contents of the messages to learn, or of the others."""
  is_learned = [False] * len(prompt) + [message['role'] == 'assistant' for message in answer]
  return [message['content'].strip() for message, own in zip([*prompt, *answer], is_learned)
          if own is learned and message['content'].strip()]
