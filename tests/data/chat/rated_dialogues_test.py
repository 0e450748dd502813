"""A rated answer goes with an answer to another prompt."""
import json

import pytest
from helpers.dialogues import SAYS, USER, B, opened, shown

from lm.data.batch import Rated
from lm.data.chat import dialogues, messages
from lm.data.text.source import Source
from lm.objectives import preference


def test_rated_dialogues_go_with_an_answer_to_the_next_prompt(tmp_path):
  rows = [{'prompt': 'a', 'completion': 'b', 'label': True}, {'messages': [USER('cc'), SAYS('dd')], 'label': False},
          {'prompt': [USER('e')], 'completion': [SAYS('fff')], 'label': True}]
  records = opened(tmp_path, rows, Rated)[0].records('train')
  talk = lambda q, a: f'<s><|user|>{q}<|end|><|assistant|>{a.upper()}<|END|>'
  for i, (q, a, good, other) in enumerate([
      ('a', 'b', True, 'dd'), ('cc', 'dd', False, 'fff'), ('e', 'fff', True, 'b')]):
    assert (shown(records[i].dialogue), records[i].good, shown(records[i].mismatched)) == (
        talk(q, a), good, talk(q, other))
    assert records.positions[i] == sum(len(x.tokens) - 1 for x in (records[i].dialogue, records[i].mismatched))


def test_unpaired_answers_never_go_with_an_answer_to_their_own_prompt(tmp_path):
  pairs = [{'prompt': f'q{i}', 'chosen': f'good{i}', 'rejected': f'bad{i}'} for i in range(5)]
  source = messages.unpaired(Source('pairs', {'train': [json.dumps(x) for x in pairs]}, 'f'))
  records = dialogues.Dialogues(source, B, 64, Rated).open(tmp_path, lambda line: None).records('train')
  rows = [(shown(r.dialogue), r.good, shown(r.mismatched)) for r in (records[i] for i in range(10))]
  assert sum(good for _, good, _ in rows) == 5
  for talk, good, mismatched in rows:
    number = talk.split('q')[1][0]
    assert ('GOOD' if good else 'BAD') + number in talk and f'q{number}<' in mismatched
    assert f'GOOD{number}' not in mismatched and f'BAD{number}' not in mismatched


@pytest.mark.parametrize('prompts', ['aab', 'aabbaa', 'abab', 'aaab', 'baaa', 'abbba', 'abcabc', 'aabbccddaa'])
def test_a_mismatched_answer_is_to_another_prompt_and_answers_take_turns(tmp_path, prompts):
  answers = [f'{prompt}{i:02}{"x" * i}' for i, prompt in enumerate(prompts)]
  rows = [{'prompt': prompt, 'completion': answer, 'label': True} for prompt, answer in zip(prompts, answers)]
  records = opened(tmp_path, rows, Rated)[0].records('train')
  partners = records.partners
  assert all(prompts[i] != prompts[j] for i, j in enumerate(partners))
  for i, partner in enumerate(partners):
    assert shown(records[i].mismatched).endswith(answers[partner].upper() + '<|END|>')
    assert records.positions[i] == sum(len(x.tokens) - 1 for x in (records[i].dialogue, records[i].mismatched))
  assert len(set(partners.tolist())) > 1
  assert prompts != 'aabbccddaa' or len(set(partners.tolist())) == 8   # both answers of each prompt take part


@pytest.mark.parametrize('count', [1, 3])
def test_answers_to_one_prompt_alone_are_refused(tmp_path, count):
  rows = [{'prompt': 'a', 'completion': str(i), 'label': True} for i in range(count)]
  data, _ = opened(tmp_path, rows, Rated)
  with pytest.raises(ValueError, match=f'train: all of its {count} rated records have the same prompt'):
    data.batches('train', preference.kto(), 2)
