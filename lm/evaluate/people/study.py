"""A study: what people are shown, in which order, and what they may answer.

Everything here is a pure function of the study: of its items, its settings and its seed. What was shown and answered is
kept by `vote_store`.
"""
import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lm.evaluate.people.system_outputs import Item

Mode = Literal['pairwise', 'best_worst', 'likert']
QUESTIONS = {'pairwise': 'Which text is better?', 'best_worst': 'Which text is the best, and which the worst?',
             'likert': 'How good is each text?'}
_LEAST_SYSTEMS = {'pairwise': 2, 'best_worst': 3, 'likert': 1}
_SCRAMBLED_UNITS = 6   # different words, or else characters, that a text must have to be scrambled


@dataclasses.dataclass(frozen=True)
class Study:
  """Outputs of systems on items, and how people judge them.

  Args:
    systems: names, which raters never see.
    items: with a text of each system.
    mode: which of two is better, the best and the worst of all, or a rating of each.
    criteria: what each text is rated by, in mode likert.
    scale: ratings are 1 to this.
    question: shown above the texts.
    checks: attention checks that each rater gets, of which every second repeats a question, in another order.
    seed: of all random orders.
  """
  systems: tuple[str, ...]
  items: tuple[Item, ...]
  mode: Mode = 'pairwise'
  criteria: tuple[str, ...] = ()
  scale: int = 5
  question: str = ''
  checks: int = 4
  seed: int = 0

  def __post_init__(self):
    least = _LEAST_SYSTEMS[self.mode]
    if len(self.systems) < least:
      raise ValueError(f'--mode={self.mode} needs the outputs of at least {least} systems, and there are '
                       f'{len(self.systems)}')
    if self.mode == 'best_worst' and len(self.systems) > 9:
      raise ValueError(f'--mode=best_worst shows all {len(self.systems)} systems at once; at most 9 fit the keys 1-9')
    if (self.mode == 'likert') != bool(self.criteria):
      raise ValueError('--criteria is for --mode=likert, which needs at least one' if self.mode != 'likert' else
                       '--mode=likert needs --criteria, such as fluency,relevance')
    if self.mode != 'likert' and self.scale != 5:
      raise ValueError(f'--scale={self.scale} is for --mode=likert, and --mode={self.mode} has no ratings')
    if not 2 <= self.scale <= 9 or len(set(self.criteria)) < len(self.criteria) or not all(self.criteria):
      raise ValueError(f'--scale={self.scale} and --criteria={",".join(self.criteria)}: a scale has 2 to 9 points, and '
                       'criteria have names that differ')
    if self.checks < 0:
      raise ValueError(f'--checks={self.checks} is negative; 0 makes none')


class Task(NamedTuple):
  """What a rater is shown: texts of one item, side by side.

  `shown` names the system of each text, from left to right. An attention check either has a text whose words are
  scrambled, at the position `scrambled`, or repeats the task with the number `repeats`.
  """
  item: int
  shown: tuple[str, ...]
  scrambled: int | None = None
  repeats: int | None = None

  @property
  def check(self) -> str:
    if self.scrambled is not None:
      return 'scrambled'
    return '' if self.repeats is None else 'repeat'


def questions(study: Study) -> list[tuple[int, tuple[str, ...]]]:
  """Returns what is asked: the number of an item and the systems compared.

  In mode pairwise these are all pairs of systems whose texts differ, since equal texts tell nothing.
  """
  if study.mode != 'pairwise':
    return [(item, study.systems) for item in range(len(study.items))]
  return [(number, (one, other)) for number, item in enumerate(study.items)
          for (one, text), (other, other_text) in itertools.combinations(zip(study.systems, item.texts), 2)
          if text != other_text]


