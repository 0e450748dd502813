"""BLEURT: pairs as the original makes them, scores as transformers computes them, checkpoints of both kinds."""
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers.encoders import random_params
from helpers.meshes import mesh_of

from lm.data import tokenizers
from lm.evaluate import score
from lm.evaluate.learned import bleurt, text_rows
from lm.hf import bleurt_checkpoints as checkpoints
from lm.hf import weights
from lm.models import encoder

TENSORFLOW = pathlib.Path(__file__).parents[2] / 'fixtures' / 'bleurt_tensorflow'
EXPECTED = json.loads((TENSORFLOW / 'expected.json').read_text())   # of transformers, with the same weights
MODEL = encoder.scorer(encoder.bert(320, 16, 2, 2, 48))


def metric(model=MODEL, **options):
  return bleurt.Bleurt(model, random_params(model), tokenizers.Bytes(), 'tiny', **options)


def test_a_checkpoint_of_tensorflow_gives_the_scores_of_transformers():
  """TensorFlow itself wrote the variables of this fixture, with `saved_model.simple_save`."""
  pytest.importorskip('tokenizers')
  opened = checkpoints.load(str(TENSORFLOW))
  scores = opened(EXPECTED['candidates'], [[text] for text in EXPECTED['references']])[0].scores()
  np.testing.assert_allclose(scores, EXPECTED['scores'], rtol=0, atol=1e-6)
  assert np.ptp(EXPECTED['scores']) > 1e-3 and opened.length == 24


def test_a_hugging_face_folder_gives_the_scores_of_the_checkpoint(tmp_path):
  pytest.importorskip('tokenizers')
  opened = checkpoints.load(str(TENSORFLOW))
  weights.write(tmp_path / 'port', opened.model, opened.params)
  shutil.copyfile(TENSORFLOW / 'vocab.txt', tmp_path / 'port' / 'vocab.txt')
  (tmp_path / 'port' / 'tokenizer_config.json').write_text('{"do_lower_case": true, "model_max_length": 20}')
  again = checkpoints.load(str(tmp_path / 'port'))
  assert again.length == 20
  scores = again(EXPECTED['candidates'][2:], [[text] for text in EXPECTED['references'][2:]])[0].scores()
  np.testing.assert_array_equal(scores, bleurt.scores(opened.model, opened.params, opened.tokenizer,
                                                      EXPECTED['references'][2:], EXPECTED['candidates'][2:], 20))


def test_texts_of_a_sentencepiece_model_lie_between_cls_and_sep(tmp_path):
  trainer = pytest.importorskip('sentencepiece').SentencePieceTrainer
  folder = shutil.copytree(TENSORFLOW, tmp_path / 'bleurt', ignore=shutil.ignore_patterns('vocab.txt'))
  trainer.train(sentence_iterator=iter(['some words of a text', 'and other words']), vocab_size=32, minloglevel=2,
                model_prefix=str(folder / 'sent_piece'), control_symbols=['[CLS]', '[SEP]'], hard_vocab_limit=False)
  tokenizer = checkpoints.load(str(folder)).tokenizer
  assert {'<s>', '[CLS]'} <= {*tokenizer.control_names}
  assert (tokenizer.bos_id, tokenizer.eos_id) == tuple(map(tokenizer.control_id, ('[CLS]', '[SEP]')))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
  pytest.importorskip('tokenizers')
  folder = shutil.copytree(TENSORFLOW, tmp_path / 'bleurt')
  with (folder / 'vocab.txt').open('a') as file:
    file.write('another\n')
  with pytest.raises(ValueError, match='the tokenizer has 33 tokens, the weights only 32'):
    checkpoints.load(str(folder))


def longest_first(reference, candidate, room):
  """Removes one token after another, as bleurt/encoding.py does."""
  reference, candidate = list(reference), list(candidate)
  while len(reference) + len(candidate) > room:
    (reference if len(reference) > len(candidate) else candidate).pop()
  return reference, candidate


