"""Metrics against references equal those of the packages, to the last digit, and plain definitions."""
import csv
import gzip
import random

import numpy as np
import pytest
from helpers import shared_data

from lm.evaluate import report, stored_measures, texts
from lm.evaluate.texts import exact, scored_pairs, words

sacrebleu = pytest.importorskip('sacrebleu.metrics')
rouge_scorer = pytest.importorskip('rouge_score.rouge_scorer')
CHINESE = ['猫坐在垫子上。今天天气很好。'], [['猫坐在垫子上面。今天天气不错。']]


def corpus(size=40, seed=0):
  """Returns candidates and one to three references each, of few words, so that n-grams match."""
  rng = random.Random(seed)
  vocabulary = ['the', 'a', 'cat', 'dog', 'sat', 'on', 'mat', ',', 'It', 'is', 'not', 'raining', '.', 'walk', 'walked']

  def text():
    return ' '.join(rng.choices(vocabulary, k=rng.randint(0, 15)))
  return [text() for _ in range(size)], [[text() + ' x' for _ in range(rng.randint(1, 3))] for _ in range(size)]


def streams(references):
  """Returns references as sacrebleu takes them: a list for each place, None where a text has fewer."""
  count = max(map(len, references))
  return [[several[i] if i < len(several) else None for several in references] for i in range(count)]


@pytest.mark.parametrize('metric,theirs', [
    (texts.Bleu(), lambda: sacrebleu.BLEU()), (texts.Bleu(lowercase=True), lambda: sacrebleu.BLEU(lowercase=True)),
    (texts.Bleu('intl'), lambda: sacrebleu.BLEU(tokenize='intl')), (texts.Chrf(), lambda: sacrebleu.CHRF()),
    (texts.Chrf(2, lowercase=True), lambda: sacrebleu.CHRF(word_order=2, lowercase=True)),
    (texts.Ter(), lambda: sacrebleu.TER()),
    (texts.Ter(case_sensitive=True), lambda: sacrebleu.TER(case_sensitive=True))])
@pytest.mark.parametrize('most', [1, 3])
def test_the_value_and_the_signature_are_those_of_sacrebleu(metric, theirs, most):
  candidates, references = corpus()
  references = [several[:most] for several in references]
  measure, = metric(candidates, references)
  other = theirs()
  assert measure.interval().value == other.corpus_score(candidates, streams(references)).score
  assert measure.signature == other.get_signature().format()
  low, high = measure.interval()[1:]
  assert low < measure.interval().value < high
  single = theirs().corpus_score([candidates[3]], streams([references[3]])).score
  assert measure.scores()[3] == single and measure.scores().shape == (40,)


def test_bleu_of_single_texts_is_the_sentence_bleu_of_sacrebleu():
  candidates, references = corpus()
  measure, = texts.Bleu(effective_order=True)(candidates, references)
  theirs = sacrebleu.BLEU(effective_order=True)
  expected = [theirs.sentence_score(candidate, several).score for candidate, several in zip(candidates, references)]
  assert measure.scores().tolist() == expected and measure.signature.startswith('nrefs:var|case:mixed|eff:yes|')
  assert (measure.scores() > texts.Bleu()(candidates, references)[0].scores()).any()


def test_what_each_text_adds_is_stored_and_read_with_the_same_scores(tmp_path):
  candidates, references = corpus(10)
  metrics = texts.Bleu(effective_order=True), texts.Chrf(2), texts.Ter(), texts.Rouge(), texts.EditDistance()
  measures = [measure for metric in metrics for measure in metric(candidates, references)]
  result = report.Result(measures, documents=list('abcdefghij'))
  stored_measures.write(stored_measures.file_of(tmp_path, 'e'), result, {'evaluation': 1, 'model': 2})
  report.write(tmp_path, {'evaluations': {'e': 1}, 'model': 2}, {'e': report.to_json(result)})
  stored = stored_measures.read(tmp_path)
  assert len(stored) == len(measures)
  for measure in measures:
    assert stored[f'e/{measure.name}'].measure.interval() == measure.interval()


