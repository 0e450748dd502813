"""A corpus has every document once, in one split, in any format, and its errors say what to do."""
import dataclasses
import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lm import signature
from lm.data.text import corpora, source_files
from lm.data.text.mixture import mixture
from lm.data.text.source import Source, sample

DOCUMENTS = [f'document {i}\nis “nr {i}” 中文' for i in range(200)]


def everything(source):
  """Returns the documents of all splits of a source, sorted."""
  return sorted(document for documents in source.splits.values() for document in documents)


def write_texts(folder, documents=DOCUMENTS):
  for i, document in enumerate(documents):
    path = folder / f'{i % 3}' / f'{i}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(document if isinstance(document, bytes) else document.encode())
  return f'{folder}/**/*.txt'


def write_jsonl(path, documents=DOCUMENTS):
  path.write_text('\n\n'.join(json.dumps({'n': i, 'text': d}, ensure_ascii=False) for i, d in enumerate(documents)))
  return str(path)


@pytest.fixture(scope='module')
def library():
  return corpora.python_library()


def test_python_library_is_real_text_of_ten_megabytes(library):
  documents = everything(library)
  # 9.9 MB in Debian, which packages IDLE separately; otherwise 10.7 to 11.2 MB.
  assert sum(len(d.encode()) for d in documents) > 9.5e6
  assert len(set(documents)) == len(documents) and all(d.strip() for d in documents)
  assert any('class ArgumentParser' in d for d in documents)
  assert any(d.startswith('The "assert" statement') for d in documents)
  assert not any('import unittest\nfrom test import support' in d or 'decoding_table = (' in d for d in documents)


def test_python_library_is_the_same_each_time(library):
  again = corpora.python_library()
  assert again.fingerprint == library.fingerprint
  assert list(again.splits['validation']) == list(library.splits['validation'])
  assert corpora.python_library(validation=0.1).fingerprint != library.fingerprint


