"""Bytes that are not UTF-8, and JSON that is nested too deep, are errors with their place in every kind of file."""
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.data import tokenizers
from lm.data.batch import Dialogue, Pair, Rated
from lm.data.chat import messages, templates
from lm.data.text import corpora
from lm.hf import weights
from lm.workdir import parsing

TEXTS = [b'good', b'caf\xe9', b'fine', b'\xff', b'good too']
DEEP = '[' * 10**5 + ']' * 10**5


def write_jsonl(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b''.join(b'{"text": "' + text + b'"}\n' for text in TEXTS))
  return lambda **options: corpora.jsonl(str(tmp_path / 'a.jsonl'), validation=0, **options)


def write_parquet(tmp_path, texts=TEXTS):
  """Two row groups; pyarrow writes bytes that are called strings as they are."""
  offsets = np.cumsum([0, *map(len, texts)]).astype(np.int32)
  strings = pa.Array.from_buffers(pa.string(), len(texts), [None, pa.py_buffer(offsets), pa.py_buffer(b''.join(texts))])
  pq.write_table(pa.table({'text': strings}), tmp_path / 'a.parquet', row_group_size=2)
  return lambda **options: corpora.parquet(str(tmp_path / 'a.parquet'), validation=0, **options)


def write_tfds(tmp_path):
  import tfds_builder

  from lm.data.text.source import Source
  source = Source('toy', {'train': TEXTS, 'validation': [b'held out', b'\xff\xfe']}, 'abc')
  tfds_builder.LocalText(source=source, data_dir=tmp_path, file_format='array_record').download_and_prepare()
  return lambda **options: corpora.tfds('local_text', data_dir=str(tmp_path), **options)


@pytest.mark.parametrize('write, place', [
    (write_jsonl, r'a\.jsonl:2: byte 13 is not'), (write_parquet, r'a\.parquet: row 1: byte 3 is not'),
    (write_tfds, r'local_text, split train, row \d: byte [03] is not')])   # TFDS shuffles the rows
def test_bytes_that_are_not_utf8_are_refused_by_place_repaired_or_left_out(tmp_path, write, place):
  make = write(tmp_path)
  with pytest.raises(ValueError, match=place):
    list(make().splits['train'])
  with pytest.raises(ValueError, match="encoding_errors='ignore' is none of"):
    _ = make(encoding_errors='ignore').splits
  ordered = lambda source: sorted(source.splits['train'])
  repaired, dropped = make(encoding_errors='replace'), make(encoding_errors='drop')
  assert ordered(repaired) == sorted(text.decode(errors='replace') for text in TEXTS)
  assert ordered(dropped) == ['fine', 'good', 'good too'] == ordered(dropped)
  assert len(dropped.splits['train']) == 3 and dropped.splits['train'][-1] in ordered(dropped)
  assert (+repaired.counts, +dropped.counts) == ({'invalid UTF-8 repaired': 2}, {'invalid UTF-8 dropped': 2})
  assert len({make().fingerprint, repaired.fingerprint, dropped.fingerprint}) == 3


def test_rows_of_parquet_are_counted_through_the_file(tmp_path):
  make = write_parquet(tmp_path, [b'good', b'fine', b'a', b'b', b'\xff'])
  with pytest.raises(ValueError, match=r'a\.parquet: row 4: byte 0'):
    list(make().splits['train'])


def test_for_valid_text_the_setting_changes_no_document(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "gr\u00fcn \\u00fc"}\n{"text": "\u4e16"}\n')
  strings = pa.array(['gr\u00fcn', None, '\u4e16'])
  for i, column in enumerate((strings, strings.dictionary_encode(), strings.cast(pa.large_string()))):
    pq.write_table(pa.table({'text': column}), tmp_path / f'{i}.parquet')
  for make in (corpora.jsonl, corpora.parquet):
    pattern = str(tmp_path / f'*.{make.__name__}')
    documents = [list(make(pattern, validation=0, encoding_errors=errors).splits['train'])
                 for errors in ('strict', 'replace', 'drop')]
    assert documents[0] == documents[1] == documents[2] and documents[0][-1] == '\u4e16'


