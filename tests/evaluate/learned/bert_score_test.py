"""BERTScore equals the package bert-score, whose numbers for a tiny random BERT are in fixtures/bert_score.json.

The package computed them with batch_size=1, so that its batches have no padding. One candidate is empty, one has more
tokens than the model reads, and one has three references.
"""
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers.encoders import load
from helpers.meshes import mesh_of

from lm.data import tokenizers
from lm.evaluate.learned import bert_score, text_rows
from lm.models import encoder, transformer

FIXTURES = pathlib.Path(__file__).parents[2] / 'fixtures'
CASE = json.loads((FIXTURES / 'bert_score.json').read_text())


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  """Returns a function from settings to the metric."""
  pytest.importorskip('tokenizers')
  folder = tmp_path_factory.mktemp('bert')
  shutil.copytree(FIXTURES / 'bert', folder, dirs_exist_ok=True)
  (folder / 'vocab.txt').write_text('\n'.join(CASE['words']) + '\n')
  (folder / 'baseline.tsv').write_text(CASE['baseline'])
  model, params = load(folder)
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  tokenizer = tokenizers.load(folder)

  def make(layer, use_idf=False, rescaled=False):
    return bert_score.BertScore(model, params, tokenizer, 'tiny', layer, use_idf,
                                folder / 'baseline.tsv' if rescaled else None)
  return make


@pytest.mark.parametrize('settings', CASE['expected'])
def test_scores_are_those_of_the_package(opened, settings):
  layer, idf, rescaled = settings.split(' ')
  measures = opened(int(layer), bool(idf), bool(rescaled))(CASE['candidates'], CASE['references'])
  assert [measure.name for measure in measures] == ['bert_score_precision', 'bert_score_recall', 'bert_score_f1']
  for measure, expected in zip(measures, CASE['expected'][settings]):
    np.testing.assert_allclose(measure.scores(), expected, rtol=0, atol=2e-6)
    assert measure.interval().value == pytest.approx(np.mean(expected), abs=2e-6)
    assert f'layer:{layer} idf:{"yes" if idf else "no"}' in measure.signature


def test_texts_that_are_cut_are_counted(opened):
  texts = {*CASE['candidates'], *(text for several in CASE['references'] for text in several)}
  assert f'2 of {len(texts)} different texts are longer' in opened(1).note(CASE['candidates'], CASE['references'])
  assert opened(1).note(['a'], [['b']]) is None


def test_a_score_is_the_same_in_any_company_and_order(opened, monkeypatch):
  metric, candidates, references = opened(1), CASE['candidates'], CASE['references']
  together = [measure.scores() for measure in metric(candidates, references)]
  monkeypatch.setattr(bert_score, 'CHUNK', 2)
  chunks = [measure.scores() for measure in metric(candidates[::-1], references[::-1])]
  for i, value in enumerate(zip(*together)):
    alone = [measure.scores()[0] for measure in metric(candidates[i:i + 1], references[i:i + 1])]
    np.testing.assert_array_equal(alone, value)
    np.testing.assert_array_equal([values[::-1][i] for values in chunks], value)


def test_an_encoder_with_fewer_layers_is_compiled_once(opened):
  metric = opened(1)
  metric(CASE['candidates'], CASE['references'])
  programs = text_rows.hidden._cache_size()
  metric(CASE['candidates'], CASE['references'])
  assert text_rows.hidden._cache_size() == programs


def test_a_text_equals_itself_and_a_mesh_changes_nothing(opened):
  texts = ['the cat sat on a mat', 'a big dog']
  for measure in opened(2)(texts, [[text] for text in texts]):
    np.testing.assert_allclose(measure.scores(), 1, atol=1e-6)
  expected = [measure.scores() for measure in opened(1)(CASE['candidates'], CASE['references'])]
  with jax.set_mesh(mesh_of('fsdp:4,tensor:2')):
    model, params = load(FIXTURES / 'bert')
    metric = dataclasses.replace(opened(1), model=model, params=jax.tree.map(lambda x: x.astype(np.float32), params))
    actual = [measure.scores() for measure in metric(CASE['candidates'], CASE['references'])]
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def test_what_cannot_be_compared_is_refused(opened, tmp_path):
  with pytest.raises(ValueError, match='layer=3 is not between 1 and 2'):
    opened(3)(['a'], [['a']])
  with pytest.raises(ValueError, match='baseline.tsv has no baseline of layer 2, only of 1'):
    (tmp_path / 'baseline.tsv').write_text('LAYER,P,R,F\n1,0,0,0\n')
    bert_score.read_baseline(tmp_path / 'baseline.tsv', 2)
  with pytest.raises(ValueError, match='there are none; give references'):
    opened(1)(['a'], None)
  with pytest.raises(ValueError, match='of class Transformer; take another model'):
    bert_score.BertScore(transformer.llama(32, 8, 1, 2), None, tokenizers.Bytes(), 'llama')


def test_the_first_layers_are_those_of_the_whole_encoder():
  model = encoder.bert(32, 16, 3, 2, 16)
  params = model.init(jax.random.key(0))
  tokens = np.arange(8, dtype=np.int32)
  _, batch = next(text_rows.batches([text_rows.Text(tokens, tokens * 0)], 16))
  shorter, fewer = bert_score.first_layers(model, params, 2)
  outputs = []
  for count in (1, 2, 3):
    part, its_params = bert_score.first_layers(model, params, count)
    outputs.append(np.asarray(part.apply(its_params, batch).hidden))
  assert len(shorter.layers) == 2 and jax.tree.leaves(fewer['blocks'])[0].shape[0] == 2
  for first, second in zip(outputs, outputs[1:]):
    assert np.abs(first - second)[0, :8].max() > 1e-3
