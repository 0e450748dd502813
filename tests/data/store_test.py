"""A store returns the documents that went in, resumes after a kill with the same bytes, and refuses other settings."""
import dataclasses
import functools
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers.disks import files_of
from helpers.stores import BYTES, SOURCE, TRAIN, Wide, build, contents, small_groups  # noqa: F401  (a fixture of every test)

from lm.data import dataset, store, store_reader, tokenizers
from lm.data.encoding import TextEncoder
from lm.data.text import clean
from lm.data.text.source import Source
from lm.objectives.next_token import next_token

ROOT = pathlib.Path(__file__).parents[2]


def test_documents_come_out_as_they_went_in_once(tmp_path):
  lines = []
  stores = build(tmp_path, progress=lines.append)
  train = stores['train']
  expected = [d for i, d in enumerate(TRAIN) if i not in (5, 9, 20)]
  assert [BYTES.decode(train[i]) for i in range(len(train))] == expected
  assert [BYTES.decode(stores['validation'][i]) for i in range(4)] == SOURCE.splits['validation']
  counts = {'read': 23, 'documents': 20, 'dropped': {'duplicate': 2, 'too short': 1}}
  assert counts.items() <= train.manifest.items()
  assert train.manifest['bytes'] == train.manifest['tokens'] == sum(len(d.encode()) for d in expected)
  assert train.tokens.dtype == np.uint16 and train.offsets[-1] == len(train.tokens) == sum(map(len, train))
  np.testing.assert_array_equal(train[-1], train[19])
  with pytest.raises(IndexError, match='document 20 of 20'):
    train[20]
  assert '2 duplicate, 1 too short' in lines[1] and ' 0.3 kB, ' in lines[1] and 'B/s' in lines[1]
  assert set(contents(tmp_path)) == {'lock', 'manifest.json', *(
      f'{split}/{name}' for split in stores for name in ('tokens.bin', 'offsets.npy'))}


def test_notes_and_counts_of_a_source_are_reported_once_without_zeros(tmp_path):
  lines = []
  source = dataclasses.replace(SOURCE, notes=['used 3 of 4'], counts={'null dropped': 0, 'invalid UTF-8 dropped': 2})
  for _ in range(2):
    build(tmp_path / 'a', source, progress=lines.append)
  assert lines[2:] == ['used 3 of 4', 'toy: 2 invalid UTF-8 dropped']
  build(tmp_path / 'b', dataclasses.replace(source, notes=[], counts={'null dropped': 0}), progress=lines.append)
  assert len(lines) == 6 and not any('null' in line for line in lines)


def test_a_store_is_opened_again_without_reading_the_source(tmp_path):
  first = build(tmp_path)
  again = build(tmp_path, dataclasses.replace(SOURCE, splits=dict.fromkeys(SOURCE.splits)))
  assert again['train'].fingerprint == first['train'].fingerprint != first['validation'].fingerprint
  copy = pickle.loads(pickle.dumps(first['train']))
  np.testing.assert_array_equal(copy.tokens, first['train'].tokens)
  assert len(pickle.dumps(first['train'])) < 500  # it stores paths, not tokens


def test_a_build_killed_by_sigkill_resumes(tmp_path):
  build(tmp_path / 'whole')
  code = ('import os, sys; sys.path[:0] = sys.argv[1:3]; from helpers import stores as t; from lm.data import store; '
          'store._GROUP_DOCUMENTS = 5; n = iter(range(10)); fsync = os.fsync; '
          'os.fsync = lambda f: fsync(f) if next(n, None) is not None else os.kill(os.getpid(), 9); '
          't.build(sys.argv[3])')
  killed = subprocess.run([sys.executable, '-c', code, ROOT, ROOT / 'tests', tmp_path / 'killed'])
  assert killed.returncode == -signal.SIGKILL
  assert json.loads((tmp_path / 'killed/unfinished.json').read_text())['splits']['train']['read'] == 5
  build(tmp_path / 'killed')
  assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')


def test_workers_and_groups_change_nothing(tmp_path, monkeypatch):
  build(tmp_path / 'a')
  monkeypatch.setattr(store, '_GROUP_DOCUMENTS', 2000)
  build(tmp_path / 'b', workers=2)
  assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