def test_the_longer_text_is_cut_first():
  rng = np.random.default_rng(0)
  for _ in range(300):
    a, b, room = np.arange(rng.integers(12)), np.arange(100, 100 + rng.integers(12)), rng.integers(1, 20)
    assert [part.tolist() for part in bleurt.truncated(a, b, room)] == list(longest_first(a, b, room))


def test_a_pair_has_both_texts_between_separators():
  text = bleurt.pair(np.array([5, 6, 7]), np.array([8, 9]), 2, 3, 512)
  assert text.tokens.tolist() == [2, 5, 6, 7, 3, 8, 9, 3] and text.types.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
  assert len(bleurt.pair(np.arange(40), np.arange(40), 2, 3, 24).tokens) == 24


def test_the_best_reference_counts_and_company_changes_no_bit():
  candidates, references = ['a cat', 'b' * 60, ''], [['a cat', 'the dog', 'x'], ['y'], ['z', '']]
  scores = metric()(candidates, references)[0].scores()
  for i, several in enumerate(references):
    single = [metric()([candidates[i]], [[reference]])[0].scores()[0] for reference in several]
    assert scores[i] == max(single)
  assert len({*scores}) == 3


def test_pairs_that_are_cut_are_counted():
  candidates, references = ['a' * 40, 'b', 'c' * 30], [['x' * 5, 'y' * 6], ['z'], ['w' * 15]]   # 48 - 3 tokens are read
  assert metric().note(candidates, references).endswith(
      'and 1 of 4 pairs are longer: they lose the end of the longer text')
  assert metric(length=50).note(candidates, references) is None
  short, = metric()(['a' * 40], [['y' * 6]])
  assert short.scores() == metric()(['a' * 39], [['y' * 6]])[0].scores()   # what is cut is not read


def test_a_mesh_changes_nothing():
  texts = [chr(97 + i) * (3 * i + 1) for i in range(9)]
  references = [[text[::-1] + 'q'] for text in texts]
  expected = metric()(texts, references)[0].scores()
  with jax.set_mesh(mesh_of('fsdp:4,tensor:2')):
    actual = metric()(texts, references)[0].scores()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_long_inputs_show_progress(capsys):
  texts = [text_rows.Text(np.arange(n, dtype=np.int32), np.zeros(n, np.int32)) for n in (90, 40, 5)]
  seconds = iter(range(0, 1000, 10))
  shown = list(text_rows.compute('bleurt', lambda batch: batch.tokens.sum(1), texts, 96, lambda: next(seconds)))
  assert {i: int(values[0]) for (i,), values in shown} == {0: 4005, 1: 780, 2: 10}
  assert capsys.readouterr().err.splitlines() == ['bleurt: 1 of 3 texts', 'bleurt: 2 of 3 texts']


def test_bad_input_is_refused():
  base = encoder.bert(320, 16, 2, 2, 48)
  with pytest.raises(ValueError, match='of class Encoder gives pairs of texts no score; take a checkpoint of BLEURT'):
    bleurt.Bleurt(base, None, tokenizers.Bytes())(['a'], [['a']])
  with pytest.raises(ValueError, match='gives pairs of texts a score, and no token a probability; use it as'):
    score.pseudo_log_probabilities(MODEL, None, [np.arange(4)], 0)
  with pytest.raises(ValueError, match='2 texts and references of 1'):
    metric()(['a', 'b'], [['a']])


GOLDEN = {   # README.md of github.com/lucadiliello/bleurt-pytorch
    'lucadiliello/BLEURT-20-D12': [0.9604414105415344, 0.8080050349235535],
    'lucadiliello/BLEURT-20': [0.9990496635437012, 0.7930182218551636]}


@pytest.mark.network
@pytest.mark.parametrize('name', GOLDEN)
def test_published_checkpoints_give_the_published_scores(name):
  references = ['a bird chirps by the window', 'this is a random sentence']
  candidates = ['a bird chirps by the window', 'this looks like a random sentence']
  scores = checkpoints.load(name)(candidates, [[text] for text in references])[0].scores()
  np.testing.assert_allclose(scores, GOLDEN[name], rtol=0, atol=1e-4)
