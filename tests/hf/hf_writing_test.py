"""Weights are written one tensor at a time, and a folder appears whole or not at all."""
import functools
import os
import resource
import weakref

import numpy as np
import pytest
from helpers.safetensors_files import INDEX, SINGLE, array, example, put, same, write

from lm.hf import files


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
  alive = []

  def give():
    assert not any(reference() is not None for reference in alive)
    x = np.zeros((100, 3))
    alive.append(weakref.ref(x))
    return x
  for size in (1, 10**9):
    files.write(tmp_path / str(size), ((f'{i}', ((100, 3), np.float64, give)) for i in range(5)), max_shard_bytes=size)
  assert len(alive) == 10


def paths_in(folder):
  return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


@pytest.mark.parametrize('error', [OSError('no'), ValueError('no'), KeyboardInterrupt('no')])
def test_a_write_that_fails_leaves_nothing(tmp_path, error):
  def fail():
    assert len(paths_in(tmp_path)) > 1  # the unfinished folder lies beside the target
    assert not (tmp_path / 'deep/folder').exists()
    raise error
  tensors = {'a': ((2,), np.float32, lambda: np.zeros(2, np.float32)), 'b': ((2,), np.float32, fail)}
  for size in (1, 100):
    with pytest.raises(type(error), match='no'):
      files.write(tmp_path / 'deep/folder', tensors, max_shard_bytes=size)
    assert not paths_in(tmp_path)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(OSError, match='cannot write the weights: File too large; free space or choose') as error:
      write(tmp_path / 'a', {'x': np.zeros(1000)})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert error.value.filename == str(tmp_path / 'a') and not paths_in(tmp_path)


def test_tensors_that_cannot_be_written_are_refused_by_name(tmp_path):
  def give():
    return np.zeros((2, 3), np.float32)
  for shape, dtype, match in (((3, 2), np.float32, r"'x' is float32\[2, 3\], and not float32\[3, 2\] as declared"),
                              ((2, 3), np.float16, r"'x' is float32\[2, 3\], and not float16\[2, 3\] as declared"),
                              ((2, 3), np.complex64, "'x': dtype complex64 has no name in safetensors: cast")):
    with pytest.raises(ValueError, match=match):
      files.write(tmp_path / 'a', {'x': (shape, dtype, give)})
  for names in ('xx', ['__metadata__']):
    with pytest.raises(ValueError, match=f'cannot be named {names[-1]!r}, that name is taken: rename it'):
      files.write(tmp_path / 'a', [(name, ((2, 3), np.float32, give)) for name in names], max_shard_bytes=1)
  assert not paths_in(tmp_path)


def test_folders_that_are_not_empty_are_refused_and_unchanged(tmp_path):
  put(tmp_path / 'a', other=b'mine')
  (tmp_path / 'file').touch()
  before = paths_in(tmp_path)
  for name, match in (('a', "not an empty folder but .*other.safetensors.*: choose"), ('file', "but 'a file': choose")):
    with pytest.raises(ValueError, match=match):
      write(tmp_path / name, {'x': array((2,))})
  assert paths_in(tmp_path) == before and (tmp_path / 'a/other.safetensors').read_bytes() == b'mine'


def test_a_folder_appears_when_all_its_files_are_written(tmp_path):
  path, target = tmp_path / 'link', tmp_path / 'empty'
  target.mkdir()
  path.symlink_to(target)
  for fails in (True, False):
    try:
      with files.new_folder(path) as folder:
        write(folder, {'x': array((2,)), 'y': array((2,))}, max_shard_bytes=1)
        (folder / 'config.json').write_text('{}')
        assert not paths_in(target)
        assert not fails, 'stop'
    except AssertionError as error:
      assert fails and str(error).startswith('stop')
      assert paths_in(tmp_path) == ['empty', 'link']
  assert sorted(os.listdir(path)) == ['config.json', *(f'model-0000{i}-of-00002.safetensors' for i in (1, 2)), INDEX]
  assert sorted(os.listdir(tmp_path)) == ['empty', 'link']
  os.mkdir(tmp_path / 'plain')
  assert target.stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_a_folder_filled_meanwhile_is_unchanged(tmp_path):
  with pytest.raises(OSError, match='not empty'), files.new_folder(tmp_path / 'a') as folder:
    (folder / 'ours').touch()
    put(tmp_path / 'a', theirs=b'1')
  assert paths_in(tmp_path) == ['a', 'a/theirs.safetensors']


def test_weights_pass_through_unchanged(tmp_path):
  write(tmp_path / 'a', example(), max_shard_bytes=64)
  with files.Weights(tmp_path / 'a') as weights:
    files.write(tmp_path / 'b', {name: (info.shape, info.dtype, functools.partial(weights.__getitem__, name))
                                 for name, info in weights.info.items()}, max_shard_bytes=10**6)
  with files.Weights(tmp_path / 'b') as weights:
    same(weights, example())
  assert os.listdir(tmp_path / 'b') == [SINGLE]
