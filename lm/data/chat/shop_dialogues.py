"""Generated dialogues between a shop and its customers, whose answers are in the records of the prompt, or nowhere.

A dialogue has the records of some orders as the system's message, and four questions with their answers. What the
records do not say is answered by `HAND_OVER`, with which a person takes over.
"""
import json
import random

from lm.data.text import puzzles, source
from lm.data.text.source import Source

HAND_OVER = 'I do not know that, so a colleague will take over.'
TURNS = 4   # questions of a dialogue
ITEMS = ('kettle', 'lamp', 'chair', 'table', 'jacket', 'scarf', 'tent', 'mirror', 'clock', 'guitar', 'camera', 'radio',
         'printer', 'blanket', 'helmet', 'ladder', 'drill', 'puzzle', 'backpack', 'speaker')
DAYS = ('Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday')
CITIES = ('Lyon', 'Porto', 'Vienna', 'Oslo', 'Turin', 'Dublin', 'Prague', 'Ghent', 'Basel', 'Malmo')
MONTHS = ('March', 'April', 'May', 'June')
# Of each field: its values, what customers ask, and what the record and the answer say of the item.
FIELDS = {
    'state': (('packed', 'sent', 'delayed', 'ready'), ('Where is {}?', 'What is the state of {}?'), 'is {}.'),
    'day': (DAYS, ('When will {} arrive?', 'On which day do I get {}?'), 'arrives on {}.'),
    'price': (tuple(map(str, range(10, 100))), ('How much did I pay for {}?', 'What did {} cost?'),
              'cost {} euro.'),
    'city': (CITIES, ('Where do you send {}?', 'Which address has {}?'), 'goes to {}.'),
    'return': (tuple(f'{day} {month}' for month in MONTHS for day in range(1, 31)),
               ('Can I return {}?', 'How long can I send {} back?'), 'can be returned until {}.')}
NEW = ('How long is the warranty of {}?', 'Which colour has {}?', 'Can I get a discount on {}?',
       'Who signed for {}?', 'Is there a manual for {}?')   # questions that no training record has
SLOTS = r'\b(' + '|'.join((*ITEMS, *FIELDS['state'][0], *DAYS, *CITIES, *MONTHS, r'\d+')) + r')\b'


def dialogue(rng: random.Random, new: bool = False) -> list[dict[str, str]]:
  """Returns the messages of a dialogue; with `new`, the last question is one of `NEW`, which no record answers."""
  items = rng.sample(ITEMS, 4)
  orders = {item: {name: rng.choice(values) for name, (values, _, _) in FIELDS.items() if rng.random() < 0.85}
            for item in items[:rng.randint(1, 3)]}
  lines = [' '.join([f'The {item} order.', *('It ' + FIELDS[name][2].format(value) for name, value in order.items())])
           for item, order in orders.items()]
  messages, item = [{'role': 'system', 'content': '\n'.join(lines)}], ''
  for turn in range(TURNS):
    follows = item in orders and rng.random() < 0.4   # the question is about the order of the one before
    item = item if follows else rng.choice(items if rng.random() < 0.2 else list(orders))
    name = rng.choice(list(FIELDS))
    _, questions, statement = FIELDS[name]
    value = orders.get(item, {}).get(name)
    if new and turn == TURNS - 1:
      questions, value = NEW, None
    question = rng.choice(questions).format('it' if follows else f'the {item}')
    answer = HAND_OVER if value is None else f'The {item} {statement.format(value)}'
    messages += [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
  return messages


def shop(count: int = 20_000, validation: float = 0.02, seed: int = 0) -> Source:
  """Returns records {"messages"}; the split `validation-new` has a question of `NEW` at the end of each."""
  def make(rng: random.Random) -> tuple[str, str]:
    messages = dialogue(rng)
    return messages[0]['content'], json.dumps({'messages': messages})

  dialogues = puzzles.generated('shop dialogues', make, count, validation, seed)
  new = source.Documents(lambda: range(int(count * validation)), lambda i: json.dumps(
      {'messages': dialogue(random.Random(f'new {seed} {i}'), new=True)}))
  return Source(dialogues.name, {**dialogues.splits, 'validation-new': new}, f'{dialogues.fingerprint} new',
                dialogues.license)
