"""Prompts from a file are answered as requests by themselves; an interrupted file continues; bad lines are named."""
import json
import re

import pytest
from helpers.decoders import Bytes, make
from helpers.encoders import random_params

from lm import generate, seeds
from lm.generate import (
    PLAIN,
    Grammars,
    Request,
    Sampling,
    batch_answers,
    of_regex,
    prompts_file,
    written_requests,
)
from lm.models import encoder_decoder, stack
from lm.models.rotary import LongRope, Rotary

DEFAULTS = prompts_file.settings_of(PLAIN, 70, 3, 1, ())
LINES = ['{"prompt": "def f(x):"}', '', '{"id": "b", "prompt": "", "temperature": 0, "max_tokens": 9}',
         '{"id": 7, "prompt": "a longer one", "n": 2, "seed": 5, "top_k": 9}',
         '{"prompt": "ends", "stop": ["\\u0001", "e", "a", "i", "o"], "max_tokens": 80}']


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('\n'.join(LINES) + '\n')
  return path


def answer(file, out, rows=3, lines=None, stops_after=None, pattern=None):
  """Answers a file of prompts, and returns the lines of the answers by id, and the prompts that were computed."""
  if lines is not None:
    file.write_text('\n'.join(lines) + '\n')
  prompts, counts = prompts_file.read_prompts(file, DEFAULTS, is_chat=False), []
  answers = prompts_file.AnswersFile(out, prompts, {'model': 'random'})

  def report(count):
    counts.append(count)
    if len(counts) == stops_after:
      raise KeyboardInterrupt

  model, params = make(kv_heads=2, tied=False)
  grammar = pattern and Grammars(Bytes(), model.vocab).compile(of_regex(pattern))
  batch_answers.answer_prompts(model, params, Bytes(), prompts, answers, None, rows, report, grammar)
  return {line['id']: line for line in map(json.loads, out.read_text().splitlines())}, counts


def test_a_file_is_answered_and_an_interruption_loses_no_answer(file, tmp_path):
  whole, counts = answer(file, tmp_path / 'whole.jsonl')
  assert counts == [1, 2, 3, 4] and set(whole) == {'1', 'b', '7', '5'}
  model, params = make(kv_heads=2, tied=False)
  scheduler = batch_answers.make_scheduler(model, params, Bytes(), 128, 3)
  alone = written_requests.TextRequest(Request([256, *b'a longer one'], Sampling(top_k=9), 70, 5, 2))
  texts = ['', '']
  for _, piece in written_requests.pieces(scheduler, Bytes(), [alone]):
    texts[piece.choice] += piece.text
  assert [choice['text'] for choice in whole['7']['answers']] == texts and texts[0] != texts[1]
  stop = next(character for character in texts[0] if character not in texts[1])
  running = {piece.choice: scheduler.running for _, piece in written_requests.pieces(
      scheduler, Bytes(), [alone._replace(stop=(stop,))]) if piece.finish is None}
  assert running[1] == 1   # the row of the choice that the string ends is free while the other is written
  assert whole['1']['settings'] == {**DEFAULTS, 'seed': seeds.derive(3, '1'), 'model': 'random'}
  stopped, = whole['5']['answers']
  assert stopped['finish_reason'] == 'stop' and stopped['tokens'] < 80
  assert not any(stop in stopped['text'] for stop in '\x01eaio')

  out = tmp_path / 'parts.jsonl'
  with pytest.raises(KeyboardInterrupt):
    answer(file, out, stops_after=2)
  before = out.read_bytes()
  out.write_bytes(before + b'{"id": "7", "prom')   # a line that was cut off
  continued, counts = answer(file, out)
  assert out.read_bytes().startswith(before) and continued == whole and counts == [3, 4]
  assert answer(file, out)[1] == []   # nothing is computed again
  longer = [*LINES, '{"prompt": "one more"}']
  assert answer(file, out, lines=longer)[1] == [5]


@pytest.mark.slow
def test_the_prompts_of_an_encoder_decoder_are_sources(file, tmp_path):
  model = encoder_decoder.t5(264, 16, 1, 2, 8, 32)
  params = random_params(model)
  defaults = {**DEFAULTS, 'temperature': 0}
  file.write_text('{"prompt": "a source"}\n{"prompt": "another"}\n')
  prompts = prompts_file.read_prompts(file, defaults, is_chat=False)
  answers = prompts_file.AnswersFile(tmp_path / 'out.jsonl', prompts, {'model': 'random'})
  batch_answers.answer_prompts(model, params, Bytes(), prompts, answers, None, 2)
  lines = map(json.loads, (tmp_path / 'out.jsonl').read_text().splitlines())
  texts = {line['id']: line['answers'][0]['text'] for line in lines}
  expected = generate.generate(model, params, Bytes(), ['a source', 'another'], Sampling(0), max_tokens=70)
  assert [texts['1'], texts['2']] == expected


