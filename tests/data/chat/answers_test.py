"""Answers are compared by what a pattern extracts from them, and patterns that cannot work are refused."""
import json

import finetune_chat
import pytest

from lm import signature
from lm.data import tokenizers
from lm.data.chat import dialogues
from lm.data.text.source import Source

RECORD = 'Betty needs <<50-45=5>>5 more.\n#### 5'


def data(answer, answers=(RECORD,)):
  records = [json.dumps({'prompt': 'How many?', 'completion': text}) for text in answers]
  return dialogues.Dialogues(Source('toy', {'train': records, 'validation': records}, 'abc'), tokenizers.Bytes(), 64,
                             answer=answer)


def test_a_reply_is_right_if_the_pattern_extracts_the_same_from_it():
  replies = ['#### 5', 'I say so.\n####  5 ', '#### 55', '5', RECORD, '']
  line = finetune_chat.score(data('#### (.*)'), [RECORD] * len(replies), replies)
  assert line.startswith('3 of 6 held-out questions') and 'does not match 2 of these replies' in line
  assert 'further records' not in line


def test_without_a_pattern_whole_answers_are_compared():
  line = finetune_chat.score(data(None), [RECORD] * 3, [RECORD, '#### 5', f'{RECORD} '])
  assert line == '1 of 3 held-out questions are answered exactly as their records say'


def test_a_record_without_a_match_is_reported_and_not_counted():
  """A reply without a match is not right either."""
  line = finetune_chat.score(data('#### (.*)'), [RECORD, 'five', 'six'], ['#### 5', 'five', '#### 6'])
  assert line.startswith('1 of 1 held-out questions')
  assert line.endswith('2 further records, which it does not match, are not counted')


@pytest.mark.parametrize('pattern, message', [
    ('#### .*', 'has 0 groups, and needs one; put parentheses'), ('(#+) (.*)', 'has 2 groups'),
    ('(', 'is not a regular expression')])
def test_a_pattern_needs_one_group(pattern, message):
  with pytest.raises(ValueError, match=message):
    signature.call(finetune_chat.experiment, answer=pattern)


def test_a_group_that_does_not_match_extracts_nothing():
  assert data('a|(b)').essence('a') is None and data('(?:####|=) (.*)').essence('= 7 ') == '7'


def test_a_pattern_without_a_match_in_any_record_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match=r"--answer=A: \(\.\*\) finds nothing in the first 2 .* such as 'six'"):
    data('A: (.*)', ['six', 'seven']).open(tmp_path)
  assert not list(tmp_path.iterdir())
