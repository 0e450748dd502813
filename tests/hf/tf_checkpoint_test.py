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
