"""Items in training text: by brute force on random texts, planted leaks, and the boundaries of the rule."""
import gzip
import importlib
import json
import pathlib
import string
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.text import source
from lm.evaluate import contamination, item_files, item_index, measures, report, stored_measures
from lm.evaluate.contamination import Item
from lm.options import Corpus

RNG = np.random.default_rng(0)


def text(size, vocabulary=string.ascii_lowercase):
  return ' '.join(RNG.choice(list(vocabulary), size))


def search(items, documents, **settings):
  return contamination.search([Item(str(i), item) for i, item in enumerate(items)], documents, **settings)


def brute_force(item, documents, words, most):
  """The number of n-grams that count, of those that are ignored, and the length of the longest match."""
  spaced = [f' {" ".join(document.split())} ' for document in documents]
  gram = lambda i, size: f' {" ".join(item.split()[i:i + size])} '
  size = len(item.split())
  counts = [sum(gram(i, words) in document for document in spaced) for i in range(size - words + 1)]
  longest = max((n for n in range(1, size + 1) for i in range(size - n + 1)
                 if any(gram(i, n) in document for document in spaced)), default=0)
  return sum(0 < n <= most for n in counts), sum(n > most for n in counts), longest if longest >= words else 0


def test_random_texts_give_what_a_plain_search_gives():
  """Texts of few letters, in which matches of all lengths occur; with items that repeat one another."""
  documents = [text(RNG.integers(1, 120), 'abc') for _ in range(30)]
  items = [text(RNG.integers(1, 40), 'abcd') for _ in range(30)]
  items += [items[0], f'{items[1]} {items[1]}', documents[3], ' '.join(documents[4].split()[2:9]), '']
  for one, item in zip(search(items, documents, words=5, most_documents=3), items, strict=True):
    matches, ignored, longest = brute_force(item, documents, 5, 3)
    assert (one.words, one.matches, one.ignored, one.longest) == (len(item.split()), matches, ignored, longest)
    assert one.status == ('short' if one.words < 5 else 'dirty' if matches else 'clean')
    assert len(one.excerpt.split()) == longest and one.excerpt in item and len(one.excerpt) == one.characters


@pytest.mark.parametrize('block', [50, 333])
def test_a_long_document_is_searched_in_blocks(monkeypatch, block):
  document = text(600, 'ab')
  items = [document[i:i + 90] for i in range(0, 1100, 61)]
  whole = search(items, [document, text(50)], words=9)
  monkeypatch.setattr(item_index, 'BLOCK', block)
  assert search(items, [document, text(50)], words=9) == whole and all(one.status == 'dirty' for one in whole)


WORDS = [f'w{i}' for i in range(40)]


@pytest.mark.parametrize('shared,status', [(12, 'clean'), (13, 'dirty'), (14, 'dirty')])
def test_thirteen_words_are_the_boundary(shared, status):
  leak = ' '.join(WORDS[:shared])
  one, = search([f'before it {leak} after it'], ['unrelated text', f'some {leak} other'])
  assert (one.status, one.longest, one.matches, one.excerpt) == (status, shared, max(shared - 12, 0), leak)


@pytest.mark.parametrize('size,status', [(12, 'short'), (13, 'dirty')])
def test_an_item_of_fewer_words_is_short(size, status):
  one, = search([' '.join(WORDS[:size])], [' '.join(WORDS)])
  assert one.status == status and one.longest == size


def test_case_punctuation_and_white_space_are_ignored():
  item = 'It was the best of times, it was the worst of times; it was the age!'
  other = 'IT   was\nthe "best" of times it was — the worst of “times” it was the (age), and'
  one, = search([item], [other])
  assert one.status == 'dirty' and one.excerpt == item and one.characters == len(item)
  one, = search([item], [other.replace('worst', 'worse')])
  assert one.status == 'clean' and one.longest == 9 and one.excerpt == 'It was the best of times, it was the'


