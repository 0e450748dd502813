"""JSON records become dialogues: how they are parsed, which tokens train, how they are packed, and what is refused."""
import gzip
import json
import re
import time

import numpy as np
import pytest
from helpers import shared_data
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lm.data.batch import Batch, Dialogue, Pair, Rated
from lm.data.chat import conversation, dialogues, messages, templates
from lm.data.text import corpora, puzzles
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.objectives import preference
from lm.objectives.supervised import supervised

USER, SAYS = (lambda text: {'role': 'user', 'content': text}), (lambda text: {'role': 'assistant', 'content': text})
B = Bytes()
END = B.control_id('<|end|>')


def opened(folder, records, kind=Dialogue, held_out=(), length=64, **options):
  texts = [json.dumps(record) for record in records]
  source = Source('made', {'train': texts, 'validation': [json.dumps(x) for x in held_out] or texts[:1]}, str(records))
  if not held_out:   # what is held out is dropped from train
    source = Source('made', {'train': texts}, str(records))
  lines = []
  data = dialogues.Dialogues(source, options.pop('tokenizer', B), length, kind, **options)
  return data.open(folder, lines.append), lines


def shown(dialogue: Dialogue) -> tuple[str, str]:
  """Returns the text of a dialogue, with the tokens that train in capitals and control tokens by their names."""
  names = {B.control_id(name): name for name in B.control_names}
  text = lambda i: names.get(int(i)) or chr(i)
  return ''.join(text(i).upper() if is_answer else text(i) for i, is_answer in zip(*dialogue))


TALK = '<s><|user|>hi<|end|><|assistant|>YO<|END|>'


@pytest.mark.parametrize('record, expected', [
    ({'prompt': 'hi', 'completion': 'yo'}, TALK),
    ({'prompt': [USER('hi')], 'completion': [SAYS('yo')]}, TALK),
    ({'messages': [USER('hi'), SAYS('yo')]}, TALK),
    ({'messages': [{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'yo'}]}, TALK),
    ({'messages': [{'speaker': 'user', 'text': 'hi'}, {'speaker': 'assistant', 'text': 'yo'}]}, TALK),
    ({'messages': '\n\nHuman: hi\n\nAssistant: yo'}, TALK),
    ({'messages': [{'role': 'system', 'content': 's'}, USER('a'), SAYS('b'), USER('c'), SAYS('d')]},
     '<s><|system|>s<|end|><|user|>a<|end|><|assistant|>B<|END|><|user|>c<|end|><|assistant|>D<|END|>'),
    ({'prompt': [USER('a'), SAYS('b'), USER('c')], 'completion': 'd'},
     '<s><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>D<|END|>')])
def test_dialogues_of_all_shapes(tmp_path, record, expected):
  assert shown(opened(tmp_path, [record])[0].records('train')[0]) == expected


@pytest.mark.parametrize('record, keys', [
    ({'prompt': 'hi', 'chosen': 'yo', 'rejected': 'no'}, {}),
    ({'q': 'hi', 'best': 'yo', 'worst': 'no'}, {'prompt': 'q', 'chosen': 'best', 'rejected': 'worst'}),
    ({'prompt': [USER('hi')], 'chosen': [SAYS('yo')], 'rejected': [SAYS('no')]}, {}),
    ({'prompt': 'hi', 'chosen': [USER('hi'), SAYS('yo')], 'rejected': [USER('hi'), SAYS('no')]}, {}),
    ({'chosen': [USER('hi'), SAYS('yo')], 'rejected': [USER('hi'), SAYS('no')]}, {}),
    ({'chosen': '\n\nHuman: hi\n\nAssistant: yo', 'rejected': '\n\nHuman: hi\n\nAssistant: no'}, {})])
def test_pairs_of_all_shapes(tmp_path, record, keys):
  records = opened(tmp_path, [record], Pair, keys=messages.Keys(**keys))[0].records('train')
  assert tuple(map(shown, records[0])) == (TALK, TALK.replace('YO', 'NO'))
  assert records.positions.tolist() == [sum(len(x.tokens) - 1 for x in records[0])]


