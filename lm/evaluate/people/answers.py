"""Answers of raters: which are valid, and which fail an attention check.

An answer names texts by their position, from left to right: {'choice': 0}, {'choice': 'tie'},
{'best': 2, 'worst': 0}, or {'ratings': [[5, 4], [2, 2]]} with a rating of each text by each criterion.
"""
from typing import Any

import numpy as np

from lm.evaluate.people.study import Study, Task

Answer = dict[str, Any]


def check(study: Study, task: Task, answer: Any) -> Answer:
  """Returns the answer if it fits the task; raises ValueError otherwise."""
  count = len(task.shown)
  is_position = lambda value: type(value) is int and 0 <= value < count
  match study.mode, answer:
    case 'pairwise', {'choice': choice} if choice == 'tie' or is_position(choice):
      return {'choice': choice}
    case 'best_worst', {'best': best, 'worst': worst} if is_position(best) and is_position(worst) and best != worst:
      return {'best': best, 'worst': worst}
    case 'likert', {'ratings': [*ratings]} if len(ratings) == count:
      is_rating = lambda value: type(value) is int and 1 <= value <= study.scale
      if all(isinstance(row, list) and len(row) == len(study.criteria) and all(map(is_rating, row)) for row in ratings):
        return {'ratings': ratings}
  raise ValueError(f'the answer {str(answer)[:200]} does not fit a task with {count} texts in mode {study.mode}')


def fails(study: Study, task: Task, answer: Answer, first: Answer | None = None) -> bool | None:
  """Returns whether the answer to an attention check is wrong; None where it cannot be known.

  The scrambled text must lose to the same text unscrambled: in mode best_worst it must not be the best, nor the
  unscrambled one the worst. A repeated task must not have the opposite of its `first` answer: another winner, a best
  that was the worst, or ratings that differ by more than one point on average.
  """
  if task.check == 'scrambled':
    scrambled = task.scrambled
    intact = next(place for place, system in enumerate(task.shown)
                  if system == task.shown[scrambled] and place != scrambled)
    if study.mode == 'pairwise':
      return answer['choice'] != intact
    if study.mode == 'best_worst':
      return answer['best'] == scrambled or answer['worst'] == intact
    return sum(answer['ratings'][scrambled]) >= sum(answer['ratings'][intact])
  if first is None:
    return None
  mirrored = lambda place: len(task.shown) - 1 - place   # a repeated task shows its texts from right to left
  if study.mode == 'pairwise':
    return 'tie' not in (answer['choice'], first['choice']) and mirrored(answer['choice']) != first['choice']
  if study.mode == 'best_worst':
    return mirrored(answer['best']) == first['worst'] or mirrored(answer['worst']) == first['best']
  return bool(np.abs(np.subtract(answer['ratings'][::-1], first['ratings'])).mean() > 1)
