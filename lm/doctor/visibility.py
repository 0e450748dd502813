"""Probes of what a token sees: one token is changed, and the outputs of other positions must stay as they are.

A position may depend on the tokens of its own document (segment) up to itself, on all that the objective marks as
bidirectional, and, in an encoder, on all tokens of its document; a decoder also sees the source of its document.
"""
from collections.abc import Callable

import numpy as np

from lm.doctor.findings import DoesNotApply, Finding, Verdict, judge
from lm.doctor.subject import Influence, Subject


def documents_apart(subject: Subject) -> Finding:
  """Whether a change in a document changes no output of another document of its row."""
  return _unseen(subject, _other_documents, 'documents of a row',
                 'attention crosses the borders of packed documents; the model has to use batch.segments')


def no_future(subject: Subject) -> Finding:
  """Whether a change of a token changes no output before it, unless the token is marked as bidirectional."""
  if not getattr(subject.base_model, 'causal', False):
    raise DoesNotApply('the model reads in both directions')
  marks = subject.small().bidirectional
  if marks is not None and marks[subject.small().segments > 0].all():
    raise DoesNotApply('the objective lets each position see all tokens')
  return _unseen(subject, _earlier_positions, 'later tokens',
                 'the model sees the tokens that it has to predict, so that its loss means nothing')


def past_is_seen(subject: Subject) -> Finding:
  """Whether a change of a token changes the outputs of later positions of its document."""
  sizes = [influence.size_T[positions].max() for influence in subject.influences
           if influence.change.field == 'tokens' and (positions := _later_positions(influence)).any()]
  if not sizes:
    raise DoesNotApply('no document of a short row has several tokens')
  return judge(min(sizes) > 0, f'a change of a token changes later outputs of its document by {min(sizes):.1e} or more',
               'the model reads no context', Verdict.WARNING)


def answers_hidden(subject: Subject) -> Finding:
  """Whether no position of a decoder sees the next token, its target, because that is marked as bidirectional."""
  batch = subject.small()
  if batch.bidirectional is None or not getattr(subject.base_model, 'causal', False):
    raise DoesNotApply('the objective marks no tokens as visible from before')
  position, following = np.s_[:, :-1], np.s_[:, 1:]
  targets = (batch.weights[position] != 0) & (batch.segments[position] == batch.segments[following])
  targets &= batch.targets[position] == batch.tokens[following]
  if targets.sum() < 0.5 * (batch.weights != 0).sum():   # some are by chance
    raise DoesNotApply('labels are not the tokens after their positions')
  count = int((targets & batch.bidirectional[following]).sum())
  return judge(not count, f'{count} of {int(targets.sum())} targets are marked as bidirectional',
               'the model sees them before it predicts them')


def _unseen(subject: Subject, hidden: Callable[[Influence], np.ndarray], what: str, advice: str) -> Finding:
  """Returns whether changes leave the positions `hidden(influence)`, bool [T], as they are."""
  measured = [(influence.size_T[positions].max(), influence) for influence in subject.influences
              if (positions := hidden(influence)).any()]
  if not measured:
    raise DoesNotApply(f'a short row has no {what}')
  size, influence = max(measured, key=lambda pair: pair[0])
  # Equal rows may differ by the rounding of products that are computed in another order.
  limit = max(1e-5, 20 * influence.noise)
  if size <= limit:
    return judge(True, f'{what} change outputs by {size:.1e} at most ({len(measured)} changes, limit {limit:.0e})')
  place = int(np.argmax(np.where(hidden(influence), influence.size_T, 0)))
  return judge(False, f'{what} change outputs by {size:.1e} (limit {limit:.0e}), such as {influence.change.field} '
               f'{influence.change.position} that of position {place}', advice)


def _segment(influence: Influence) -> int:
  """Returns the segment of the token that was changed; 0 for padding."""
  row, change = influence.row, influence.change
  return int((row.segments if change.field == 'tokens' else row.source_segments)[0, change.position])


def _other_documents(influence: Influence) -> np.ndarray:
  segments = influence.row.segments[0]
  return (segments > 0) & (segments != _segment(influence))


def _same_document(influence: Influence) -> np.ndarray:
  return (influence.row.segments[0] == _segment(influence)) & (_segment(influence) > 0)


def _earlier_positions(influence: Influence) -> np.ndarray:
  row, (field, position) = influence.row, (influence.change.field, influence.change.position)
  is_marked = row.bidirectional is not None and field == 'tokens' and row.bidirectional[0, position]
  if field != 'tokens' or is_marked:
    return np.zeros(row.tokens.shape[1], bool)
  return _same_document(influence) & (np.arange(row.tokens.shape[1]) < position)


def _later_positions(influence: Influence) -> np.ndarray:
  return _same_document(influence) & (np.arange(influence.row.tokens.shape[1]) > influence.change.position)