def assign(study: Study, raters: int, votes_per_item: int, existing: Mapping[int, Sequence[Task]]
           ) -> dict[int, list[Task]]:
  """Returns the new tasks of each rater, 1 to `raters`, so that `votes_per_item` raters answer each question.

  Raters share the questions evenly, and at random. `existing` tasks stay; new ones come after them. A rater who had
  none gets attention checks. Raises ValueError where there are too few raters, or too few texts to make the checks of.
  """
  if raters < 1:
    raise ValueError(f'--raters={raters} is nobody; give 1 or more')
  if not 1 <= votes_per_item <= raters:
    raise ValueError(f'--votes_per_item={votes_per_item} needs as many raters, and --raters={raters}')
  assigned = {rater: {(task.item, tuple(sorted(task.shown))) for task in existing.get(rater, ()) if not task.check}
              for rater in range(1, raters + 1)}
  new: dict[int, list[tuple[int, tuple[str, ...]]]] = {rater: [] for rater in assigned}
  if not (all_questions := questions(study)):
    raise ValueError('the systems have equal texts for every item: there is nothing to judge')
  for question in _shuffled(all_questions, study.seed, 'questions'):
    key = (question[0], tuple(sorted(question[1])))
    free = [rater for rater in _shuffled(assigned, study.seed, 'raters', question) if key not in assigned[rater]]
    free.sort(key=lambda rater: len(assigned[rater]))
    for rater in free[:max(0, votes_per_item - (raters - len(free)))]:
      assigned[rater].add(key)
      new[rater].append(question)
  return {rater: _tasks(study, rater, listed, len(existing.get(rater, ()))) for rater, listed in new.items()}


def _tasks(study: Study, rater: int, listed: Collection[tuple[int, tuple[str, ...]]], before: int) -> list[Task]:
  """Returns a rater's new tasks, in random order, with checks if there were none `before`."""
  tasks = [Task(item, tuple(_shuffled(systems, study.seed, rater, item, systems))) for item, systems in listed]
  if before or not tasks or not study.checks:
    return _shuffled(tasks, study.seed, rater, 'order')
  tasks = _shuffled([*tasks, *_scrambles(study, rater, (study.checks + 1) // 2)], study.seed, rater, 'order')
  ordinary = [number for number, task in enumerate(tasks) if not task.check]
  # The first questions come again in the second half, far from where they were, and from right to left.
  repeated = ordinary[:study.checks // 2]
  if len(repeated) < study.checks // 2:
    raise ValueError(f'--checks={study.checks} is too many for rater {rater}, who has {len(ordinary)} questions; give '
                     'fewer')
  points = range(max([len(tasks) // 2, *(number + 1 for number in repeated)]), len(tasks) + 1)
  drawn = sorted(_shuffled(points, study.seed, rater, 'repeats', number)[0] for number in repeated)
  for number, point in reversed(list(zip(repeated, drawn))):
    tasks.insert(point, Task(tasks[number].item, tasks[number].shown[::-1], repeats=number))
  return tasks


def _scrambles(study: Study, rater: int, count: int) -> list[Task]:
  """Returns tasks that show a text beside the same text scrambled, and others of the item if more are shown."""
  long = [(item, system) for item, entry in enumerate(study.items) for system, text in zip(study.systems, entry.texts)
          if len(set(_units(text))) >= _SCRAMBLED_UNITS]
  if not long:
    raise ValueError(f'--checks={study.checks} needs a text with {_SCRAMBLED_UNITS} different words or characters to '
                     'scramble, and there is none; give --checks=0')
  shown = 2 if study.mode == 'pairwise' else max(2, len(study.systems))
  tasks = []
  for item, system in itertools.islice(itertools.cycle(_shuffled(long, study.seed, rater, 'scrambles')), count):
    others = _shuffled([name for name in study.systems if name != system], study.seed, rater, item)[:shown - 2]
    # The scrambled copy has no name yet: it is the empty one.
    order = _shuffled([system, '', *others], study.seed, rater, item, 'scrambled')
    tasks.append(Task(item, tuple(name or system for name in order), scrambled=order.index('')))
  return tasks


def texts(study: Study, task: Task) -> list[str]:
  """Returns the texts that a task shows, from left to right."""
  item = study.items[task.item]
  listed = [item.texts[study.systems.index(system)] for system in task.shown]
  if task.scrambled is not None:
    listed[task.scrambled] = scrambled(listed[task.scrambled], study.seed)
  return listed


def scrambled(text: str, seed: int) -> str:
  """Returns a text with its words in another order, or its characters where it has few words, as in Chinese."""
  units = _units(text)
  mixed = [unit for _, unit in _shuffled(list(enumerate(units)), seed, text)]
  return (' ' if units == text.split() else '').join(units[::-1] if mixed == units else mixed)


def _units(text: str) -> list[str]:
  words = text.split()
  return words if len(words) >= _SCRAMBLED_UNITS else list(''.join(words))


def _shuffled(values: Collection[Any], *key: Any) -> list[Any]:
  """Returns the values in a random order that depends on `key` alone, on any machine and version of Python."""
  return sorted(values, key=lambda value: hashlib.blake2b(repr((key, value)).encode(), digest_size=16).digest())
