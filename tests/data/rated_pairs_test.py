"""Ratings are read, split by item and by system, encoded, and packed into rows."""
import itertools
import json

import numpy as np
import pytest

from lm.data import rated_pairs, tokenizers
from lm.data.text import rating_records
from lm.objectives.next_token import next_token
from lm.objectives.rating import rating


def write(folder, records):
  path = folder / 'ratings.jsonl'
  path.write_text('\n'.join(map(json.dumps, records)) + '\n')
  return str(path)


def records(items=60, systems='abcdefgh'):
  rng = np.random.default_rng(0)
  return [{'item': f'item {i}', 'system': system, 'references': [f'ref {i}', f'reference {i}'],
           'candidate': f'{system} {i}', 'rating': float(rng.uniform())} for i in range(items) for system in systems]


def test_no_item_and_no_system_that_is_held_out_is_trained_on(tmp_path):
  source = rating_records.rated(write(tmp_path, records()), 0.2)
  splits = {split: [rating_records.read(record) for record in documents] for split, documents in source.splits.items()}
  assert set(splits) == {'train', 'validation', 'validation-items', 'validation-systems'}
  assert sum(map(len, splits.values())) == 480
  items, systems = ({split: {getattr(each, field) for each in splits[split]} for split in splits}
                    for field in ('item', 'system'))
  for one, other in itertools.combinations(('train', 'validation', 'validation-items'), 2):
    assert not items[one] & items[other]
  assert 4 < len(items['validation']) < 20 and 4 < len(items['validation-items']) < 20
  assert len(systems['validation-systems']) == 2
  assert not systems['validation-systems'] & (systems['train'] | systems['validation'])
  named = rating_records.rated(write(tmp_path, records()), 0.2, ('c',))
  assert {rating_records.read(record).system for record in named.splits['validation-systems']} == {'c'}
  assert named.fingerprint != source.fingerprint


def test_records_without_systems_have_no_split_of_systems(tmp_path):
  plain = [{'reference': f'text {i}', 'candidate': 'x', 'rating': 1} for i in range(50)]
  source = rating_records.rated(write(tmp_path, plain), 0.3)
  assert set(source.splits) == {'train', 'validation', 'validation-items'}
  first = rating_records.read(source.splits['train'][0])
  assert first.item == first.references[0]


@pytest.mark.parametrize('record', [
    {'candidate': 'x', 'rating': 1}, {'reference': 'x', 'rating': 1}, {'reference': 'x', 'candidate': 'y'},
    {'reference': 'x', 'candidate': 'y', 'rating': 'good'}, {'reference': 'x', 'candidate': 'y', 'rating': True},
    {'references': [], 'candidate': 'y', 'rating': 1}, {'references': [3], 'candidate': 'y', 'rating': 1},
    {'references': 'a text', 'candidate': 'y', 'rating': 1},
    {'references': [], 'candidate': 'y', 'rating': 1, 'item': 'z'}])
def test_what_is_no_rating_is_refused(record):
  with pytest.raises(ValueError, match='is no rating; a line has candidate, rating'):
    rating_records.read(json.dumps(record))


def test_a_system_or_an_item_that_is_null_is_absent():
  rating = rating_records.read('{"reference": "x", "candidate": "y", "rating": 1, "system": null, "item": null}')
  assert (rating.system, rating.item) == ('', 'x')


def test_an_unknown_system_and_an_empty_split_are_refused(tmp_path):
  path = write(tmp_path, records(3))
  with pytest.raises(ValueError, match='--held_out_systems=z has no candidate in .*, which has those of a, b'):
    _ = rating_records.rated(path, 0.2, ('z',)).splits
  with pytest.raises(ValueError, match='has no rating in the split validation'):
    _ = rating_records.rated(path, 1e-9).splits


def test_synthetic_ratings_are_the_share_of_right_words():
  source = rating_records.synthetic(400)
  for documents in source.splits.values():
    for record in map(rating_records.read, documents):
      words, new = record.references[0].split(), record.candidate.split()
      if record.system == 'drop':
        assert record.rating == pytest.approx(len(new) / len(words))
      elif record.system == 'replace':
        assert record.rating == pytest.approx(sum(map(str.__eq__, words, new)) / len(words))
      elif record.system == 'swap':
        assert sorted(words) == sorted(new)
        assert record.rating == pytest.approx(sum(map(str.__eq__, words, new)) / len(words))
  assert {rating_records.read(record).system for record in source.splits['validation-systems']} == {'mix'}
  again, other = rating_records.synthetic(400), rating_records.synthetic(400, seed=1)
  assert again.fingerprint == source.fingerprint != other.fingerprint


def test_each_rating_is_read_once_an_epoch(tmp_path):
  source = rating_records.rated(write(tmp_path, records()), 0.2)
  opened = rated_pairs.RatedPairs(source, tokenizers.Bytes(), 64).open(tmp_path / 'run', progress=lambda line: None)
  assert opened.validation_sets == ('items', 'systems')
  batches = opened.batches('train', rating(), 4, seed=3)
  ratings = []
  for step in range(batches.steps_per_epoch):
    batch = batches(step)
    places = batch.weights > 0
    ratings += batch.columns['ratings'][places].tolist()
  expected = [np.float32(rating_records.read(record).rating) for record in source.splits['train']]
  assert batches.rows_per_epoch % 4 or sorted(ratings) == sorted(expected)
  assert set(expected) <= set(np.float32(ratings))
  assert len(opened.batches('validation/systems', rating(), 4).records) == 120
  with pytest.raises(ValueError, match='learns from documents, and the data has candidates with references and rat'):
    opened.batches('train', next_token(), 4)


def test_ratings_that_are_too_long_are_counted_and_a_stored_run_says_what_it_lacks(tmp_path):
  long = records() + [{'reference': 'x' * 200, 'candidate': 'y', 'rating': 0, 'system': 'a', 'item': 'item 1'}] * 3
  data, lines = rated_pairs.RatedPairs(rating_records.rated(write(tmp_path, long), 0.2), tokenizers.Bytes(), 64), []
  data.open(tmp_path / 'run', progress=lines.append).batches('train', rating(), 4)
  assert any('3 of ' in line and 'longer than a row of 64 positions' in line for line in lines)
  with pytest.raises(ValueError, match='are not stored in it; open it with its script'):
    data.to_store().open(tmp_path / 'run')
  assert data.load_tokenizer(tmp_path / 'run') == tokenizers.Bytes()
