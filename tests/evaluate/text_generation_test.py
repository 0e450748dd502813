"""Texts that a model writes after prompts are scored, stored, and not written again after a stop."""
import json
import types

import jax
import numpy as np
import pytest

from lm import generate
from lm.data.batch import Batch
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import evaluations, suites, text_generation, texts
from lm.evaluate.text_generation import Generation
from lm.models import encoder, transformer

TEXTS = [f'document {i} has some wörds, ' * (1 + i % 3) for i in range(40)]
SMALL = {'prompt_tokens': 12, 'max_tokens': 6, 'metrics': ('distinct', 'exact_match')}


@pytest.fixture(scope='module')
def subject():
  tokenizer = Bytes()
  model = transformer.llama(tokenizer.vocab_size, 16, 1, 2, max_length=48)
  return evaluations.Subject(model, jax.jit(model.init)(jax.random.key(0)), tokenizer, lambda: TEXTS)


def lines(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


def test_prompts_are_beginnings_of_documents_and_references_what_follows(subject):
  items = Generation(**SMALL, limit=3).items(subject)
  assert [(item.prompt, item.references) for item in items] == [
      (f'document {i} h', ['as som']) for i in range(3)]
  cut = Generation(prompt_tokens=22, max_tokens=2, limit=2).items(subject)   # within a letter of two bytes
  assert cut[0].prompt == 'document 0 has some w' and cut[0].references == ['ör']
  with pytest.raises(ValueError, match='none of the 40 documents has more than prompt_tokens=30; give less'):
    Generation(prompt_tokens=30, max_tokens=2).items(subject._replace(held_out=lambda: ['short'] * 40))
  with pytest.raises(ValueError, match='prompt_tokens=40 and max_tokens=8, with bos, are more than the 48'):
    Generation(prompt_tokens=40, max_tokens=8).items(subject)


def test_prompts_and_references_are_fields_of_lines(tmp_path, subject):
  file = lines(tmp_path / 'a.jsonl', [{'id': 'x', 'q': 'say a', 'a': 'a'}, {'q': 'say b', 'a': ['b', 'B']}])
  evaluation = Generation(jsonl=file, prompt_key='q', references_key='a', max_tokens=2, metrics=('exact_match',))
  assert evaluation.items(subject) == [('x', 'say a', ['a']), ('1', 'say b', ['b', 'B'])]
  with pytest.raises(ValueError, match=r'record 1 has no answer, which exact_match compare with'):
    Generation(jsonl=file, prompt_key='q', references_key='answer', metrics=('exact_match',)).items(subject)
  free = Generation(jsonl=file, prompt_key='q', references_key='answer', max_tokens=2, metrics=('distinct',))
  free.digest(subject)
  assert len(free(subject).outputs) == 2
  with pytest.raises(ValueError, match='record 1 has p=null'):
    Generation(jsonl=file, prompt_key='p').items(subject)


def test_bits_are_those_of_the_text_alone_after_its_prompt(subject):
  prompts, written = ['ab', 'abcd'], ['wör', 'x']
  measure = text_generation.bits_per_byte(subject, prompts, written)
  for prompt, text, (bits, size) in zip(prompts, written, measure.rows):
    before = [subject.tokenizer.bos_id, *subject.tokenizer.encode(prompt)]
    ids = np.int32([*before, *subject.tokenizer.encode(text)])[None]
    outputs = subject.model.apply(subject.params, Batch(ids[:, :-1], ids[:, 1:]))
    log_p = np.asarray(jax.nn.log_softmax(outputs.head(outputs.hidden))[0])
    expected = -sum(log_p[i, token] for i, token in enumerate(ids[0, 1:]) if i >= len(before) - 1) / np.log(2)
    assert size == len(text.encode()) and bits == pytest.approx(expected, rel=1e-5)
  assert measure.interval().value == pytest.approx(measure.rows[:, 0].sum() / 5)


def test_texts_are_those_of_the_generator_and_are_scored(subject):
  result = Generation(**SMALL, limit=20, temperature=0.7, top_k=9, seed=3)(subject)
  prompts = [text[:12] for text in TEXTS[:20]]
  expected = generate.generate(subject.model, subject.params, subject.tokenizer, prompts,
                               generate.Sampling(0.7, 9), max_tokens=6, seed=3)
  assert [output['text'] for output in result.outputs] == expected
  assert [output['prompt'] for output in result.outputs] == prompts and len(result.documents) == 20
  measures = {measure.name: measure for measure in result.measures}
  distinct = texts.Distinct()(expected)[0]
  np.testing.assert_array_equal(measures['distinct_1'].rows, distinct.rows)
  assert measures['exact_match'].interval().value == 0 and 'temperature=0.7' in result.notes[0]


def test_a_generation_that_is_stopped_goes_on_and_writes_no_text_again(tmp_path, subject, monkeypatch):
  suite = suites.Suite(generation={'w': Generation(**SMALL)})
  whole = suites.run(suite, subject, 'model', tmp_path / 'whole')
  plain, calls = generate.generate, []

  def stopping(model, params, tokenizer, prompts, *args, **kwargs):
    calls.append(len(prompts))
    if len(calls) == 3:
      raise KeyboardInterrupt
    return plain(model, params, tokenizer, prompts, *args, **kwargs)
  monkeypatch.setattr(text_generation.generate, 'generate', stopping)
  with pytest.raises(KeyboardInterrupt):
    suites.run(suite, subject, 'model', tmp_path / 'stopped')
  assert suites.run(suite, subject, 'model', tmp_path / 'stopped') == whole
  assert calls == [16, 16, 8, 8]   # of 40 prompts
  suites.run(suite, subject, 'model', tmp_path / 'stopped')
  assert len(calls) == 4
  outputs = [json.loads(line) for line in (tmp_path / 'stopped/w.jsonl').read_text().splitlines()]
  assert (tmp_path / 'whole/w.jsonl').read_text() == (tmp_path / 'stopped/w.jsonl').read_text() and len(outputs) == 40
  assert outputs[1].keys() == {'id', 'prompt', 'text', 'references'}
  assert outputs[1]['prompt'] == TEXTS[1][:12] and outputs[1]['references'] == ['as som']


def test_it_runs_during_training(tmp_path, subject):
  file = tmp_path / 'suite.json'
  file.write_text(json.dumps({'generation': {'w': {**SMALL, 'limit': 5}}}))

  class Data:
    tokenizer = subject.tokenizer
    documents = staticmethod(lambda split: TEXTS)

  class Run:
    model, data = subject.model, types.SimpleNamespace(template=None)

    class objective:   # noqa: N801
      prompt = staticmethod(lambda batch: batch)
  metrics = suites.Evaluator(file)(Run, Data, None)(subject.params, 3)
  measure = Generation(**SMALL, limit=5)(subject).measures[0]
  assert metrics['w/distinct_1'] == measure.interval().value and 'w/exact_match/low' in metrics


@pytest.mark.parametrize('settings,message', [
    ({'metrics': ['blue']}, "the nearest is 'bleu'"), ({'prompt_key': 'q'}, 'is a field of lines of jsonl'),
    ({'references_key': 'a'}, 'goes with prompt_key'), ({'max_tokens': 0}, 'at least 1'),
    ({'stop': ['']}, 'stop string'),
    ({'language': 'zh'}, 'language=zh is for bleu'), ({'temperature': -1}, 'temperature'), ({'limit': 1}, 'below 2')])
def test_settings_that_do_not_fit_are_refused_with_their_place(tmp_path, settings, message):
  file = tmp_path / 'suite.json'
  file.write_text(json.dumps({'generation': {'w': settings}}))
  with pytest.raises(ValueError, match=f'generation/w: .*{message}'):
    suites.read(file)


def test_a_model_that_writes_no_text_is_refused(subject):
  for other in subject._replace(mark=None), subject._replace(model=encoder.bert(264, 16, 1, 2, 48)):
    with pytest.raises(ValueError, match='writes no text from left to right'):
      Generation().digest(other)
