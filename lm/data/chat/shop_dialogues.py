"""Generated dialogues between a shop and its customers.

A dialogue has the records of some orders as the system's message, and four questions with their answers. What the
records do not say is answered by `HAND_OVER`, with which a person takes over. Or the records are not in the prompt, and
the assistant looks each order up by a function.
"""
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.data.chat.tool_turns import as_text
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


Orders = dict[str, dict[str, str]]   # the values of the fields of each item
FIND_ORDER = {'type': 'function', 'function': {'name': 'find_order', 'parameters': {
    'type': 'object', 'properties': {'item': {'type': 'string'}}, 'required': ['item'], 'additionalProperties': False}}}


class Exchange(NamedTuple):
  """A question of a customer, the item that it is about, and the answer."""
  question: str
  item: str
  answer: str


def exchanges(rng: random.Random, new: bool = False) -> tuple[Orders, list[Exchange]]:
  """Returns the orders of a customer, and questions on them; with `new`, no order answers the last one."""
  items = rng.sample(ITEMS, 4)
  orders = {item: {name: rng.choice(values) for name, (values, _, _) in FIELDS.items() if rng.random() < 0.85}
            for item in items[:rng.randint(1, 3)]}
  result, item = [], ''
  for turn in range(TURNS):
    follows = item in orders and rng.random() < 0.4   # the question is about the order of the one before
    item = item if follows else rng.choice(items if rng.random() < 0.2 else list(orders))
    name = rng.choice(list(FIELDS))
    _, questions, statement = FIELDS[name]
    value = orders.get(item, {}).get(name)
    if new and turn == TURNS - 1:
      questions, value = NEW, None
    question = rng.choice(questions).format('it' if follows else f'the {item}')
    result.append(Exchange(question, item, HAND_OVER if value is None else f'The {item} {statement.format(value)}'))
  return orders, result


def record(orders: Orders, item: str) -> str:
  """Returns what the shop has of an order, as `find_order` gives it to a model."""
  if item not in orders:
    return 'There is no such order.'
  facts = ['It ' + FIELDS[name][2].format(value) for name, value in orders[item].items()]
  return ' '.join([f'The {item} order.', *facts])


def records(orders: Orders) -> str:
  """Returns the records of all orders, each in a line."""
  return '\n'.join(record(orders, item) for item in orders)


def written(orders: Orders, questions: Sequence[Exchange], tools: bool = False) -> list[dict[str, str]]:
  """Returns the messages of a dialogue, of which the first has the records of all orders.

  With `tools`, the first message has the function `find_order` instead, and the assistant calls it before each answer.
  `ToolTurns` says how this is written.
  """
  messages: list[Mapping[str, Any]] = []
  for question, item, answer in questions:
    messages.append({'role': 'user', 'content': question})
    if tools:
      function = {'name': 'find_order', 'arguments': {'item': item}}
      messages += [{'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': function}]},
                   {'role': 'tool', 'content': record(orders, item)}]
    messages.append({'role': 'assistant', 'content': answer})
  return as_text(messages, [FIND_ORDER]) if tools else [{'role': 'system', 'content': records(orders)}, *messages]


def dialogue(rng: random.Random, new: bool = False, tools: bool = False) -> list[dict[str, str]]:
  """Returns the messages of a dialogue; see `exchanges` and `written`."""
  return written(*exchanges(rng, new), tools)


def shop(count: int = 20_000, validation: float = 0.02, seed: int = 0, tools: bool = False) -> Source:
  """Returns records {"messages"}; the split `validation-new` has a question of `NEW` at the end of each."""
  def make(rng: random.Random) -> tuple[str, str]:
    orders, questions = exchanges(rng)
    return records(orders), json.dumps({'messages': written(orders, questions, tools)})

  name = 'shop dialogues with tools' if tools else 'shop dialogues'
  dialogues = puzzles.generated(name, make, count, validation, seed)
  new = source.Documents(lambda: range(int(count * validation)), lambda i: json.dumps(
      {'messages': dialogue(random.Random(f'new {seed} {i}'), new=True, tools=tools)}))
  return Source(dialogues.name, {**dialogues.splits, 'validation-new': new}, f'{dialogues.fingerprint} new',
                dialogues.license)
