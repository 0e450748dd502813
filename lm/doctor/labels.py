"""Probes of labels: what the loss trains at each position of the first batch of training, see `trained_labels`.

The last row of the batch has short documents and padding in the place of its own.
"""
import numpy as np

from lm.doctor.findings import DoesNotApply, Finding, Verdict, judge
from lm.doctor.subject import Subject
from lm.doctor.trained_labels import Labels


def labels_shifted_once(subject: Subject) -> Finding:
  """Whether the label of each position is the next token, or, of encoders and of diffusion, the one that was masked."""
  labels = subject.labels
  batch, trained = labels.batch, labels.trained_BT
  total = int(trained.sum())
  if not total:
    return judge(False, 'no position of the first rows has a label', 'there is nothing to learn')
  own = labels.is_trained_on(batch.targets) & trained
  if own.sum() < 0.95 * total:
    return _misplaced(subject, own)
  masked = np.isin(batch.tokens, subject.special.control) & trained
  if not getattr(subject.base_model, 'causal', False) or masked.sum() > 0.5 * total:
    share = ((batch.tokens == batch.targets) & trained).sum() / total
    return judge(share < 0.5, f'{share:.0%} of {total:,} labels can be read in the input of their own position',
                 'the model is asked for what it reads')
  counts = [_hits(labels, shift) for shift in range(4)]
  if counts[1][1] < 8:
    raise DoesNotApply('the first rows have too few labels')
  shares = [hits / max(inside, 1) for hits, inside in counts]
  shift = 1 if shares[1] >= 0.95 else int(np.argmax(shares))
  place = ('of their position', 'after their position')[shift] if shift < 2 else f'{shift} places after theirs'
  text = f'{shares[shift]:.1%} of {counts[shift][1]:,} labels are the token {place}'
  if shares[shift] < 0.95:
    return judge(bool(subject.run.augment), f'{shares[1]:.1%} of {total:,} labels are the token after their position',
                 'right only if inputs are replaced on purpose', Verdict.WARNING)
  if shift <= 1:
    return judge(shift == 1, text, 'the model is asked for the token that it reads')
  if any(form.in_place and form.ahead for form in subject.run.objective.forms):   # it says that labels are the next one
    return judge(False, text, f'labels are shifted {shift} times')
  return judge(False, text, 'right only if the objective predicts further ahead', Verdict.WARNING)


def _hits(labels: Labels, shift: int) -> tuple[int, int]:
  """Returns how many labels are the token `shift` places after their position, and how many have one in their document.
  """
  tokens, segments = labels.batch.tokens, labels.batch.segments
  end = tokens.shape[1] - shift
  inside = labels.trained_BT[:, :end] & (segments[:, :end] == segments[:, shift:])
  hits = labels._replace(directions_BTD=labels.directions_BTD[:, :end]).is_trained_on(tokens[:, shift:]) & inside
  return int(hits.sum()), int(inside.sum())


def _misplaced(subject: Subject, own: np.ndarray) -> Finding:
  """Returns the finding for a loss that does not train on the targets of its batch."""
  batch, trained = subject.labels.batch, subject.labels.trained_BT
  total = int(trained.sum())
  for shift, place in ((1, 'after'), (-1, 'before')):
    moved = subject.labels.is_trained_on(np.roll(batch.targets, -shift, axis=1)) & trained
    if moved.sum() > 0.7 * total:
      return judge(False, f'{moved.sum() / total:.0%} of {total:,} positions are trained on the target of the position '
                   f'{place} them', 'labels are shifted twice, in the data and in the loss')
  if subject.run.objective.denominator is None:
    raise DoesNotApply('the loss has other terms than labels, such as the distribution of a teacher')
  return judge(False, f'{own.sum() / total:.0%} of {total:,} positions are trained on their own target',
               'the loss does not use batch.targets')


def targets_alone_are_trained(subject: Subject) -> Finding:
  """Whether no position of padding or without a weight has a gradient."""
  labels = subject.labels
  padding, trained = labels.batch.segments == 0, labels.trained_BT
  text = (f'{int((trained & ~padding).sum()):,} of {int((~padding).sum()):,} positions are trained on, and '
          f'{int((trained & padding).sum()):,} of {int(padding.sum()):,} of padding')
  if (trained & padding).any():
    return judge(False, text, 'the weights of the loss have to be 0 where segments are 0')
  foreign = int((trained & (labels.batch.weights == 0)).sum())
  return judge(not foreign, text, f'{foreign:,} of them have no weight, such as prompts, which are not to be learned')
