"""JSON records become dialogues: which tokens train, how a template writes them, and what is refused."""
import gzip
import json

import pytest
from helpers.dialogues import END, SAYS, TALK, USER, B, opened, shown

from lm.data.batch import Pair
from lm.data.chat import conversation, dialogues, messages, templates
from lm.data.text import corpora
from lm.data.tokenizers.folder import Bytes
from lm.objectives import preference


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


def test_what_two_transcripts_share_is_the_prompt(tmp_path):
  talk = '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
  pair = opened(tmp_path, [{'chosen': talk + ' d', 'rejected': talk + ' b'}], Pair)[0].records('train')[0]
  before = '<s><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>'
  assert shown(pair.chosen) == before + 'D<|END|>' and shown(pair.rejected) == before + 'B<|END|>'


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
