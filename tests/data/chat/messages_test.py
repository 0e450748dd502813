"""Records are read as messages, in one line refused where they have another shape."""
import gzip
import json

import pytest
from helpers import shared_data
from helpers.dialogues import SAYS, USER, B, opened

from lm.data.batch import Dialogue, Pair, Rated
from lm.data.chat import dialogues, messages
from lm.data.text import corpora


def test_text_that_begins_like_a_transcript_is_text(tmp_path):
  read = lambda kind=Dialogue, **row: messages.read(json.dumps(row), kind)
  for text in ('Human: Homo sapiens', 'Assistant: me', 'Human: a\n\nAssistant: b'):
    assert read(prompt='Name a species', completion=text) == ([USER('Name a species')], ([SAYS(text)],), None)
    assert read(prompt=text, completion='c').prompt == [USER(text)]
    for other in ('no', f'{text}!'):
      assert read(Pair, prompt='p', chosen=text, rejected=other) == ([USER('p')], ([SAYS(text)], [SAYS(other)]), None)
  whole = 'Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
  for kind, row in ((Dialogue, {'completion': 'd'}), (Pair, {'chosen': 'd', 'rejected': 'e'})):
    assert read(kind, prompt=whole, **row).prompt == [USER('a'), SAYS('b'), USER('c')]


@pytest.mark.parametrize('record, kind, message', [
    ({'question': 'a', 'answer': 'b'}, Dialogue, r"neither messages='messages' nor completion.*\(question, answer\)"),
    ({'completion': 'b', 'text': 'c'}, Dialogue,
     "'prompt' holds no text, nor messages; its fields are completion, text"),
    ({'prompt': 5, 'completion': 'b'}, Dialogue, "'prompt' holds no text"),
    ({'messages': []}, Dialogue, "'messages' holds no messages"),
    ({'messages': [{'role': 'user'}]}, Dialogue, "a message in 'messages' is no"),
    ({'messages': [{'role': 'tool', 'content': 'x'}, SAYS('y')]}, Dialogue, 'a role of system, user, assistant.*tool'),
    ({'prompt': 'a', 'chosen': 'b'}, Pair, "'rejected' holds no text"),
    ({'chosen': 'b', 'rejected': 'c'}, Pair, "do not begin with the same message.*no prompt='prompt'"),
    ({'prompt': 'a', 'completion': 'b', 'label': 1}, Rated, "label='label' must be true or false, and it is 1"),
    ({'prompt': 'a', 'completion': 'b'}, Rated,
     'must be true or false, and it is null; its fields are prompt, completion'),
    ([1], Dialogue, 'not a record')])
def test_a_record_of_another_shape_is_refused_in_one_line(tmp_path, record, kind, message):
  with pytest.raises(ValueError, match=message) as error:
    opened(tmp_path, [record], kind)
  assert '\n' not in str(error.value) and json.dumps(record) in str(error.value)


def test_a_line_that_is_not_json_is_refused_by_its_number(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"prompt": "a", "completion": "b"}\n{"prompt": }\n')
  data = dialogues.Dialogues(corpora.jsonl(f'{tmp_path}/a.jsonl', None, 0), B, 16)
  with pytest.raises(ValueError, match=r'a\.jsonl:2: not JSON'):
    data.open(tmp_path / 'run', lambda line: None)


def test_the_dialogues_of_taskmaster_are_read():
  rows = json.loads(gzip.decompress((shared_data.folder('taskmaster4') / 'data_07.json.gz').read_bytes()))
  for row in rows:
    (dialogue,) = messages.read(json.dumps(row), Dialogue, messages.Keys(messages='utterances')).answers
    assert [(message['role'], message['content']) for message in dialogue] == [
        (turn['speaker'], turn['text']) for turn in row['utterances']]
  assert len(rows) == 210
