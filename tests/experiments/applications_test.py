"""The applications print their tables."""
import functools
import json
import re
import types

import classify
import customer_service
import jax
import pytest
import summarise

from lm import launch, sharding, signature
from lm.data.chat import shop_dialogues

TINY = ['--layers=1', '--width=16', '--heads=2', '--vocab=400']


def test_texts_have_sentences_and_files_have_kinds():
  assert summarise.sentences('One. Two\nlines? 3.5 is it!\n\nOther\n') == ['One.', 'Two lines?', '3.5 is it!', 'Other']
  assert [classify.kind(text) for text in ('/* a */\n#define B', 'x = 1\nimport y', 'He said:\n  import it')] == [
      'C', 'Python', 'prose']


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
