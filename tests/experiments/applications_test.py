"""The applications print their tables, and execute what was written where it belongs."""
import functools
import json
import re
import types

import classify
import code_generation
import customer_service
import customer_tools
import jax
import numpy as np
import pytest
import summarise
from helpers import scripted_engine

from lm import launch, sharding, signature
from lm.data import tokenizers
from lm.data.chat import ToolTurns, shop_dialogues
from lm.data.text import library_functions
from lm.evaluate import code_holes, texts
from lm.objectives import infill

TINY = ['--layers=1', '--width=16', '--heads=2', '--vocab=400']


def test_texts_have_sentences_and_files_have_kinds():
  assert summarise.sentences('One. Two\nlines? 3.5 is it!\n\nOther\n') == ['One.', 'Two lines?', '3.5 is it!', 'Other']
  assert summarise.sentences(' \n') == ['']
  assert [classify.kind(text) for text in ('/* a */\n#define B', 'x = 1\nimport y', 'He said:\n  import it')] == [
      'C', 'Python', 'prose']


def test_a_model_that_fills_in_reads_what_is_next_to_the_hole(monkeypatch):
  tokens, prompts = tokenizers.Bytes((*tokenizers.CONTROL, *(set(infill.NAMES) - set(tokenizers.CONTROL)))), []
  end = tokens.encode('!')
  loaded = types.SimpleNamespace(model=types.SimpleNamespace(max_length=24), params=None, tokenizer=tokens)
  monkeypatch.setattr(code_generation.generate, 'tokens', lambda *args, **_: prompts.extend(args[3]) or [end])
  hole = code_holes.Hole('', 'far before', '', 'after far', None, (), str)
  assert code_generation.fill(loaded, [hole], None, 8, 0) == ['!']
  whole = np.append(prompts[0], end)
  assert tokens.decode(infill.restore(whole, [tokens.control_id(name) for name in infill.NAMES])) == 'before!after '


def test_what_is_written_is_executed_where_it_belongs(monkeypatch, tmp_path, capsys):
  try:
    texts.Sandbox().check()
  except OSError as error:
    pytest.skip(str(error))
  monkeypatch.setattr(library_functions, 'CALLS', {'posixpath.isabs': ('"/a"', '"a"')})
  tokens = types.SimpleNamespace(control_names=infill.NAMES)
  objective = types.SimpleNamespace(control=infill.NAMES)
  monkeypatch.setattr(code_generation.load, 'open_trained', lambda *_: types.SimpleNamespace(
      tokenizer=tokens, run=types.SimpleNamespace(objective=objective), model=types.SimpleNamespace(max_length=99)))
  monkeypatch.setattr(code_generation, 'go_on', lambda _, holes, *settings: [
      holes[0].answer + 'raise ValueError', '    return True\n'])
  monkeypatch.setattr(code_generation, 'fill', lambda _, holes, *settings: ['return 0', f'{holes[0].answer}\n  !'])
  signature.call(code_generation.measure, samples=2, k=(1, 2), execute_code=True, out=tmp_path)
  out = capsys.readouterr().out
  values = {name: float(value) for name, value in re.findall(r'^(\w+[ \w]*/pass@\d) +([\d.]+)', out, re.MULTILINE)}
  assert values == {'body/pass@1': 0.5, 'body/pass@2': 1., 'line/pass@1': 0.5, 'line/pass@2': 1.,
                    'body of its author/pass@1': 1., 'line of its author/pass@1': 1.}
  objective.control = ()   # the tokenizer has the tokens, and the model was not trained to fill in
  signature.call(code_generation.measure, samples=2, k=(1, 2), execute_code=True, out=tmp_path)
  assert 'body/pass@1' in (out := capsys.readouterr().out) and 'line' not in out
  with pytest.raises(ValueError, match='--execute_code allows it'):
    signature.call(code_generation.measure)
  with pytest.raises(ValueError, match='limit=0 must be at least 1'):
    signature.call(code_generation.measure, execute_code=True, limit=0)
  with pytest.raises(ValueError, match='max_tokens=92 leaves no room for a program in the 99 tokens'):
    signature.call(code_generation.measure, execute_code=True, max_tokens=92)


