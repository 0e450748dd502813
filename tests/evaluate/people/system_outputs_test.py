"""Outputs are matched by id, whatever the order; what does not fit together is refused in a line that names it."""
import json

import pytest

from lm.evaluate.people import system_outputs


def write(folder, **files):
  for name, lines in files.items():
    text = lines if isinstance(lines, str) else ''.join(json.dumps(line) + '\n' for line in lines)
    (folder / f'{name}.jsonl').write_text(text)
  return system_outputs.read({name: folder / f'{name}.jsonl' for name in files})


def test_outputs_are_matched_by_id_in_the_order_of_the_first_file(tmp_path):
  items = write(tmp_path, a=[{'id': 2, 'text': 'two', 'prompt': 'count'}, {'id': 1, 'text': 'one'}],
                b=[{'id': 1, 'candidate': 'ONE'}, {'id': 2, 'text': 'TWO'}])
  assert items == (('2', 'count', ('two', 'TWO')), ('1', '', ('one', 'ONE')))


def test_plain_text_has_an_output_a_line(tmp_path):
  for name in 'ab':
    (tmp_path / name).write_bytes(f'{name} one\r\n{name} two\u2028half'.encode())
  items = system_outputs.read({name: tmp_path / name for name in 'ab'})
  assert [item.texts for item in items] == [('a one', 'b one'), ('a two\u2028half', 'b two\u2028half')]


@pytest.mark.parametrize('a,b,message', [
    ([{'text': 'x'}] * 3, [{'text': 'x'}] * 2, 'a.jsonl has 3 texts and .*b.jsonl has 2; without ids'),
    ([{'id': 7, 'text': 'x'}], [{'id': 8, 'text': 'x'}], 'b.jsonl lacks 1 of the 1 ids of .*a.jsonl: 7;'),
    ([{'text': 'x'}], [{'text': 'x'}] * 2, 'a.jsonl has 1 texts and .*b.jsonl has 2;'),
    ([{'id': 1, 'text': ' '}, {'id': 2, 'text': 'x'}], [], r'a.jsonl line 1 .id 1. has an empty text'),
    ([{'id': 1, 'text': 'x'}, {'text': 'y'}], [], 'a.jsonl line 2 has the id null, and others have one'),
    ([{'id': 1, 'text': 'x'}] * 2, [{'text': 'x'}], 'a.jsonl has the id 1 on two lines, 1 and 2'),
    ('{"id": 1, "text": "x"}\n\n' * 2, [{'id': 1, 'text': 'x'}], 'a.jsonl has the id 1 on two lines, 1 and 3'),
    ([{'id': [], 'text': 'x'}], [], r'a.jsonl line 1 has the id \[\]'),
    ([{'id': 1}], [], 'a.jsonl line 1 .id 1. has none of the fields text'),
    ([{'text': 'x \ud83d'}], [], 'a.jsonl line 1 has half of a surrogate pair'),
    ('{"text": "x"}\n{oops\n', [], 'a.jsonl line 2 is not JSON'), ('', [], 'a.jsonl is empty'),
    ([{'id': 1, 'text': 'x', 'prompt': 'p'}], [{'id': 1, 'text': 'x', 'prompt': 'q'}], 'different prompts for id 1')])
def test_what_does_not_fit_is_refused(tmp_path, a, b, message):
  with pytest.raises(ValueError, match=message):
    write(tmp_path, a=a, b=b)


def test_text_that_is_not_utf_8_is_refused(tmp_path):
  (tmp_path / 'a').write_bytes(b'caf\xe9\n')
  with pytest.raises(ValueError, match='a is no text in UTF-8: .* in position 3'):
    system_outputs.read({'a': tmp_path / 'a'})


def test_systems_are_named_by_their_files_or_as_the_user_says():
  files = system_outputs.named_files(['x/base.jsonl', 'new=y/base.jsonl'])
  assert {name: str(path) for name, path in files.items()} == {'base': 'x/base.jsonl', 'new': 'y/base.jsonl'}
  with pytest.raises(ValueError, match='y/base.jsonl.*write name=file'):
    system_outputs.named_files(['x/base.jsonl', 'y/base.jsonl'])