def test_common_phrases_are_ignored():
  phrase, leak = ' '.join(WORDS[:13]), ' '.join(WORDS[20:33])
  documents = [f'{phrase} x{i}' for i in range(11)] + [f'y{i} {leak}' for i in range(10)]
  common, leaked = search([phrase, leak], documents)
  assert (common.status, common.ignored, common.longest) == ('clean', 1, 13) and leaked.status == 'dirty'
  assert search([phrase], documents, most_documents=None)[0].status == 'dirty'
  assert search([phrase], [' '.join([phrase] * 20)])[0].status == 'dirty'   # 20 times in one document are one document


def test_scripts_without_spaces_are_compared_by_characters():
  item = '床前明月光，疑是地上霜。举头望明月'
  assert search([item], ['诗曰床前明月光疑是地上霜举头思'])[0][1:6] == (15, 'clean', 0, 0, 12)
  one, = search([item], ['「床前明月光」、疑是地上霜 举头望故'])
  assert (one.status, one.longest, one.excerpt) == ('dirty', 13, '床前明月光，疑是地上霜。举头望')
  one, = search(['吾輩は猫である。名前はまだ無い。'], ['吾輩は猫である名前はまだ無い'])
  assert (one.status, one.words) == ('dirty', 14)
  assert search(['물을 마시고 산책을 했다'], [''])[0].words == 4   # Korean has spaces


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aB ç.-'\n\u3000字か、ー。σΣßİ1_·$\u200bกé\u0301"), max_size=30))
def test_words_with_places_are_the_words(sample):
  normal = unicodedata.normalize('NFC', sample)
  with_places = item_index.places(normal)
  assert [word for word, _, _ in with_places] == item_index.words(sample)
  assert all(item_index.words(normal[first:end]) == [word] for word, first, end in with_places)


def test_matches_are_counted_up_to_a_limit():
  leak = text(item_index.LONGEST + 200)
  assert search([leak], [leak])[0].longest == item_index.LONGEST


def test_a_search_that_is_stopped_goes_on(tmp_path, monkeypatch):
  documents, items = [text(200, 'ab') for _ in range(9)], [text(40, 'ab') for _ in range(4)]
  whole, file, reads = search(items, documents, words=6), tmp_path / 'partial.npz', []

  class Stopping(list):
    def __getitem__(self, i):
      reads.append(i)
      if len(reads) == 6:
        raise KeyboardInterrupt
      return super().__getitem__(i)
  monkeypatch.setattr(contamination, 'EVERY', -1)
  with pytest.raises(KeyboardInterrupt):
    search(items, Stopping(documents), words=6, partial=file, key='corpus')
  assert search(items, Stopping(documents), words=6, partial=file, key='corpus') == whole
  assert reads[6:] == [5, 6, 7, 8] and not file.exists()
  reads.clear()
  with pytest.raises(KeyboardInterrupt):
    search(items, Stopping(documents), words=6, partial=file, key='corpus')
  assert search(items, Stopping(documents), words=6, partial=file, key='another') == whole and reads[6:][0] == 0


def test_scores_of_clean_and_dirty_items_are_beside_each_other():
  scores, statuses = RNG.normal(0, 1, 600), np.repeat(['clean', 'dirty', 'short'], [300, 250, 50])
  scores[300:550] += 1
  split = contamination.split(measures.mean('score', scores, 'higher'), statuses)
  assert split.clean == measures.mean('score', scores[:300], 'higher').interval() and split.counts == (600, 300, 250)
  assert split.difference.value == pytest.approx(scores[300:550].mean() - scores[:300].mean())
  half = 1.96 * (scores[300:550].var() / 250 + scores[:300].var() / 300) ** 0.5   # of independent means
  assert split.difference.high - split.difference.value == pytest.approx(half, rel=0.1)
  table = contamination.scores_table({'score': split})
  assert str(split.difference) in table and '600, 300, 250 items' in table
  alone = contamination.split(measures.mean('score', scores, 'higher'), ['clean'] * 600)
  assert alone.dirty is None and alone.difference is None and json.dumps(alone.to_json(), allow_nan=False)


@pytest.mark.parametrize('lines,message', [
    ('{', 'line 1 is not JSON'), ('[]', 'line 1 is'), ('{"text": 3}', "line 1 has no text in 'text'; it has"),
    ('{"id": 1, "text": "a"}\n{"text": "b"}', 'line 2 has the id null, and others have one'),
    ('{"id": 1, "text": "a"}\n\n{"id": 1, "text": "b"}', 'has the id 1 on two lines, 1 and 3')])
