"""The applications print their tables, and cut texts as they say."""
import functools
import json
import re
import sys

import classify
import customer_service
import infill
import library_code
import numpy as np
import pytest
import summarise
import temperatures

from lm import launch, signature
from lm.data import tokenizers
from lm.data.chat import shop_dialogues
from lm.data.text import library_functions
from lm.objectives.infill import NAMES, restore

TINY = ['--layers=1', '--width=16', '--heads=2', '--batch=8', '--steps=2', '--vocab=400']


def test_texts_are_cut_where_a_line_or_a_body_ends():
  assert library_code.first_line('a = 1\n  b\n') == 'a = 1' and library_code.first_line('') == ''
  assert library_code.indented('  a\n\n  b\ndef c():\n  d') == '  a\n\n  b\n' and library_code.indented('x\n  y') == ''
  assert summarise.sentences('One. Two\nlines? 3.5 is it!\n\nOther\n') == ['One.', 'Two lines?', '3.5 is it!', 'Other']
  assert [classify.kind(text) for text in ('/* a */\n#define B', 'x = 1\nimport y', 'He said:\n  import it')] == [
      'C', 'Python', 'prose']


def test_a_prompt_has_what_is_next_to_the_hole():
  tokens = tokenizers.Bytes((*tokenizers.CONTROL, *(set(NAMES) - set(tokenizers.CONTROL))))
  case = library_functions.Case('', 'far before', '', 'after far', '', '')
  ids = library_code.prompt(tokens, case, 6, True)
  assert tokens.decode(restore(np.append(ids, tokens.encode('!')), [tokens.control_id(name) for name in NAMES])) == (
      'before!after ')
  assert tokens.decode(library_code.prompt(tokens, case, 6, False)) == 'before'


def trained(module, argv, monkeypatch):
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)
  monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', '--nodoctor', *argv])
  launch.run(module.experiment, module.report)


@pytest.mark.slow
def test_customers_are_answered_and_handed_over(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(shop_dialogues, 'shop', functools.partial(shop_dialogues.shop, 300, 0.1))
  monkeypatch.setattr(customer_service, 'QUESTIONS', 4)
  trained(customer_service, [*TINY, '--length=512', f'--workdir={tmp_path}/run'], monkeypatch)
  out = capsys.readouterr().out
  for line in ('validation/exact_match', 'validation/slot_accuracy', 'validation-new/exact_match',
               'by itself/precision', 'by threshold/precision', 'by threshold/recall', 'by threshold/errors_kept'):
    assert re.search(rf'^{line} +[\d.-]', out, re.MULTILINE), line
  assert 'are handed over' in out


@pytest.mark.slow
def test_summaries_are_compared_with_sentences_of_the_text(tmp_path, monkeypatch, capsys):
  pytest.importorskip('rouge_score')
  records = [json.dumps({'prompt': f'Lead {i} here. Nothing {i} else.', 'completion': f'Lead {i} here.'})
             for i in range(200)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(records))
  monkeypatch.setattr(summarise, 'QUESTIONS', 4)
  flags = f'--jsonl={tmp_path}/a.jsonl', '--validation=0.2', '--length=128', f'--workdir={tmp_path}/run'
  trained(summarise, [*TINY[:-1], '--vocab=330', *flags], monkeypatch)
  out = capsys.readouterr().out
  assert re.search(r'^first sentence/rougeL +1\.0000', out, re.MULTILINE) and 'model/rouge2 ' in out
  assert float(re.search(r'^random sentence/rougeL +([\d.]+)', out, re.MULTILINE)[1]) < 1


@pytest.mark.slow
@pytest.mark.long
def test_a_model_is_measured_by_its_texts_its_code_and_its_classes(tmp_path, monkeypatch, capsys):
  trained(infill, [*TINY, '--length=64', f'--workdir={tmp_path}/run'], monkeypatch)
  signature.call(temperatures.measure, workdir=tmp_path / 'run', temperatures=(0.5, 1.), limit=4, prompt_tokens=8,
                 max_tokens=8)
  signature.call(classify.classify, workdir=tmp_path / 'run', limit=8)
  monkeypatch.setattr(library_functions, 'CALLS', {'posixpath.isabs': ('"/a"',)})
  signature.call(library_code.measure, workdir=tmp_path / 'run', samples=2, k=(1, 2), max_tokens=8, execute_code=True)
  out = capsys.readouterr().out
  for line in ('0.5/bits_per_byte', 'documents/self_bleu', 'accuracy/likeliest', 'body/pass@2', 'line/pass@1'):
    assert re.search(rf'^{line} +[\d.]', out, re.MULTILINE), line
  with pytest.raises(ValueError, match='--execute_code allows it'):
    signature.call(library_code.measure, workdir=tmp_path / 'run')
