"""Plays customers of a shop. A served model answers their questions, and looks orders up with a function.

  python experiments/customer_tools.py --address=http://127.0.0.1:8000/v1 --model=customer_tools

docs/applications.md has the commands that train such a model and serve it. Other servers of OpenAI's protocol, with
models whose templates write tools, do as well.
"""
import functools
import os
import random
import sys

from lm import launch
from lm.data.chat import shop_dialogues
from lm.evaluate import chat_endpoint, report, texts, tool_use
from lm.evaluate.measures import mean
from lm.evaluate.report import Result


def play(*, address: str, model: str, dialogues: int = 50, seed: int = 0, max_tokens: int | None = None,
         key_variable: str | None = None) -> None:
  """Asks the questions of generated customers, executes the calls of the model, and scores its answers.

  Args:
    address: the base address of the server, which speaks OpenAI's protocol, such as http://127.0.0.1:8000/v1.
    model: the name of the model, as the server has it.
    dialogues: the number of customers, with four questions each.
    seed: of the customers; the dialogues of training have other ones.
    max_tokens: the most tokens of an answer or a call; none for what the model has room for.
    key_variable: the environment variable that holds the key of the server; none sends no key.
  """
  if dialogues < 1:
    raise ValueError(f'dialogues={dialogues} must be at least 1')
  key = os.environ.get(key_variable) if key_variable else None
  if key_variable and not key:
    raise ValueError(f'--key_variable={key_variable}, but the environment has no such variable; export it first')
  endpoint = chat_endpoint.Endpoint(address, model, key, max_tokens)
  written, expected, right_calls, wrong = [], [], [], []
  for number in range(dialogues):
    orders, exchanges = shop_dialogues.exchanges(random.Random(f'customer {seed} {number}'))
    functions = {'find_order': functools.partial(find_order, orders)}
    messages: list[dict] = []
    for exchange in exchanges:
      messages.append({'role': 'user', 'content': exchange.question})
      answer, calls = tool_use.answer(endpoint, messages, [shop_dialogues.FIND_ORDER], functions)
      written.append(answer)
      expected.append([exchange.answer])
      right_calls.append(calls == [('find_order', {'item': exchange.item})])
      if answer != exchange.answer:
        wrong.append(f'{exchange.question!r} on the {exchange.item}: {answer!r}, and not {exchange.answer!r}')
    if number < 2:
      show(messages)
    if number % 10 == 9:
      print(f'{number + 1} of {dialogues} customers have their answers', file=sys.stderr)
  print('\n'.join(['', f'{len(wrong)} answers are not as the orders say', *wrong[:6]]))
  measures = [mean('right_calls', right_calls, 'higher'), *texts.ExactMatch()(written, expected),
              *texts.SlotAccuracy(shop_dialogues.SLOTS)(written, expected)]
  print('\n' + report.table({'answers': report.to_json(Result(measures))}))


def find_order(orders: shop_dialogues.Orders, item: str) -> str:
  """Returns the record of an order, or that there is none."""
  return shop_dialogues.record(orders, item)


def show(messages: list[dict]) -> None:
  """Prints a conversation with its calls and their results."""
  print()
  for message in messages:
    calls = [f'{call["function"]["name"]}({call["function"]["arguments"]})' for call in message.get('tool_calls', ())]
    print(f'{message["role"]:9}  {message["content"]}{", ".join(calls)}')


if __name__ == '__main__':
  launch.tool(play)