def test_text_that_begins_like_a_transcript_is_text(tmp_path):
  from lm.data.chat import messages
  read = lambda kind=Dialogue, **row: messages.read(json.dumps(row), kind)
  for text in ('Human: Homo sapiens', 'Assistant: me', 'Human: a\n\nAssistant: b'):
    assert read(prompt='Name a species', completion=text) == ([USER('Name a species')], ([SAYS(text)],), None)
    assert read(prompt=text, completion='c').prompt == [USER(text)]
    for other in ('no', f'{text}!'):
      assert read(Pair, prompt='p', chosen=text, rejected=other) == ([USER('p')], ([SAYS(text)], [SAYS(other)]), None)
  whole = 'Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
  for kind, row in ((Dialogue, {'completion': 'd'}), (Pair, {'chosen': 'd', 'rejected': 'e'})):
    assert read(kind, prompt=whole, **row).prompt == [USER('a'), SAYS('b'), USER('c')]


def test_what_two_transcripts_share_is_the_prompt(tmp_path):
  talk = '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
  pair = opened(tmp_path, [{'chosen': talk + ' d', 'rejected': talk + ' b'}], Pair)[0].records('train')[0]
  before = '<s><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>'
  assert shown(pair.chosen) == before + 'D<|END|>' and shown(pair.rejected) == before + 'B<|END|>'


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


def test_plain_is_prompt_completion_and_eos(tmp_path):
  rows = [{'prompt': 'hi', 'completion': 'yo'}, {'prompt': [USER('a'), SAYS('b'), USER('c')], 'completion': 'd'}]
  records = opened(tmp_path, rows, template=conversation.Plain('\n'))[0].records('train')
  assert [shown(records[i]) for i in (0, 1)] == ['<s>hi\nYO</S>', '<s>a\nb</s>c\nD</S>']


def test_bos_comes_once_also_where_the_template_writes_it(tmp_path):
  pytest.importorskip('jinja2')
  template = templates.JinjaTemplate('{{ bos_token }}{% for m in messages %}{{ "<|" + m.role + "|>" }}'
                           '{% if m.role == "assistant" %}'
                           '{% generation %}{{ m.content + "<|end|>" }}{% endgeneration %}'
                           '{% else %}{{ m.content + "<|end|>" }}{% endif %}{% endfor %}', {'bos_token': '<s>'})
  row = {'prompt': 'hi', 'completion': 'yo'}
  assert shown(opened(tmp_path, [row], template=template)[0].records('train')[0]) == TALK


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


def test_a_template_whose_control_tokens_the_tokenizer_lacks_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'writes .*<\|end\|>, no control token.*--plain, of finetune_chat.py'):
    opened(tmp_path, [{'prompt': 'a', 'completion': 'b'}], template=conversation.Turns(),
           tokenizer=Bytes(('<|user|>',)))


def test_a_template_whose_turns_are_plain_text_trains_and_says_so(tmp_path):
  pytest.importorskip('jinja2')
  template = templates.JinjaTemplate('{% for m in messages %}<|{{ m.role }}|>'
                           '{% generation %}{{ m.content }}{% endgeneration %}'
                           '{% endfor %}')
  data, lines = opened(tmp_path, [{'prompt': 'a', 'completion': 'b'}], template=template, tokenizer=Bytes(()))
  assert len(data.records('train')) == 1
  assert 'marks the end of answers with no token' in lines[0] and '<|user|>, <|assistant|> as plain text' in lines[0]


def test_text_cannot_spell_control_tokens(tmp_path):
  row = {'prompt': '<|end|><|system|>', 'completion': '</s><|end|>'}
  tokens, loss_mask = opened(tmp_path, [row])[0].records('train')[0]
  assert (tokens == END).sum() == 2 and (tokens > 255).sum() == 5 and tokens[loss_mask][-1] == END


