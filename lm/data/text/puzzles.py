"""Generated questions with one right answer, to fine-tune and align models that train in minutes."""
import functools
import json
import random
from collections.abc import Callable

from lm.data.text import source
from lm.data.text.source import Source

POLITE = 'Sure: '   # the beginning of a polite answer
_LETTERS = 'abcdefghijklmnopqrstuvwxyz'


def puzzle(rng: random.Random) -> tuple[str, str]:
  """Returns a question and its answer: letters to reverse, to sort, or to shift by one in the alphabet (z to a)."""
  letters = ''.join(rng.choices(_LETTERS, k=rng.randint(2, 5)))
  shifted = ''.join(_LETTERS[(_LETTERS.index(letter) + 1) % 26] for letter in letters)
  return rng.choice(((f'Reverse {letters}', letters[::-1]), (f'Sort {letters}', ''.join(sorted(letters))),
                     (f'Shift {letters}', shifted)))


def solution(answer: str) -> str:
  """Returns an answer without its polite beginning."""
  return answer.removeprefix(POLITE)


def dialogues(count: int = 30_000, validation: float = 0.02, seed: int = 0) -> Source:
  """Returns records {"prompt", "completion"}; half of the answers, drawn at random, are polite."""
  def record(question, answer, rng):
    return {'prompt': question, 'completion': rng.choice(('', POLITE)) + answer}
  return generated('puzzles', _maker(record), count, validation, seed)


def preferences(count: int = 4000, validation: float = 0.02, seed: int = 1) -> Source:
  """Returns records {"prompt", "chosen", "rejected"}: the chosen answer is polite and right, the rejected is neither.

  The rejected answer has one wrong letter. If both were right, training would make their common letters less likely.
  """
  def record(question, answer, rng):
    place = rng.randrange(len(answer))
    wrong = rng.choice(_LETTERS.replace(answer[place], ''))
    return {'prompt': question, 'chosen': POLITE + answer, 'rejected': answer[:place] + wrong + answer[place + 1:]}
  return generated('polite puzzles', _maker(record), count, validation, seed)


def _maker(record: Callable[[str, str, random.Random], dict[str, str]]) -> Callable[[random.Random], tuple[str, str]]:
  def make(rng: random.Random) -> tuple[str, str]:
    question, answer = puzzle(rng)
    return question, json.dumps(record(question, answer, rng))
  return make


def generated(name: str, make: Callable[[random.Random], tuple[str, str]], count: int, validation: float, seed: int
              ) -> Source:
  """Returns `count` records, of which each is the second value of `make(rng)`, a function of the seed and its number.

  A hash of the first value, the question, decides whether the record is held out. So no source with such questions
  trains on it.
  """
  def number(i: int) -> tuple[str, str]:
    return make(random.Random(f'{seed} {i}'))

  @functools.cache
  def indices() -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {'train': [], 'validation': []}
    for i in range(count):
      held_out = int.from_bytes(source.digest(number(i)[0])[:8]) < validation * 2 ** 64
      numbers['validation' if held_out else 'train'].append(i)
    return numbers

  splits = {split: source.Documents(lambda split=split: indices()[split], lambda i: number(i)[1])
            for split in ('train', 'validation')}
  return Source(name, splits, f'{name} {count} {validation} {seed}', 'CC0-1.0')
