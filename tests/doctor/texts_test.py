"""Probes of texts, of data and of the machine name what is wrong with them."""
import dataclasses
import json
import types

import numpy as np
import pytest
from helpers.examined import InMemory, Letters, examined, run_of

from lm.data import dataset, tokenizers
from lm.data.batch import Batch
from lm.data.chat import conversation, dialogues
from lm.data.text.source import texts
from lm.doctor import dataset_figures, machine, probes
from lm.doctor import texts as text_probes
from lm.doctor.findings import DoesNotApply, Verdict

pytestmark = pytest.mark.usefixtures('compiled_once')
RUN = run_of('next_token')
TURNS = ('user', 'what is {}?'), ('assistant', '{}!'), ('user', 'and then'), ('assistant', 'more')
RECORDS = [json.dumps({'messages': [{'role': role, 'content': text.format(i)} for role, text in TURNS]})
           for i in range(20)]


def of_text(data, tokenizer):
  """Returns what the probes of texts read of a subject."""
  return types.SimpleNamespace(run=types.SimpleNamespace(data=data), data=types.SimpleNamespace(
      tokenizer=tokenizer, stores={}))


class NoSpaces(Letters):
  """A tokenizer that loses spaces, and does not know it."""
  lossless = True

  def encode_batch(self, batch):
    return super().encode_batch([text.replace(' ', '') for text in batch])


class Lossy(NoSpaces):
  lossless = False


@pytest.mark.parametrize('tokenizer, verdict', [(Letters(), Verdict.OK), (NoSpaces(), Verdict.FAULT),
                                                (Lossy(), Verdict.WARNING)])
def test_a_tokenizer_that_loses_spaces_is_named(tokenizer, verdict):
  data = dataset.Text(['a bad cab', 'big', 'a lake'] * 10, tokenizer, 16)
  finding = text_probes.tokenizer_round_trips(of_text(data, tokenizer))
  assert finding.verdict is verdict
  assert verdict is Verdict.OK or "'a bad ca" in finding.text and "into 'abadca" in finding.text


def masked(change):
  """Returns a template whose mask is changed."""
  class Template(conversation.Turns):
    def encode(self, tokens, messages, add_generation_prompt=False, *, first=0):
      ids, mask = super().encode(tokens, messages, add_generation_prompt, first=first)
      return ids, change(mask)
  return Template()


@pytest.mark.parametrize('change, words', [
    (lambda mask: mask, 'the answers of'), (lambda mask: np.ones_like(mask), 'words of others'),
    (lambda mask: mask & (np.arange(len(mask)) > 20), 'misses')])
def test_a_mask_that_is_not_the_answers_is_a_fault(change, words):
  tokenizer = tokenizers.Bytes()
  data = dialogues.Dialogues(texts(RECORDS), tokenizer, 64, template=masked(change))
  finding = text_probes.mask_covers_answers(of_text(data, tokenizer))
  assert words in finding.text
  assert finding.verdict is (Verdict.OK if words == 'the answers of' else Verdict.FAULT)


def test_figures_of_data():
  with examined(RUN) as subject:
    assert dataset_figures.padding_share(subject).verdict is Verdict.OK
    assert 'epochs in 6 steps' in dataset_figures.epochs(subject).text
    rows = subject.batches.rows_per_epoch
    longer = dataclasses.replace(subject, run=dataclasses.replace(RUN, steps=2 * rows))   # 8 rows a step: 16 epochs
    finding = dataset_figures.epochs(longer)
    assert finding.verdict is Verdict.WARNING and '16 epochs' in finding.text


def test_records_that_are_padded_or_left_out_are_counted():
  data = InMemory(texts=('a',) * 20 + ('abcdefghij' * 9,) * 20, kind=run_of('supervised').objective.needs)
  with examined(run_of('supervised', data=data)) as subject:
    finding = dataset_figures.cut_examples(subject)
    assert finding.verdict is Verdict.WARNING and '20 of 40 records (50.0%)' in finding.text
    with pytest.raises(DoesNotApply):
      dataset_figures.duplicates(subject)


def test_duplicates_are_counted():
  tokens = np.int32([1, 2, 3, 1, 2, 3, 4])
  stored = types.SimpleNamespace(tokens=tokens, offsets=np.array([0, 2, 3, 5, 6, 7]))   # 12, 3, 12, 3, 4
  finding = dataset_figures.duplicates(types.SimpleNamespace(data=types.SimpleNamespace(stores={'train': stored})))
  assert finding.verdict is Verdict.WARNING and '40.00% of 5' in finding.text


def test_rows_that_are_mostly_padding_are_named():
  def of(filled):
    segments = (np.arange(8)[None] < filled).astype(np.int32)
    batches = lambda step, rows: Batch(segments, weights=np.repeat(segments, len(rows), 0), segments=segments)
    batches.steps_per_epoch = 3
    return dataset_figures.padding_share(types.SimpleNamespace(batches=batches, run=types.SimpleNamespace(batch=2)))
  assert of(8).verdict is Verdict.OK
  finding = of(3)
  assert finding.verdict is Verdict.WARNING and '62.5% of the positions' in finding.text and '3 targets' in finding.text


def test_a_host_without_memory_and_libraries_that_do_not_fit_are_named(monkeypatch):
  monkeypatch.setattr(machine.sharding, 'memory_of_host', lambda: (10 ** 9, 64 * 10 ** 9))
  assert machine.host(None).verdict is Verdict.WARNING and '1.0 of 64.0 GB' in machine.host(None).text
  monkeypatch.setattr(machine.importlib.metadata, 'version', lambda name: '0.9.1' if name == 'jaxlib' else '0.10.2')
  finding = machine.versions(None)
  assert finding.verdict is Verdict.WARNING and 'jaxlib 0.9.1' in finding.text


def test_settings_that_hurt_are_named():
  assert machine.judge_settings({}, 'cpu').verdict is Verdict.OK
  finding = machine.judge_settings({'JAX_DISABLE_JIT': 'True', 'XLA_FLAGS': '--xla_dump_to=/x'}, 'cpu')
  assert finding.verdict is Verdict.WARNING and 'nothing is compiled' in finding.text and 'to disk' in finding.text
  waiting = {'LIBTPU_INIT_ARGS': '--xla_a=1 --xla_tpu_enable_async_collective_fusion=false'}
  assert 'devices wait for each weight' in machine.judge_settings(waiting, 'tpu').text
  precise = {'JAX_DEFAULT_MATMUL_PRECISION': 'highest'}
  assert machine.judge_settings(precise, 'cpu').verdict is Verdict.OK
  assert machine.judge_settings(precise, 'gpu').verdict is Verdict.WARNING


def test_the_machine_is_described():
  with examined(RUN) as subject:
    findings = probes.examine(subject, {name: probes.ALL[name] for name in ('devices', 'host', 'versions')})
  assert 'cpu' in findings['devices'].text and 'further devices' in findings['devices'].text
  assert 'cores' in findings['host'].text and 'jaxlib' in findings['versions'].text