def test_dialogues_without_answers_are_dropped_and_too_long_ones_left_out_with_a_warning(tmp_path):
  rows = [{'messages': [USER('a')]}, {'prompt': 'b', 'completion': 'c'}, {'prompt': 'd' * 90, 'completion': 'e'}]
  data, lines = opened(tmp_path, rows, allow_left_out=True)
  assert any('dropped: 1 no tokens' in line for line in lines) and len(data.records('train')) == 2
  batches = data.batches('train', supervised(), rows=2)
  assert batches.rows_per_epoch == 1 and lines[-1].startswith('warning: train: 1 of 2 records are left out')
  with pytest.raises(ValueError, match='none of 1 records fits a row of 64'):
    opened(tmp_path / 'b', rows[2:])[0].batches('train', supervised(), rows=2)


@pytest.mark.parametrize('long, outcome', [(9, 'told'), (10, 'warned'), (49, 'warned'), (50, 'refused')])
def test_the_share_of_records_that_are_too_long_is_reported_warned_of_or_refused(tmp_path, long, outcome):
  records = [{'prompt': f'{i:03}' + 'd' * (100 + i if i < long else 0), 'completion': 'e'} for i in range(100)]
  data, lines = opened(tmp_path, records)
  if outcome == 'refused':
    with pytest.raises(ValueError, match='train: 50 of 100 records .* give --allow_left_out') as error:
      data.batches('train', supervised(), rows=2)
    lines.append(str(error.value))
    data, lines_allowed = opened(tmp_path, records, allow_left_out=True)
    assert data.batches('train', supervised(), rows=2).left_out == 50 and 'warning' in lines_allowed[-1]
  else:
    assert data.batches('train', supervised(), rows=2).left_out == long
    assert lines[-1].startswith('warning: ') == (outcome == 'warned')
  if outcome != 'told':   # the advised lengths keep the share that the message says
    for share, length in zip((0.9, 0.99), re.findall(r'--length=(\d+)', lines[-1])):
      count = 100 - opened(tmp_path, records, length=int(length))[0].batches('train', supervised(), rows=2).left_out
      assert count >= 100 * share


@pytest.mark.parametrize('longest', [64, 110, 125, 160, 400])
@pytest.mark.parametrize('length', [16, 64])
def test_the_advised_length_is_at_most_the_models(tmp_path, length, longest):
  records = [{'prompt': f'{i:03}' + 'd' * i, 'completion': 'e'} for i in range(100)]
  fitting = lambda length: sum(opened(tmp_path, records)[0].records('train').positions <= length)
  with pytest.raises(ValueError) as error:   # also where no record fits at all
    data, lines = opened(tmp_path, records, length=length, longest=longest)
    data.batches('train', supervised(), rows=2)
    raise ValueError(*[line for line in lines if 'left out' in line])
  advised = [(int(length), int(percent)) for length, percent in
             re.findall(r'--length=(\d+)[^%]* keeps (\d+) %', str(error.value))]
  assert all(length < n <= longest and percent <= fitting(n) for n, percent in advised)
  assert bool(advised) != ('too short for this data' in str(error.value))
  if longest > length:   # otherwise no length helps
    assert advised[-1][1] == min(fitting(longest), 99)


records = st.lists(st.tuples(st.text('abc', max_size=20), st.text('abc', max_size=20)), min_size=1, max_size=25,
                   unique=True)


def open_rows(rows, tmp) -> dialogues.OpenDialogues:
  """Returns the opened data of these records."""
  return opened(tmp, [{'prompt': f'{i} {p}', 'completion': c} for i, (p, c) in enumerate(rows)], length=40)[0]


# Prompt and answer of n letters take n + 6 positions. There are full rows of one and of two records, and some too
# long by one.
EDGES = [('a' * 17, 'b' * n) for n in (17, 16, 18)] + [(a * 7, b * 7) for a in 'abc' for b in 'abc'] + [('', '')]


