"""Variables of a checkpoint that TensorFlow wrote are read; damaged files are refused by name.

The fixture has 42 variables of a SavedModel: random numbers, drawn by NumPy from seed 0 in the order of `SHAPES`.
"""
import pathlib
import shutil

import numpy as np
import pytest

from lm.hf import tf_checkpoint

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'bleurt_tensorflow' / 'variables'


@pytest.fixture
def copied(tmp_path):
  shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
  return tmp_path


def test_variables_are_those_that_tensorflow_wrote():
  rng = np.random.default_rng(0)
  first = {f'bert/embeddings/{name}': rng.normal(size=shape).astype('f4') for name, shape in (
      ('word_embeddings', (32, 8)), ('token_type_embeddings', (2, 8)), ('position_embeddings', (24, 8)),
      ('LayerNorm/beta', (8,)), ('LayerNorm/gamma', (8,)))}
  with tf_checkpoint.Variables(FOLDER / 'variables') as variables:
    assert len(variables) == 42 and variables['global_step'] == 7
    assert variables['dense/kernel'].shape == (8, 1) and variables['dense/kernel'].dtype == np.float32
    for name, expected in first.items():
      np.testing.assert_array_equal(variables[name], expected)


def test_the_checksum_is_that_of_the_standard():
  assert tf_checkpoint.crc32c(b'123456789') == 0xE3069283   # RFC 3720, and the catalogue of CRCs


def test_damaged_files_are_refused(copied):
  index, data = copied / 'variables.index', copied / 'variables.data-00000-of-00001'
  good = index.read_bytes()
  refusals = {good[:-1]: 'was cut off', good[:40] + b'?' + good[41:]: 'the checksum of a block differs',
              b'': 'is not the index of a TensorFlow checkpoint'}
  for content, message in refusals.items():
    index.write_bytes(content)
    with pytest.raises(ValueError, match=f'variables.index .*{message}'):
      tf_checkpoint.Variables(copied / 'variables')
  index.write_bytes(good)
  data.write_bytes(data.read_bytes()[:-1])
  with pytest.raises(ValueError, match='lie beyond the end of its data file'):
    tf_checkpoint.Variables(copied / 'variables')
  data.unlink()
  with pytest.raises(FileNotFoundError, match='data-00000-of-00001 is missing'):
    tf_checkpoint.Variables(copied / 'variables')
  with pytest.raises(FileNotFoundError, match='no.index is missing'):
    tf_checkpoint.Variables(copied / 'no')


def varint(number):
  return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def index_of(entries):
  """Returns an index with the checksums of what it holds: `entries` are lists of (shared, key, value)."""
  result, handles = b'', b''
  for block in entries, None:
    block = block or [(0, b'z', handles)]
    body = b''.join(varint(shared) + varint(len(key)) + varint(len(value)) + key + value
                    for shared, key, value in block) + bytes(4) + bytes([1, 0, 0, 0])
    handles = varint(len(result)) + varint(len(body))
    result += body + b'\0' + tf_checkpoint._masked(tf_checkpoint.crc32c(body + b'\0')).to_bytes(4, 'little')
  return result + (bytes(2) + handles).ljust(40, b'\0') + tf_checkpoint._MAGIC


def test_an_index_that_was_made_to_be_wrong_is_refused(copied):
  header, index = (0, b'', b'\x08\x01'), copied / 'variables.index'
  index.write_bytes(index_of([header, (0, b'x', b'\x08\x01\x12\x04\x12\x02\x08\x01\x28\x04')]))
  assert tf_checkpoint.Variables(copied / 'variables')['x'].shape == (1,)
  for entries, message in (
      ([(0, b'', b'\x08')], 'a field is cut off'), ([(0, b'', b'\x0a\x01a')], 'no header'),
      ([header, (0, b'x', b'\x08\x01\x20')], 'a field is cut off'),
      ([header, (0, b'x', b'\x08\x01\x12\x7f')], 'a field is cut off'),
      ([header, (0, b'x', b'\x08\x01\x12\x00\x2a\x01a')], '0 bytes for shape'),
      ([header, (0, b'x', b'\x08\x01\x18' + varint(2 ** 64 - 1) + b'\x28\x04')], 'beyond the end'),
      ([header, (0, b'x' * 4000, b''), *[(4000, b'y' * 100, b'')] * 2], 'a name has 4100 bytes')):
    index.write_bytes(index_of(entries))
    with pytest.raises(ValueError, match=message):
      tf_checkpoint.Variables(copied / 'variables')