def test_records_are_repaired_or_left_out_as_texts_are(tmp_path):
  make = write_jsonl(tmp_path)
  assert list(make(key=None, encoding_errors='replace').splits['train'])[1] == '{"text": "caf\ufffd"}'
  assert len(make(key=None, encoding_errors='drop').splits['train']) == 3


def test_json_that_is_nested_too_deep_is_an_error_with_its_place(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"x": ' + DEEP + ', "text": "a"}\n')
  for key in ('text', None):
    with pytest.raises(ValueError, match=r'a\.jsonl:2: not JSON: its brackets are nested too deep'):
      list(corpora.jsonl(str(tmp_path / 'a.jsonl'), key=key, validation=0).splits['train'])
  for kind in (Dialogue, Pair, Rated):
    with pytest.raises(ValueError, match=r'nested too deep.*; in the record {"prompt": \[\[\['):
      messages.read('{"prompt": ' + DEEP + '}', kind)
  with pytest.raises(ValueError, match='nested too deep'):
    parsing.json_value(DEEP.replace('[', '{"a":').replace(']', '}'))


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer_config.json', 'added_tokens.json', 'config.json',
                                  'generation_config.json', 'special_tokens_map.json', 'vocab.json'])
def test_a_file_of_a_model_that_is_nested_too_deep_is_named(tmp_path, name):
  from tokenizers import Tokenizer, models
  if name == 'vocab.json':
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
  else:
    words = Tokenizer(models.WordLevel({'a': 0, '<s>': 1}, unk_token='a'))
    words.add_special_tokens(['<s>'])
    words.save(str(tmp_path / 'tokenizer.json'))
    assert tokenizers.load(tmp_path).bos_id == 1
  (tmp_path / name).write_text('{"model": ' + DEEP + '}')
  with pytest.raises(ValueError, match=rf'{name}\b.*(nested too deep|recursion limit exceeded)'):
    tokenizers.load(tmp_path)


def test_config_and_template_that_are_nested_too_deep_are_named(tmp_path):
  for name, open_it in (('config.json', lambda: parsing.read_object(tmp_path / 'config.json')),
                        ('config.json', lambda: weights.open_model(tmp_path)),
                        ('tokenizer_config.json', lambda: templates.load(tmp_path))):
    (tmp_path / name).write_text(json.dumps({'a': 1})[:-1] + ', "b": ' + DEEP + '}')
    with pytest.raises(ValueError, match=rf'{name}.*nested too deep'):
      open_it()


def test_half_of_a_surrogate_pair_is_not_text(tmp_path):
  """JSON spells it with an escape. A whole pair, and the letters of an escape, are text."""
  lines = [r'{"text": "a \ud83d\ude00 \\ud800"}', r'{"text": "b \uD800!"}', r'{"text": "c", "more": ["\udfff"]}']
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  read = lambda key, errors: corpora.jsonl(str(tmp_path / 'a.jsonl'), key, 0, errors)
  good = 'a \U0001f600 \\ud800'
  for errors, texts, records in (
      ('strict', [good, 'b \ud800!', 'c'], None),   # cleaning repairs it later
      ('replace', [good, 'b \ufffd!', 'c'], [lines[0], '{"text": "b \ufffd!"}', '{"text": "c", "more": ["\ufffd"]}']),
      ('drop', [good, 'c'], lines[:1])):
    assert list(read('text', errors).splits['train']) == texts
    source = read(None, errors)
    if records is None:
      with pytest.raises(ValueError, match=r"a\.jsonl:2: '\\ud800' is half of a surrogate pair.*--encoding_errors"):
        list(source.splits['train'])
    else:
      assert list(source.splits['train']) == records and sum(source.counts.values()) == 2