class Stop(BaseException):
  pass


@dataclasses.dataclass(frozen=True)
class StopAt:
  """A rule that ends the build at this document."""
  text: str

  def __call__(self, document):
    if document == self.text and not (flag := pathlib.Path(os.environ['STOP_FLAG'])).exists():
      flag.touch()
      raise Stop
    return document


@pytest.mark.parametrize('finished', [True, False])
@pytest.mark.parametrize('setting, change', [
    ('tokenizer', {'tokenizer': tokenizers.Bytes(())}),
    ('source', {'source': dataclasses.replace(SOURCE, fingerprint='abd')}),
    ('rules', {'rules': (clean.Whitespace(),)})])
def test_other_settings_are_refused(tmp_path, monkeypatch, finished, setting, change):
  monkeypatch.setenv('STOP_FLAG', str(tmp_path / 'flag'))
  folder, rules = tmp_path / 'store', (*clean.DEFAULT, StopAt(TRAIN[12]))
  with pytest.raises(Stop):
    build(folder, rules=rules)
  if finished:
    build(folder, rules=rules)
  before = contents(folder)
  manifest = json.loads((folder / ('manifest.json' if finished else 'unfinished.json')).read_text())
  with pytest.raises(ValueError, match=f'other settings: {setting} .* there, .* here; go back') as e:
    build(folder, **{'rules': rules} | change)
  assert str(manifest['settings'][setting]) in str(e.value) and contents(folder) == before


def test_rules_without_a_lasting_name_are_refused(tmp_path):
  for rule in (lambda text: text, clean.Deduplicate()):
    with pytest.raises(ValueError, match='no lasting name'):
      build(tmp_path, rules=(rule,))


@pytest.mark.parametrize('file', ['tokens.bin', 'offsets.npy'])
def test_truncated_files_are_noticed(tmp_path, file):
  build(tmp_path)
  path = tmp_path / 'train' / file
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(ValueError, match=file):
    build(tmp_path)


def damaged(folder, file, change):
  path = folder / 'train' / file
  values = np.load(path) if file == 'offsets.npy' else np.fromfile(path, np.uint16)
  change(values)
  np.save(path, values) if file == 'offsets.npy' else values.tofile(path)


def put(place, value):
  return lambda values: values.__setitem__(place, value)


@pytest.mark.parametrize('file, change, message', [
    ('tokens.bin', put(7, BYTES.vocab_size), f'the id {BYTES.vocab_size}, of a vocabulary of {BYTES.vocab_size}'),
    ('tokens.bin', put(-1, 65_535), 'the id 65535'), ('offsets.npy', put(0, 5), 'offsets'),
    ('offsets.npy', put(3, 10 ** 6), 'offsets'), ('offsets.npy', put(3, -1), 'offsets'),
    ('offsets.npy', put(-1, 3), 'offsets')])
def test_ids_and_offsets_that_cannot_be_are_noticed_at_opening(tmp_path, file, change, message):
  build(tmp_path)
  damaged(tmp_path, file, change)
  with pytest.raises(ValueError, match=f'{file} is damaged.*{message}.*delete {tmp_path}, and it is made again'):
    build(tmp_path)


def test_the_ids_of_a_huge_store_are_checked_by_its_largest_and_as_they_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(store_reader, '_READ', 0)
  train = build(tmp_path)['train']
  assert train.manifest['largest'] == int(train.tokens.max())
  with pytest.raises(ValueError, match=f'has the id {train.manifest["largest"]}, of a vocabulary of 97'):
    train.check(97)
  damaged(tmp_path, 'tokens.bin', put(7, BYTES.vocab_size))
  stream = dataset.OpenText(build(tmp_path), BYTES, 16).batches('train', next_token(), 4, seed=None)
  with pytest.raises(ValueError, match=f'document 0 of .* the id {BYTES.vocab_size}, .*; --verify says which files'):
    stream(0)


@pytest.mark.parametrize('file, change', [('tokens.bin', put(slice(0, 9), 0)), ('tokens.bin', put(20, 65)),
                                          ('offsets.npy', lambda values: put(3, values[3] + 1)(values))])
