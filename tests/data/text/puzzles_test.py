"""Puzzles have right answers."""
import json

from lm.data.text import puzzles


def test_puzzles_are_right_and_no_question_is_on_both_sides():
  sources = [puzzles.dialogues(800, 0.2), puzzles.preferences(800, 0.2)]
  prompts = {split: {json.loads(x)['prompt'] for source in sources for x in source.splits[split]}
             for split in ('train', 'validation')}
  assert not prompts['train'] & prompts['validation'] and min(map(len, prompts.values())) > 100
  for text in sources[1].splits['train']:
    row = json.loads(text)
    verb, letters = row['prompt'].split()
    expected = {'Reverse': letters[::-1], 'Sort': ''.join(sorted(letters)),
                'Shift': letters.translate(str.maketrans('abcdefghijklmnopqrstuvwxyz', 'bcdefghijklmnopqrstuvwxyza'))}
    assert expected[verb] == puzzles.solution(row['chosen']) == row['chosen'].removeprefix('Sure: ')
    assert sum(a != b for a, b in zip(row['rejected'], expected[verb], strict=True)) == 1