def test_published_values():
  system = ['The dog bit the man.', "It wasn't surprising.", 'The man had just bitten him.']
  references = [['The dog bit the man.', 'The dog had bit the man.'],
                ['It was not unexpected.', 'No one was surprised.'],
                ['The man bit him first.', 'The man had bitten the dog.']]
  assert [metric(system, references)[0].interval().value for metric in (texts.Bleu(), texts.Chrf(), texts.Chrf(2),
                                                                        texts.Ter())] == [
      48.530827009929865, 59.72751782684763, 59.15310444399262, 40.0]   # of the README of sacrebleu
  pair = ['The quick brown dog jumps on the log.'], [['The quick brown fox jumps over the lazy dog']]
  values = {measure.name: measure.interval().value for measure in texts.Rouge()(*pair)}
  assert values['rouge1_precision'] == 0.75 and values['rouge1'] == 0.7058823529411765
  assert values['rouge2'] == 0.26666666666666666 and values['rougeL'] == 0.5882352941176471


@pytest.mark.parametrize('stem', [False, True])
def test_rouge_is_the_mean_of_the_scores_of_the_package_with_the_best_reference(stem):
  candidates, references = corpus(20)
  candidates, references = [text.replace('. ', '.\n') for text in candidates], [
      [text.replace('. ', '.\n') for text in several] for several in references]   # lines are sentences
  scorer = rouge_scorer.RougeScorer(['rouge1', 'rougeL', 'rougeLsum'], use_stemmer=stem)
  values = {measure.name: measure for measure in texts.Rouge(stem)(candidates, references)}
  for kind in ('rouge1', 'rougeL', 'rougeLsum'):
    best = [max((scorer.score(reference, candidate)[kind] for reference in several), key=lambda score: score.fmeasure)
            for candidate, several in zip(candidates, references)]
    assert values[kind].scores().tolist() == [score.fmeasure for score in best]
    assert values[kind + '_recall'].interval().value == pytest.approx(np.mean([score.recall for score in best]), 1e-12)
  assert len(values) == 12 and f'stem:{"yes" if stem else "no"}' in values['rouge1'].signature


def test_text_that_is_not_ascii_does_not_score_zero():
  bleu, = texts.Bleu()(*CHINESE)
  assert bleu.interval().value == 58.63954417655858 and 'tok:zh' in bleu.signature
  assert texts.Bleu('char')(*CHINESE)[0].interval().value == 58.63954417655858
  values = [measure.interval().value for measure in texts.Rouge()(['今天天气很好'], [['今天天气不错']])]
  np.testing.assert_allclose(values[0::3], [2 / 3, .6, 2 / 3, 2 / 3], rtol=1e-12)
  assert texts.Rouge(language='en')(*CHINESE)[0].interval().value == 0   # what rouge-score says of it
  assert texts.Ter()(*CHINESE)[0].interval().value == 20   # 3 of 15 characters
  russian = texts.Rouge(stem=True)(['Кошка сидит дома'], [['Кошка спит дома']])[0]
  assert russian.interval().value == pytest.approx(2 / 3, 1e-12)


def test_japanese_without_mecab_is_refused_and_characters_are_offered():
  japanese = ['猫がマットの上に座った。'], [['猫がマットの上に座っている。']]
  try:
    import MeCab  # noqa: F401
  except ImportError:
    with pytest.raises(ImportError, match=r"'sacrebleu\[ja\]', or compare characters with tokenize=char"):
      texts.Bleu()(*japanese)
  assert texts.Bleu('char')(*japanese)[0].interval().value > 50


@pytest.mark.parametrize('text,language', [
    ('A cat sat on the mat.', 'en'), ('', 'en'), ('12 + 3', 'en'), ('今天天气很好', 'zh'), ('今日はいい天気です', 'ja'),
    ('오늘 날씨가 좋다', 'ko'), ('Сегодня хорошая погода', 'other'), ('Wie schön ist es draußen', 'other'),
    ('The word 猫 is Chinese for a cat. ' + 'Every beginner learns it. ' * 9, 'en'),
    ('我用 PyTorch 和 JAX 训练语言模型', 'zh')])
def test_the_language_follows_the_script(text, language):
  assert words.language([text]) == language