def test_a_served_model_looks_orders_up(capsys):
  """The model here is a script, which finds what it needs in the prompt as the template of training writes it."""
  pytest.importorskip('uvicorn')

  def script(request, choice):
    text = scripted_engine.TOKENS.decode(request.ids)
    assert text.count('<tools>') == 1
    if text.endswith('</tool_response>'):
      answer = re.findall('<tool_response>(.*?)</tool_response>', text)[-1]
    else:
      items = re.findall(rf'\b({"|".join(shop_dialogues.ITEMS)})\b', text)
      answer = f'<tool_call>{json.dumps({"name": "find_order", "arguments": {"item": items[-1]}})}</tool_call>'
    return [*answer.encode(), scripted_engine.TOKENS.eos_id]

  engine = scripted_engine.ScriptedEngine(script, size=40)
  with scripted_engine.address_of(engine, template=ToolTurns(), context=4096) as address:
    signature.call(customer_tools.play, address=f'{address}/v1', model='tiny', dialogues=2, max_tokens=500)
  out = capsys.readouterr().out
  values = {name: float(value) for name, value in re.findall(r'^answers/(\w+) +([\d.]+)', out, re.MULTILINE)}
  # A whole record has all values of the right answer, and is not that answer.
  assert values['right_calls'] == 1 and values['exact_match'] == 0 and values['slot_accuracy'] > 0.5
  assert re.search(r'^assistant  find_order\(\{"item": "\w+"\}\)\ntool       The \w+ order\. ', out, re.MULTILINE)


@pytest.mark.parametrize('record', ['{"text": 5, "label": "a"}', '{"text": "x"}'])
def test_records_without_a_text_or_a_class_are_named(record, tmp_path, monkeypatch):
  monkeypatch.setattr(classify.load, 'run_or_model', lambda *_: (None, 'a'))
  monkeypatch.setattr(classify.pretrained, 'load', lambda _: None)
  (tmp_path / 'a.jsonl').write_text('{"text": "x", "label": "a"}\n' + record)
  with pytest.raises(ValueError, match=f'the record {re.escape(record)} needs a text'):
    signature.call(classify.classify, model='a', jsonl=f'{tmp_path}/a.jsonl', classes=('a= x', 'b= y'))


def test_tools_are_refused_where_they_are_not_generated():
  with pytest.raises(ValueError, match='--tools is for generated dialogues'):
    signature.call(customer_service.experiment, tools=True, jsonl='a.jsonl')
  run = signature.call(customer_service.experiment, tools=True)
  assert run.data.template == ToolTurns() and 'with tools' in run.data.source.name


def printed(module, argv, folder, capsys):
  """Returns what a report prints of a model that is not trained."""
  (knobs,), _ = launch.parse([module.experiment], [f'{module.__name__}.py', *argv])
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    run = signature.call(module.experiment, knobs)
    data = run.data.open(folder)
    params = jax.jit(run.model.init)(jax.random.key(0))
    module.report(run, folder, types.SimpleNamespace(data=data, params=params))
  return capsys.readouterr().out


@pytest.mark.slow
def test_customers_are_answered_and_handed_over(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(shop_dialogues, 'shop', functools.partial(shop_dialogues.shop, 100, 0.1))
  monkeypatch.setattr(customer_service, 'QUESTIONS', 4)
  out = printed(customer_service, [*TINY, '--length=480'], tmp_path, capsys)
  for line in ('validation/exact_match', 'validation/slot_accuracy', 'validation-new/exact_match',
               'by itself/precision', 'by threshold/precision', 'by threshold/recall', 'by threshold/errors_kept'):
    assert re.search(rf'^{line} +[\d.-]', out, re.MULTILINE), line
  assert 'are handed over' in out


@pytest.mark.slow
def test_summaries_are_compared_with_sentences_of_the_text(tmp_path, monkeypatch, capsys):
  pytest.importorskip('rouge_score')
  records = [json.dumps({'prompt': f'Lead {i} here. Nothing {i} else.', 'completion': f'Lead {i} here.'})
             for i in range(100)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(records))
  monkeypatch.setattr(summarise, 'QUESTIONS', 4)
  flags = f'--jsonl={tmp_path}/a.jsonl', '--validation=0.2', '--length=96'
  out = printed(summarise, [*TINY[:-1], '--vocab=330', *flags], tmp_path / 'run', capsys)
  assert re.search(r'^first sentence/rougeL +1\.0000', out, re.MULTILINE) and 'model/rouge2 ' in out
  assert float(re.search(r'^random sentence/rougeL +([\d.]+)', out, re.MULTILINE)[1]) < 1