def test_any_other_damage_is_noticed_by_checksums(tmp_path, file, change):
  build(tmp_path)
  assert store.verify(tmp_path) == [] == store.verify(tmp_path / 'absent')
  damaged(tmp_path, file, change)
  build(tmp_path)
  with pytest.raises(ValueError, match=f'train/{file} is not as it was written'):
    store.verify(tmp_path)


def test_a_store_without_checksums_opens_with_a_note(tmp_path):
  build(tmp_path)
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  del manifest['checksum']
  for counts in manifest['splits'].values():
    del counts['checksums'], counts['largest']
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
  assert len(build(tmp_path)['train']) == 20
  assert store.verify(tmp_path) == [str(tmp_path / name) for name in ('manifest.json', *manifest['splits'])]


@pytest.mark.parametrize('names', [['train/tokens.bin'], ['train/offsets.npy'], ['train']])
def test_what_is_missing_from_a_store_is_named(tmp_path, names):
  build(tmp_path)
  for name in names:
    shutil.rmtree(tmp_path / name) if name == 'train' else (tmp_path / name).unlink()
  with pytest.raises(FileNotFoundError, match=f'{names[0]}.* is missing from a finished store: delete {tmp_path}'):
    build(tmp_path)


def test_an_unfinished_store_that_lost_data_is_refused(tmp_path, monkeypatch):
  monkeypatch.setenv('STOP_FLAG', str(tmp_path / 'flag'))
  rules = (StopAt(TRAIN[12]),)
  with pytest.raises(Stop):
    build(tmp_path, rules=rules)
  os.truncate(tmp_path / 'validation/tokens.bin', 3)
  with pytest.raises(ValueError, match='tokens.bin has lost committed data: delete'):
    build(tmp_path, rules=rules)


def test_a_split_without_documents_is_refused_with_the_reasons(tmp_path):
  for documents, message in (([], '0 read; dropped: none'), (['', 'held out 1', 'held out 2'], '2 duplicate, 1 too')):
    source = Source('toy', {'train': documents, 'validation': SOURCE.splits['validation']}, repr(documents))
    with pytest.raises(ValueError, match=f'toy: no document is left in train of .*{message}'):
      build(tmp_path / str(len(documents)), source)


def test_errors_of_writing_name_the_file(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='cannot write the store: Not a directory; free space or choose another folder'):
    build(tmp_path / 'file' / 'store')
  with files_of(200), pytest.raises(OSError, match=f'cannot write the store: File too large.*{tmp_path}/full'):
    build(tmp_path / 'full')
  with (pytest.raises(OSError, match=f'cannot write the store: No space left on device.*{tmp_path}'), files_of(300),
        store._writing(tmp_path)):
    np.save(tmp_path / 'offsets.npy', np.arange(1000))   # NumPy writes what fits, and raises an error without a number
  assert len(build(tmp_path / 'full')['train']) == 20


def test_two_builders_of_one_folder_take_turns(tmp_path):
  lines = []
  target = functools.partial(build, tmp_path / 'a', progress=lines.append)
  threads = [threading.Thread(target=target) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  build(tmp_path / 'b')
  assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
  assert sum('dropped' in line for line in lines) == 2  # built once, with one line per split


def test_wide_vocabularies_and_documents_without_tokens(tmp_path):
  source = Source('wide', {'train': ['short', 'a longer document']}, 'x')
  train = build(tmp_path, source, Wide())['train']
  assert train.tokens.dtype == np.uint32 and train[0][0] == 69_000 + ord('a')
  assert train.manifest['dropped'] == {'no tokens': 1} and train.manifest['bytes'] == 17


def test_a_build_refused_for_no_documents_does_not_block_the_next(tmp_path):
  """The refused build leaves files behind, and the corrected command still works."""
  empty = dataclasses.replace(SOURCE, fingerprint='empty', splits={'train': [''], 'validation': ['']})
  with pytest.raises(ValueError, match='no document is left'):
    store.build(tmp_path, empty, TextEncoder(BYTES))
  assert len(store.build(tmp_path, SOURCE, TextEncoder(BYTES))['validation']) == 4