@given(rows=records, size=st.integers(1, 4), seed=st.sampled_from([None, 0, 7]))
@example(rows=EDGES, size=1, seed=None)
@example(rows=EDGES, size=4, seed=7)
@example(rows=EDGES[:1], size=2, seed=0)
@settings(max_examples=25, deadline=None)
def test_an_epoch_has_each_record_once_and_hosts_the_same_bytes(rows, size, seed, tmp_path_factory):
  data = open_rows(rows, tmp_path_factory.mktemp('made'))
  assume((data.records('train').positions <= 40).any())
  batches = data.batches('train', supervised(), 2 * size, seed, repeat=False)
  dialogues_read = []
  for step in range(batches.steps_per_epoch):
    batch = batches(step)
    again, halves = batches(step), [batches(step, range(size)), batches(step, range(size, 2 * size))]
    for a, b, *parts in zip(batch[:5], again[:5], halves[0][:5], halves[1][:5]):
      assert np.array_equal(a, b) and np.array_equal(a, np.concatenate(parts))
    dialogues_read += pieces(batch)
  fitting = [data.records('train')[i] for i in np.flatnonzero(data.records('train').positions <= 40)]
  assert sorted(dialogues_read) == sorted((x.tokens.tolist(), x.loss_mask[1:].tolist()) for x in fitting)


def pieces(batch: Batch) -> list[tuple[list[int], list[bool]]]:
  """Returns (tokens with the last target, mask of weights) of each segment of a batch."""
  parts = []
  for tokens, targets, weights, positions, segments in zip(*batch[:5]):
    for segment in range(1, segments.max() + 1):
      inside = segments == segment
      assert positions[inside].tolist() == list(range(inside.sum()))
      assert tokens[inside][1:].tolist() == targets[inside][:-1].tolist()
      parts.append(([*tokens[inside].tolist(), int(targets[inside][-1])], (weights[inside] == 1).tolist()))
    assert not weights[segments == 0].any()
  return parts


def test_compressed_lines_are_read_once(tmp_path):
  with gzip.open(tmp_path / 'a.jsonl.gz', 'wt') as f:
    f.writelines(json.dumps({'prompt': str(i), 'completion': 'x'}) + '\n' for i in range(30))
  data = dialogues.Dialogues(corpora.jsonl(f'{tmp_path}/*.gz', None, 0.3), B, 32)
  first = data.open(tmp_path / 'run', lambda line: None)
  (tmp_path / 'a.jsonl.gz').rename(tmp_path / 'gone')
  lines = []
  with pytest.raises(FileNotFoundError):
    data2 = dialogues.Dialogues(corpora.jsonl(f'{tmp_path}/*.gz', None, 0.3), B, 32)
    data2.open(tmp_path / 'run', lines.append)
  assert data.open(tmp_path / 'run', lines.append).fingerprint == first.fingerprint and not lines
  assert len(first.records('train')) + len(first.records('validation')) == 30
  plain = dialogues.Dialogues(data.source, B, 32, template=conversation.Plain())
  (tmp_path / 'run' / 'checkpoints' / '1').mkdir(parents=True)
  with pytest.raises(ValueError, match='other settings'):
    plain.open(tmp_path / 'run', lambda line: None)


def test_an_objective_for_another_kind_of_record_is_refused(tmp_path):
  data, _ = opened(tmp_path, [{'prompt': 'a', 'completion': 'b'}])
  with pytest.raises(ValueError, match='learns from pairs .* the data has dialogues'):
    data.batches('train', preference.reward(), rows=2)


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


def test_the_dialogues_of_taskmaster_are_read():
  rows = json.loads(gzip.decompress((shared_data.folder('taskmaster4') / 'data_07.json.gz').read_bytes()))
  for row in rows:
    (dialogue,) = messages.read(json.dumps(row), Dialogue, messages.Keys(messages='utterances')).answers
    assert [(message['role'], message['content']) for message in dialogue] == [
        (turn['speaker'], turn['text']) for turn in row['utterances']]
  assert len(rows) == 210


@pytest.mark.slow
def test_a_million_tokens_a_second_are_packed(tmp_path):
  data, _ = opened(tmp_path, [{'prompt': f'{i}' * 20, 'completion': 'abc ' * 50} for i in range(4000)], length=2048)
  batches = data.batches('train', supervised(), rows=16)
  batches(0)
  start = time.process_time()
  tokens = sum(int((batches(step).segments > 0).sum()) for step in range(20))
  assert tokens / (time.process_time() - start) > 1e6
