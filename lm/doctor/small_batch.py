"""A small batch of random tokens, made as training makes its batches: several documents a row, and padding.

Each row has segments that do not see one another, so that a few short rows answer many questions about a model.
"""
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.data.batch import Batch, Dialogue, Form, Pair, Rated, RatedPair, Row, Special, blank, template
from lm.doctor.findings import DoesNotApply
from lm.train import Run

EXAMPLES = 3   # in a row, where they have room


def text_tokens(special: Special) -> np.ndarray:
  """Returns the ids of the vocabulary that stand for text, int32 [n]."""
  ids = np.flatnonzero(special.tokenizer.byte_lengths() > 0)
  return np.setdiff1d(ids, [special.bos, special.eos, *special.control]).astype(np.int32)


def small_batch(run: Run, special: Special, rows: int, length: int, source_length: int | None) -> Batch:
  """Returns `rows` rows of `length` positions, whose examples the objective of the run makes.

  Row r has the form r % F of F forms. Rows have different numbers of targets, and padding at their ends.

  Raises:
    DoesNotApply: the objective makes no example that is as short as a row.
  """
  try:
    row = template(run.objective, special, length, source_length)
  except ValueError as error:
    raise DoesNotApply(f'no short row can be made for the objective: {error}') from None
  columns = {name: np.zeros((1, length, *shape), dtype) for name, (dtype, shape) in run.data.columns.items()}
  inputs = {name: np.zeros((1, *shape), dtype) for name, (dtype, shape) in run.data.inputs.items()}
  row = row._replace(columns={**(row.columns or {}), **columns} or None,
                     inputs={**(row.inputs or {}), **inputs} or None)
  batch, rng = blank(row, rows), np.random.default_rng(0)
  ids = text_tokens(special)
  for r in range(rows):
    _fill(Row(batch, r), run, special, rng, ids, r, length, source_length)
  return batch


def _fill(row: Row, run: Run, special: Special, rng: np.random.Generator, ids: np.ndarray, r: int, length: int,
          source_length: int | None) -> None:
  """Fills row r with examples of random tokens."""
  form = run.objective.forms[r % len(run.objective.forms)]
  count, size = _sizes(form, length, source_length, 1 if row.batch.inputs else EXAMPLES)
  for i in range(count):
    # The last example is shorter, so that there is padding, and so are some others, so that rows differ.
    n = size // 2 + 1 if i == count - 1 else size - (r + i) % 3
    piece = _record(run.objective.needs, rng, ids, max(n, 2) + form.ahead, special)
    example = form.example(piece, rng, special)
    row.add(example._replace(inputs=_inputs(run.data.inputs, rng) or example.inputs))


def _sizes(form: Form, length: int, source_length: int | None, most: int) -> tuple[int, int]:
  """Returns the number of examples in a row, at most `most`, and the number of tokens that the longest has."""
  for count in range(most, 0, -1):
    size = form.room.tokens(length // count, source_length and source_length // count)
    if size >= 5:
      return count, size
  raise DoesNotApply(f'a row of {length} positions has no room for an example of five tokens')


def _inputs(declared: Mapping[str, tuple[Any, tuple[int, ...]]], rng: np.random.Generator) -> dict[str, np.ndarray]:
  return {name: rng.normal(size=shape).astype(dtype) for name, (dtype, shape) in declared.items()}


def _record(kind: type, rng: np.random.Generator, ids: np.ndarray, n: int, special: Special) -> Any:
  """Returns a record of `kind` with n random tokens in all, of which a dialogue learns the last half."""
  document = np.concatenate([[special.bos], rng.choice(ids, n - 2), [special.eos]]).astype(np.int32)
  if kind is np.ndarray:
    return document
  if kind is RatedPair:
    return RatedPair((document[1:n // 2],), document[n // 2:-1], 0.5)
  dialogue = Dialogue(document, np.arange(n) >= n // 2)
  if kind is Dialogue:
    return dialogue
  # Two dialogues with the same beginning, n tokens together.
  half = max(n // 2, 3)
  first, second = (Dialogue(np.concatenate([document[:1], rng.choice(ids, half - 1)]).astype(np.int32),
                            np.arange(half) >= half // 2) for _ in range(2))
  second.tokens[:half // 2] = first.tokens[:half // 2]
  return Pair(first, second) if kind is Pair else Rated(first, True, second)
