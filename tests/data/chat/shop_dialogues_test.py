"""Every answer of a generated dialogue follows from its records, which are read here by hand, or hands over."""
import json
import random
import re

from lm.data.chat import shop_dialogues
from lm.data.chat.shop_dialogues import HAND_OVER

# What each question asks for, by a word of it, as the record has it.
STATE, DAY, PRICE, CITY, RETURN = (r' It is (\w+)\.', r' It arrives on (\w+)\.', r' It cost (\d+) euro\.',
                                   r' It goes to (\w+)\.', r' It can be returned until (\d+ \w+)\.')
PATTERNS = {'Where is': STATE, 'state': STATE, 'When': DAY, 'day': DAY, 'pay': PRICE, 'cost': PRICE, 'you send': CITY,
         'address': CITY, 'Can I return': RETURN, 'back?': RETURN}


def expected(records: str, question: str, item: str) -> str | None:
  pattern, = {PATTERNS[word] for word in PATTERNS if word in question}
  line = next((line for line in records.split('\n') if line.startswith(f'The {item} order.')), '')
  match = re.search(pattern, line)
  return match and match[1]


def test_answers_are_those_of_the_records():
  handed_over = answered = 0
  for i in range(600):
    system, *turns = shop_dialogues.dialogue(random.Random(i))
    item = ''
    for question, answer in zip(turns[::2], turns[1::2]):
      assert (system['role'], question['role'], answer['role']) == ('system', 'user', 'assistant')
      named = re.search(r'the (\w+)(?: back| arrive| cost)?\?$', question['content'])
      item = named[1] if named and named[1] in shop_dialogues.ITEMS else item   # 'it' is the item of the last question
      value = expected(system['content'], question['content'], item)
      handed_over, answered = handed_over + (value is None), answered + (value is not None)
      if value is None:
        assert answer['content'] == HAND_OVER
      else:
        assert re.findall(shop_dialogues.SLOTS, answer['content']) == [item, *value.split()]
  assert handed_over > 200 and answered > 600


def test_with_tools_each_answer_follows_from_the_record_that_was_looked_up():
  for i in range(100):
    system, *turns = shop_dialogues.dialogue(random.Random(i), tools=True)
    _, *plain = shop_dialogues.dialogue(random.Random(i))
    assert '"name": "find_order"' in system['content']
    assert [turns[::4], turns[3::4]] == [plain[::2], plain[1::2]]
    for call, result, answer in zip(turns[1::4], turns[2::4], turns[3::4]):
      function = json.loads(re.fullmatch('<tool_call>(.*)</tool_call>', call['content'])[1])
      item, = function['arguments'].values()
      record = re.fullmatch('<tool_response>(.*)</tool_response>', result['content'])[1]
      assert record.startswith(f'The {item} order.') or record == 'There is no such order.'
      if answer['content'] != HAND_OVER:
        named, *values = re.findall(shop_dialogues.SLOTS, answer['content'])
        assert named == item and ' '.join(values) in record


def test_new_questions_are_in_no_training_record_and_no_records_are_in_two_splits():
  source = shop_dialogues.shop(800, 0.1)
  splits = {name: [json.loads(text)['messages'] for text in texts] for name, texts in source.splits.items()}
  assert len(splits['train']) + len(splits['validation']) == 800 and len(splits['validation']) > 40
  assert not ({dialogue[0]['content'] for dialogue in splits['train']}
              & {dialogue[0]['content'] for dialogue in splits['validation']})
  words = {word for dialogue in splits['train'] for message in dialogue for word in message['content'].split()}
  assert len(splits['validation-new']) == 80 and not words & {'warranty', 'colour', 'discount', 'signed', 'manual'}
  assert all(dialogue[-1]['content'] == HAND_OVER and re.search('warranty|colour|discount|signed|manual',
                                                                dialogue[-2]['content'])
             for dialogue in splits['validation-new'])
  assert json.loads(shop_dialogues.shop(800, 0.1).splits['train'][5])['messages'] == splits['train'][5]