def test_words_of_any_script():
  assert words.split("It's 3.5, नमस्ते दुनिया 猫は über") == [
      'It', "'", 's', '3', '.', '5', ',', 'नमस्ते', 'दुनिया', '猫', 'は', 'über']


def test_edits_equal_the_plain_table():
  rng = random.Random(0)
  for _ in range(200):
    first, second = (rng.choices('abc', k=rng.randint(0, 12)) for _ in range(2))
    table = [[i + j if i * j == 0 else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
      for j, b in enumerate(second, 1):
        table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    assert exact.edits(first, second) == table[-1][-1]


def test_error_rates_are_of_the_corpus_and_of_the_nearest_reference():
  word, character = texts.EditDistance()(['a b c', 'x'], [['a b', 'a b d e f g'], ['x y']])
  assert word.rows.tolist() == [[1, 2], [1, 2]] and word.interval().value == 0.5
  assert character.rows.tolist() == [[7, 11], [2, 3]]
  assert texts.EditDistance()(['今天很好'], [['今天不好']])[0].rows.tolist() == [[1, 4]]


def test_exact_match_and_the_normalisation_of_squad():
  candidates, references = ['The  Cat, sat', ' b '], [['x', 'cat sat'], ['b']]
  assert texts.ExactMatch()(candidates, references)[0].scores().tolist() == [0, 1]
  assert texts.ExactMatch(True)(candidates, references)[0].scores().tolist() == [1, 1]
  assert exact.squad('An  apple, the "theme" of a day!') == 'apple theme of day'


def test_slots_are_values_that_the_reference_has_too():
  candidates, references = ['lamp: 4, 4 and 7', 'none', '1 2'], [['the 4 and 4, not 5'], ['nothing'], ['2 2 1']]
  measure, = texts.SlotAccuracy(r'(\d+)')(candidates, references)
  assert measure.rows.tolist() == [[2, 3], [0, 0], [2, 3]] and measure.interval().value == 4 / 6


def test_the_ratio_of_lengths_takes_the_reference_nearest_in_length():
  measure, = texts.LengthRatio()(['a b c', 'a'], [['a', 'a b', 'a b c d'], ['a b c']])
  assert measure.rows.tolist() == [[3, 2], [1, 3]] and measure.interval().value == 0.8


@pytest.mark.parametrize('metric', [texts.Bleu(), texts.Chrf(), texts.Ter(), texts.Rouge(), texts.ExactMatch(),
                                    texts.EditDistance(), texts.LengthRatio()],
                         ids=lambda metric: type(metric).__name__)
def test_what_cannot_be_compared_is_refused(metric):
  for candidates, references, message in ([], [], 'there are none'), (['a'], None, 'there are none; give references'), (
      ['a', 'b'], [['a']], 'has 2 texts and references of 1'), (['a'], ['a'], 'text 1 of 1 has no list'), (
          ['a', 'b'], [['a'], []], 'text 2 of 2 has no list'):
    with pytest.raises(ValueError, match=message):
      metric(candidates, references)
  for measure in metric(['', ''], [['a b'], ['c']]):   # texts without words are no error
    assert np.isfinite(measure.interval()).all()


def test_progress_is_shown_where_it_takes_long(capsys):
  times = iter(range(0, 100, 2))
  assert len(list(scored_pairs.pairs('bleu', ['a'] * 5, [['b']] * 5, lambda: next(times)))) == 5
  assert capsys.readouterr().err.splitlines() == [f'bleu: {i} of 5 texts' for i in (1, 3)]


def test_the_published_bleu_of_tgen_on_several_references():
  folder = shared_data.folder('e2e_nlg')

  def rows(name, **settings):
    with gzip.open(folder / name, 'rt') as file:
      return list(csv.DictReader(file, **settings))
  references = {}
  for row in rows('testset_w_refs.csv.gz'):
    references.setdefault(row['mr'], []).append(row['ref'])
  outputs = {row['MR']: row['output'] for row in rows('system_outputs/tgen.tsv.gz', delimiter='\t')}
  measure, = texts.Bleu(lowercase=True)([outputs[mr] for mr in references], list(references.values()))
  assert len(references) == 630 and round(measure.interval().value / 100, 4) == 0.6593