def test_files_of_items_are_refused_with_the_line(tmp_path, lines, message):
  (tmp_path / 'x.jsonl').write_text(lines)
  with pytest.raises(ValueError, match=message):
    item_files.read_items(tmp_path / 'x.jsonl', ('text',))


def test_fields_of_items_are_joined_and_scores_are_numbers(tmp_path):
  file = tmp_path / 'x.jsonl'
  file.write_text('{"q": "a", "choices": ["b", "c"], "right": true}\n')
  assert item_files.read_items(file, ('q', 'choices')) == [Item('1', 'a\nb\nc')]
  assert item_files.read_scores(file, 'right') == {'1': 1.}
  with pytest.raises(ValueError, match="no finite number in 'q'"):
    item_files.read_scores(file, 'q')
  file.write_text('{"q": "a", "right": NaN}\n')
  with pytest.raises(ValueError, match="line 1 has no finite number in 'right'"):
    item_files.read_scores(file, 'right')


def test_items_may_be_compressed_and_what_is_no_text_is_named(tmp_path):
  file = tmp_path / 'x.jsonl.gz'
  file.write_bytes(gzip.compress('{"text": "ä"}\n'.encode()))
  assert item_files.read_items(file, ('text',)) == [Item('1', 'ä')]
  (tmp_path / 'x.jsonl').write_bytes('{"text": "ä"}'.encode('latin-1'))
  with pytest.raises(ValueError, match='x.jsonl is no text in UTF-8'):
    item_files.read_items(tmp_path / 'x.jsonl', ('text',))


def test_settings_without_meaning_are_refused():
  with pytest.raises(ValueError, match='no evaluation items'):
    search([], ['a'])
  with pytest.raises(ValueError, match='words=0'):
    search(['a'], ['a'], words=0)


def test_the_script_shows_scores_and_results_by_item(tmp_path, monkeypatch, capsys):
  """Of 40 items 10 are in the training text; their scores are 1 and the others' 0."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'experiments')
  script = importlib.import_module('contamination')
  texts = [' '.join(f'{word}{i}' for word in WORDS[:20]) for i in range(40)]
  lines = [{'question': one, 'right': float(i < 10)} for i, one in enumerate(texts)]
  (tmp_path / 'items.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  (tmp_path / 'train.jsonl').write_text('\n'.join(json.dumps({'text': one}) for one in texts[:10] + ['other'] * 3))
  result = report.Result([measures.mean('loss', range(39), 'lower')],
                         documents=[source.digest(one).hex() for one in reversed(texts[1:])])
  stored_measures.write(stored_measures.file_of(tmp_path, 'held'), result, {'evaluation': 1, 'model': 2})
  report.write(tmp_path, {'evaluations': {'held': 1}, 'model': 2}, {'held': report.to_json(result)})
  arguments = {'items': tmp_path / 'items.jsonl', 'item_keys': ('question',), 'scores': tmp_path / 'items.jsonl',
               'score_key': 'right', 'results': tmp_path, 'out': tmp_path / 'out.json'}
  script.contamination(**arguments, corpus=Corpus(jsonl=str(tmp_path / 'train.jsonl'), validation=1e-9))
  stored = json.loads((tmp_path / 'out.json').read_text())
  assert [one['status'] for one in stored['items']] == ['dirty'] * 10 + ['clean'] * 30
  assert stored['scores']['right']['difference']['value'] == 1
  assert stored['scores']['held/loss']['dirty']['value'] == np.mean(range(30, 39))
  assert stored['scores']['held/loss']['items'] == {'all': 39, 'clean': 30, 'dirty': 9}
  assert '10 of 40 items are dirty' in capsys.readouterr().out
  (tmp_path / 'few.jsonl').write_text(json.dumps(lines[0]))
  with pytest.raises(ValueError, match='has no score of 39 of the 40 items'):
    script.contamination(**{**arguments, 'scores': tmp_path / 'few.jsonl'})
  with pytest.raises(ValueError, match='weights and repeat are of training'):
    script.contamination(**arguments, corpus=Corpus(repeat=False))