def test_nothing_is_scanned_before_first_use(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('not JSON\n')
  source = corpora.jsonl(str(path))
  with pytest.raises(ValueError, match=r'a\.jsonl:1: not JSON'):
    len(source.splits['train'])


def test_a_source_is_made_where_no_file_is_and_lists_them_at_first_use(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  sources = [corpora.text('*.txt'), corpora.jsonl('*.jsonl'), corpora.parquet('*.parquet'), corpora.tfds('./nowhere')]
  mixed = mixture([(source, 1) for source in sources])
  for source in (*sources, mixed):
    for use in ('fingerprint', 'splits', 'name'):
      with pytest.raises((ValueError, FileNotFoundError), match='no file matches|no prepared data set'):
        getattr(source, use)
  with pytest.raises(TypeError, match='colum'):
    corpora.text('*.txt', colum='a')
  write_texts(tmp_path)
  late = corpora.text('**/*.txt')
  assert late.fingerprint == corpora.text(f'{tmp_path}/**/*.txt').fingerprint and late.license == 'unknown'
  assert dataclasses.replace(late.opened, fingerprint='other').splits is late.splits


def test_splits_are_disjoint_and_do_not_move(tmp_path):
  source = corpora.text(write_texts(tmp_path, DOCUMENTS * 2), validation=0.25)
  train, held_out = map(set, source.splits.values())
  assert not train & held_out and train | held_out == set(DOCUMENTS)
  assert 0.25 * 200 - 3 * 6.1 < len(held_out) < 0.25 * 200 + 3 * 6.1  # binomial, three standard deviations
  longer = corpora.text(write_texts(tmp_path, DOCUMENTS + [f'new {i}' for i in range(300)]), validation=0.25)
  assert held_out <= set(longer.splits['validation']) and train <= set(longer.splits['train'])
  assert list(corpora.text(f'{tmp_path}/**/*.txt', validation=0).splits) == ['train']


def test_a_sequence_is_indexed_as_a_list(tmp_path):
  documents = corpora.text(write_texts(tmp_path)).splits['train']
  listed = list(documents)
  assert documents[-1] == listed[-1] and documents[3:9:2] == listed[3:9:2] and documents[np.int64(5)] == listed[5]
  with pytest.raises(IndexError):
    documents[len(documents)]


@pytest.mark.parametrize('errors, counted, documents', [
    ('replace', 'invalid UTF-8 repaired', ['bad \ufffd byte', 'good', 'good too']),
    ('drop', 'invalid UTF-8 dropped', ['good', 'good too'])])
def test_invalid_utf8_is_refused_replaced_or_dropped(tmp_path, errors, counted, documents):
  pattern = write_texts(tmp_path, [b'good', b'bad \xff byte', b'good too'])
  source = corpora.text(pattern, validation=0, encoding_errors=errors)
  assert everything(source) == documents and everything(source) == documents  # counted once, not at each reading
  assert source.counts == {counted: 1}
  with pytest.raises(ValueError, match=r'1\.txt: byte 4 is not UTF-8'):
    list(corpora.text(pattern, validation=0).splits['train'])


def test_a_separator_cuts_files_into_documents(tmp_path):
  (tmp_path / 'plays.txt').write_bytes(b'one\r\ntwo\r\n\r\nthree\n\n\n\nfour')
  source = corpora.text(str(tmp_path / 'plays.txt'), validation=0, separator='\n\n')
  assert list(source.splits['train']) == ['one\ntwo', 'three', 'four'] and source.name == 'plays'


def test_an_empty_split_is_an_error(tmp_path):
  (tmp_path / 'one.jsonl').write_text('{"prompt": "a", "completion": "b"}\n')   # one record cannot be cut
  for split in ('train', 'validation'):
    with pytest.raises(ValueError, match=r'none of 1 records fell into the validation split .* \(--validation\)'):
      len(corpora.jsonl(str(tmp_path / 'one.jsonl'), None).splits[split])
  (tmp_path / 'blank.txt').write_text(' \n')
  with pytest.raises(ValueError, match='^blank: there is no document in it; give files that hold some text$'):
    len(corpora.text(str(tmp_path / 'blank.txt')).splits['train'])
  (tmp_path / 'bad.txt').write_bytes(b'\xff')
  with pytest.raises(ValueError, match=r'^bad: there is no document in it \(1 invalid UTF-8 dropped\); give'):
    len(corpora.text(str(tmp_path / 'bad.txt'), encoding_errors='drop').splits['train'])
  with pytest.raises(ValueError, match='validation=1.5 is not a fraction'):
    _ = corpora.text(str(tmp_path / 'bad.txt'), validation=1.5).splits


@pytest.mark.parametrize('make', [corpora.text, corpora.jsonl, corpora.parquet])
def test_a_pattern_that_matches_no_file_is_refused(make, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no file matches '.*nonesuch\*'"):
    _ = make(str(tmp_path / 'nonesuch*')).fingerprint


def test_jsonl_packed_or_plain_is_the_same(tmp_path):
  plain = corpora.jsonl(write_jsonl(tmp_path / 'a.jsonl'))
  data = (tmp_path / 'a.jsonl').read_bytes()
  (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(data[:999]) + gzip.compress(data[999:]))
  frame = zstandard.ZstdCompressor().compress
  (tmp_path / 'b.jsonl.zst').write_bytes(frame(data[:999]) + frame(data[999:]))
  for suffix in ('gz', 'zst'):
    packed = corpora.jsonl(str(tmp_path / f'b.jsonl.{suffix}'))
    assert {k: list(v) for k, v in packed.splits.items()} == {k: list(v) for k, v in plain.splits.items()}
  assert everything(plain) == sorted(DOCUMENTS)


@pytest.mark.parametrize('lines, message', [
    ('{"text": "a"}\n\n{"txt": "b"}', r":3: no string under key='text'; the line has keys txt"),
    ('{"text": "a"}\n{"text": 7}', r":2: no string under key='text'"), ('{"text": "a"}\n[1]', ':2: .* has list'),
    ('{"text": "a"', ':1: not JSON')])
def test_jsonl_errors_name_file_and_line(tmp_path, lines, message):
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
  with pytest.raises(ValueError, match=r'a\.jsonl\.gz' + message):
    len(corpora.jsonl(str(tmp_path / 'a.jsonl.gz')).splits['train'])


@pytest.mark.parametrize('suffix', ['gz', 'zst'])
def test_a_broken_archive_is_named(tmp_path, suffix):
  lines = b'{"text": "a line"}\n' * 100
  whole = gzip.compress(lines) if suffix == 'gz' else zstandard.compress(lines)
  for broken in (b'no archive at all', whole[:-4], whole + whole[:-4]):
    (tmp_path / f'a.{suffix}').write_bytes(broken)
    with pytest.raises(OSError, match=f'a.{suffix}: cannot be unpacked'):
      len(corpora.jsonl(str(tmp_path / f'a.{suffix}')).splits['train'])


def test_parquet(tmp_path):
  rows = [*DOCUMENTS[:150], None, *DOCUMENTS[150:]]
  pq.write_table(pa.table({'body': rows, 'n': range(len(rows))}), tmp_path / 'a.parquet', row_group_size=40)
  source = corpora.parquet(f'{tmp_path}/*.parquet', column='body')
  assert everything(source) == sorted(DOCUMENTS) and source.counts['null dropped'] == 1
  assert source.splits['train'][::-1] == list(source.splits['train'])[::-1]
  with pytest.raises(ValueError, match=r"a\.parquet: no column='text'; it has body, n"):
    _ = corpora.parquet(f'{tmp_path}/*.parquet').splits
  with pytest.raises(ValueError, match="column='n' holds int64, not strings"):
    len(corpora.parquet(f'{tmp_path}/*.parquet', column='n').splits['train'])


def test_fingerprint_follows_content_and_options_not_the_folder(tmp_path, monkeypatch):
  (tmp_path / 'one').mkdir()
  write_texts(tmp_path / 'one')
  make = lambda folder, **options: corpora.text(f'{tmp_path / folder}/**/*.txt', **options).fingerprint
  first = make('one')
  shutil.copytree(tmp_path / 'one', tmp_path / 'two')
  assert make('two') == first
  options = [{}, {'validation': 0.1}, {'separator': '\n'}, {'encoding_errors': 'drop'}]
  assert len({make('one', **o) for o in options}) == 4
  path = tmp_path / 'two' / '0' / '3.txt'
  path.write_text(path.read_text().replace('3', '4'))  # the size stays the same
  assert make('two') != first
  monkeypatch.setattr('lm.data.text.source_files._WHOLE', 10)
  monkeypatch.setattr('lm.data.text.source_files._END', 4)
  beginning = make('one')
  path = tmp_path / 'one' / '0' / '3.txt'
  path.write_text(path.read_text()[:-1] + '。')  # only the end differs
  assert make('one') != beginning


def test_a_sample_draws_from_train_alone_and_a_larger_one_contains_a_smaller():
  both = Source('both', {'train': [f'a{i}' for i in range(100)], 'validation': ['b0', 'b1']}, 'print')
  few, larger = (sample(both, n) for n in (10, 30))
  drawn = list(few.splits['train'])
  assert len(set(drawn)) == 10 and set(drawn) < set(larger.splits['train']) < set(both.splits['train'])
  assert drawn != sorted(drawn) and list(few.splits['validation']) == ['b0', 'b1']
  assert len({few.fingerprint, larger.fingerprint, both.fingerprint, sample(both, 10).fingerprint}) == 3
  assert few.notes == ['train: drew 10 of 100 documents of both']
  for n in (0, 101):
    with pytest.raises(ValueError, match=f'{n} documents cannot be drawn from the 100 of both'):
      len(sample(both, n).splits['train'])


@pytest.fixture(scope='module')
def builder():
  import tfds_builder
  return tfds_builder


def test_tfds(tmp_path, builder, capsys):
  pattern, data_dir = write_texts(tmp_path / 'texts'), str(tmp_path / 'tfds')
  signature.call(builder.build, text=pattern, data_dir=data_dir)
  original = corpora.text(pattern)
  source = corpora.tfds('local_text', data_dir=data_dir)
  assert {k: sorted(v) for k, v in source.splits.items()} == {k: sorted(v) for k, v in original.splits.items()}
  assert f"train: {len(original.splits['train'])} documents" in capsys.readouterr().out
  shutil.copytree(data_dir, tmp_path / 'moved')
  assert corpora.tfds('local_text', data_dir=str(tmp_path / 'moved')).fingerprint == source.fingerprint
  with pytest.raises(ValueError, match="no feature key='body'; it has text"):
    _ = corpora.tfds('local_text', key='body', data_dir=data_dir).splits
  with pytest.raises(ValueError, match="^tfds: no data set 'nonesuch_text' in data_dir=[^\n]*$"):
    _ = corpora.tfds('nonesuch_text', data_dir=data_dir).splits


def test_tfds_by_folder(tmp_path, builder, monkeypatch):
  signature.call(builder.build, text=write_texts(tmp_path / 'texts'), data_dir=tmp_path / 'tfds')
  expected = corpora.tfds('local_text', data_dir=str(tmp_path / 'tfds'))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  for folder in ('tfds/local_text/1.0.0', 'tfds/local_text', '~/tfds', str(tmp_path / 'tfds')):
    source = corpora.tfds(folder)
    assert (source.name, source.fingerprint) == ('local_text', expected.fingerprint)
    assert list(source.splits['train']) == list(expected.splits['train'])
  shutil.copytree('tfds/local_text/1.0.0', 'tfds/local_text/1.0.1')
  for name, message in (
      ('tfds', 'holds several data sets, give one of tfds/local_text/1.0.0, tfds/local_text/1.0.1'),
      ('./nowhere', 'no prepared data set is in this folder'),
      ('a/b/c/d', 'Parsing builder name string a/b/c/d failed'),
      ('nowhere', f"no data set 'nowhere' in data_dir={tmp_path}/elsewhere nor .* folder {tmp_path}/nowhere; give")):
    with pytest.raises(ValueError, match=f'^tfds: [^\n]*{message}[^\n]*$'):
      _ = corpora.tfds(name, data_dir='~/elsewhere').fingerprint


def test_building_again_from_other_files_is_refused(tmp_path, builder, capsys):
  one, two = write_texts(tmp_path / 'one'), write_texts(tmp_path / 'two', DOCUMENTS[:100])
  for _ in range(2):
    signature.call(builder.build, text=one, data_dir=tmp_path / 'tfds')
  with pytest.raises(ValueError, match=f'^{tmp_path}/tfds/local_text/1.0.0 was made from other files .* delete it'):
    signature.call(builder.build, text=two, data_dir=tmp_path / 'tfds')
  shutil.rmtree(tmp_path / 'tfds')
  signature.call(builder.build, text=two, data_dir=tmp_path / 'tfds')
  assert len(everything(corpora.tfds(str(tmp_path / 'tfds')))) == 100
  (tmp_path / 'alone.txt').write_text('a')
  for pattern in ('none*', 'alone.txt'):
    with pytest.raises((ValueError, FileNotFoundError)):
      signature.call(builder.build, text=str(tmp_path / pattern), data_dir=tmp_path / 'new' / 'tfds')
  assert not (tmp_path / 'new').exists()


def test_a_name_that_exists_is_that_file_and_patterns_come_after(tmp_path):
  for name in ('data[1].txt', 'data1.txt', 'data2.txt'):
    (tmp_path / name).write_text(name)
  assert names_matching(tmp_path, 'data[1].txt') == ['data[1].txt']
  assert names_matching(tmp_path, 'data[12].txt') == ['data1.txt', 'data2.txt']


def test_a_file_is_read_once_whatever_links_lead_to_it(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'one.txt').write_text('one')
  (tmp_path / 'a' / 'loop').symlink_to(tmp_path / 'a', target_is_directory=True)
  (tmp_path / 'b.txt').symlink_to(tmp_path / 'a' / 'one.txt')
  (tmp_path / 'c.txt').write_text('one')   # another file with the same text
  assert names_matching(tmp_path, '**/*.txt') == ['b.txt', 'c.txt']


def names_matching(folder, pattern):
  return [path.relative_to(folder).as_posix() for path in source_files.matching(f'{folder}/{pattern}')]