@pytest.mark.slow
def test_answers_match_a_grammar(file, tmp_path):
  pytest.importorskip('llguidance')
  whole, _ = answer(file, tmp_path / 'out.jsonl', lines=LINES[:1] + LINES[3:4], pattern='[xyz]{9}')
  texts = [choice['text'] for line in whole.values() for choice in line['answers']]
  assert len(texts) == 3 and all(re.fullmatch('[xyz]{9}', text) for text in texts)


@pytest.mark.slow
def test_an_answer_without_a_limit_has_the_room_of_the_original_context(file, tmp_path):
  model, params = make(kv_heads=2, tied=False)
  block = model.layers[0]
  rotary = Rotary(100., scaling=LongRope((1.,) * 4, (3.,) * 4, 24, 1.1))
  model = model.clone(blocks=stack.stacks([block.clone(attention=block.attention.clone(rotary=rotary))] * 2))
  prompts = prompts_file.read_prompts(file, prompts_file.settings_of(PLAIN, None, 3, 1, ()), is_chat=False)
  prompts = prompts._replace(lines=prompts.lines[:1])   # 10 tokens with bos
  batch_answers.answer_prompts(model, params, Bytes(), prompts, prompts_file.AnswersFile(
      tmp_path / 'out.jsonl', prompts, {}), None, 1)
  choice, = json.loads((tmp_path / 'out.jsonl').read_text())['answers']
  assert choice['tokens'] == 14 and choice['finish_reason'] == 'length'


@pytest.mark.parametrize('line, message', [
    ('{"prompt": "def g(x):"}', "id='1' in line . of .* prompt='def f.x.:', and now it has prompt='def g.x.:'"),
    ('{"prompt": "def f(x):", "top_p": 0.5}', 'top_p=1.0, and now it has top_p=0.5; give another --out')])
def test_answers_with_other_settings_are_refused(file, tmp_path, line, message):
  out = tmp_path / 'out.jsonl'
  settings = {**DEFAULTS, 'seed': seeds.derive(3, '1'), 'model': 'random'}
  out.write_text(json.dumps({'id': '1', 'prompt': 'def f(x):', 'settings': settings, 'answers': []}) + '\n')
  before = out.read_bytes()
  with pytest.raises(ValueError, match=message):
    answer(file, out, lines=[line])
  with pytest.raises(ValueError, match="model='random', and now it has model='other'"):
    prompts_file.AnswersFile(out, prompts_file.read_prompts(file, DEFAULTS, False)._replace(
        lines=[prompts_file.PromptLine(1, '1', 'def f(x):', {**DEFAULTS, 'seed': seeds.derive(3, '1')})]),
        {'model': 'other'})
  assert out.read_bytes() == before
  for text in 'no answer\n', '{"notes": "of another program"}', '{"id": [], "prompt": "a", "settings": {}}\n':
    out.write_text(text)
    with pytest.raises(ValueError, match='line 1 of .* is no answer'):
      answer(file, out)
    assert out.read_text() == text


@pytest.mark.parametrize('line, message', [
    ('{"prompt": ', 'it is no JSON'), ('[1]', 'it is no object'), ('{}', 'it needs one of "prompt" and "messages"'),
    ('{"prompt": 5}', 'prompt=5 must be a text'), ('{"prompt": "a", "temprature": 1}', "'temprature' is no setting"),
    ('{"prompt": "a", "model": "x"}', "'model' is no setting"), ('{"prompt": "a", "top_p": 2}', 'top_p=2 must be'),
    ('{"prompt": "a", "top_k": "5"}', "top_k='5' must be a whole number"), ('{"prompt": "a", "n": true}', 'n=True'),
    ('{"prompt": "a", "stop": ["\\ud800"]}', 'is a lone surrogate'), ('[' * 100_000, 'nested too deep'),
    ('{"prompt": "a", "top_k": 4294967296}', 'top_k=4294967296 must be'),
    ('{"prompt": "a", "max_tokens": 0}', 'max_tokens=0 must be'), ('{"prompt": "a", "seed": -1}', 'seed=-1'),
    ('{"prompt": "a", "n": 2, "temperature": 0}', 'all n=2 answers would be equal'),
    ('{"prompt": "a", "stop": [""]}', 'none of them empty'), ('{"prompt": "a", "stop": "x"}', 'must be a list'),
    ('{"prompt": "a", "stop": ["x"], "min_tokens": 2}', 'min_tokens=2 holds for tokens'),
    ('{"id": "1", "prompt": "a"}', "id='1' is also that of line 1"), ('{"id": 1.5, "prompt": "a"}', 'id=1.5'),
    ('{"messages": [{"role": "user", "content": "a"}]}', 'give --chat'),
    ('{"prompt": "a", "max_tokens": 128}', '128 are more than the 128 of the context'),
    ('{"prompt": "a", "min_tokens": 90}', 'min_tokens=90 is more than max_tokens=70')])
def test_bad_lines_are_named_before_anything_is_computed(file, tmp_path, line, message):
  out = tmp_path / 'out.jsonl'
  with pytest.raises(ValueError, match=f'line 3: .*{message}'):
    answer(file, out, lines=[LINES[0], '', line])
  assert not out.exists() or not out.read_bytes()
