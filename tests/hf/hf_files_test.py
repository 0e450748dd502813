"""Weight folders equal the library's bytes both ways, damaged ones are refused, and only what is used is read."""
import json
import mmap
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.safetensors_files import INDEX, SINGLE, array, example, put, raw, same, tensor, write

from lm.hf import files


def refused(folder, match):
  with pytest.raises(ValueError, match=match) as error:
    files.Weights(folder)
  assert '\n' not in str(error.value) and len(str(error.value)) < 1000
  assert not mmap_count(folder)
  return str(error.value)


def mmap_count(folder):
  return pathlib.Path('/proc/self/maps').read_text().count(str(folder)) if os.path.exists('/proc/self/maps') else 0


@pytest.mark.parametrize('max_shard_bytes, count', [(10**9, 1), (100, 13), (1, 19)])
def test_what_is_written_is_read_back_in_any_number_of_shards(tmp_path, max_shard_bytes, count):
  folder, tensors = tmp_path / 'new' / 'folder', example()
  write(folder, tensors, max_shard_bytes=max_shard_bytes)
  names = sorted(p.name for p in folder.iterdir())
  with files.Weights(folder) as weights:
    same(weights, tensors)
    for name, info in weights.info.items():
      assert (info.shape, info.dtype) == (tensors[name].shape, tensors[name].dtype)
      assert info.start % info.dtype.itemsize == 0 and weights[name].flags.aligned
    assert len({info.file for info in weights.info.values()}) == len(names) - (len(names) > 1)
    with pytest.raises(KeyError):
      weights['absent']
  if max_shard_bytes == 10**9:
    assert names == [SINGLE]
  else:
    shards = [name for name in names if name != INDEX]
    assert shards == [f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
    index = json.loads((folder / INDEX).read_text())
    assert index['metadata']['total_size'] == sum(x.nbytes for x in tensors.values())
    assert list(index['weight_map']) == sorted(tensors)  # sorted as transformers writes it
    for shard in shards:
      inside = [tensors[name].nbytes for name, file in index['weight_map'].items() if file == shard]
      assert sum(inside) <= max_shard_bytes or sum(size > 0 for size in inside) == 1


def test_files_are_the_bytes_that_the_library_writes(tmp_path):
  library = pytest.importorskip('safetensors.numpy')
  tensors = {name: np.asarray(x) for name, x in example().items()}
  for contents in (tensors, {}, {'a': tensors['scalar']}):
    folder = write(tmp_path / str(len(contents)), contents)
    assert (folder / SINGLE).read_bytes() == library.save(contents, {'format': 'pt'})


def test_files_of_the_library_are_read_and_ours_are_read_by_it(tmp_path):
  library = pytest.importorskip('safetensors')
  numpy = pytest.importorskip('safetensors.numpy')
  tensors = {name: np.asarray(x) for name, x in example().items()}
  tmp_path.joinpath(SINGLE).write_bytes(numpy.save(tensors))
  with files.Weights(tmp_path) as weights:
    same(weights, tensors)
  ours = dict(library.deserialize((write(tmp_path / 'ours', tensors) / SINGLE).read_bytes()))
  assert {name: (tuple(x['shape']), bytes(x['data'])) for name, x in ours.items()} == {
      name: (x.shape, x.tobytes()) for name, x in tensors.items()}


def test_bfloat16_is_written_from_jax_and_read_by_it(tmp_path):
  x = jnp.linspace(-3, 3, 24, dtype=jnp.bfloat16).reshape(4, 6)
  files.write(tmp_path / 'a', {'x': (x.shape, x.dtype, lambda: x), 'x.T': ((6, 4), jnp.bfloat16, lambda: x.T),
                               'view': ((6, 4), jnp.bfloat16, lambda: np.asarray(x).T),
                               'column': ((4,), jnp.bfloat16, lambda: np.asarray(x)[:, 1])})
  with files.Weights(tmp_path / 'a') as weights:
    assert jnp.array_equal(jnp.array(weights['x']), x) and weights['x'].dtype == jnp.bfloat16
    assert jnp.array_equal(jnp.array(weights['x.T']), x.T) and jnp.array_equal(jnp.array(weights['view']), x.T)
    assert jnp.array_equal(jnp.array(weights['column']), x[:, 1])


def test_data_that_are_not_aligned_are_read(tmp_path):
  x = array((5,), jnp.bfloat16)
  put(tmp_path, model=raw(b'{"x":{"dtype":"BF16","shape":[5],"data_offsets":[0,10]}}'.ljust(57), x.tobytes()))
  with files.Weights(tmp_path) as weights:
    assert weights.info['x'].start % 2 == 1
    same(weights, {'x': x})


def resident():
  with open('/proc/self/statm') as f:
    return int(f.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='memory is read from /proc')
def test_only_touched_pages_are_read_and_they_are_released(tmp_path):
  rows, width = 1 << 20, 1 << 14
  put(tmp_path, model=raw({'big': tensor((rows, width))}))
  os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size + rows * width)  # a sparse file of 16 GB
  with files.Weights(tmp_path) as weights:
    before = resident()
    column = weights['big'].T[::-1, 5:rows:rows // 8]
    assert column.shape == (width, 8) and column.base is not None and column.sum() == 0
    assert resident() - before < 8 << 20
    part = weights['big'][:4096]
    assert not part.any()
    assert resident() - before > 60 << 20
    weights.release()
    assert resident() - before < 8 << 20
    assert not part[:10].any()  # still valid


def test_views_are_read_only_and_outlive_the_folder(tmp_path):
  write(tmp_path / 'a', {'x': array((3, 4)), 'y': array((2,))}, max_shard_bytes=1)
  with files.Weights(tmp_path / 'a') as weights:
    x = weights['x']
    with pytest.raises(ValueError, match='read-only'):
      x[0, 0] = 1
    with pytest.raises(ValueError, match='WRITEABLE'):
      x.flags.writeable = True
    row = x.T[1]
    del x
    assert mmap_count(tmp_path) in (0, 2)
  assert mmap_count(tmp_path) in (0, 1)
  np.testing.assert_array_equal(row, array((3, 4))[:, 1])
  del row
  assert not mmap_count(tmp_path)
  with pytest.raises(ValueError, match=f"{tmp_path}/a is closed: read tensor 'x' before"):
    weights['x']


@pytest.mark.parametrize('content, match', [
    (b'', 'it is empty or not a file'),
    (bytes(7), 'truncated or not safetensors: a header of 0 bytes .* in a file of 7'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'run `git lfs pull`'),
    (b'\xff' * 8, 'a header of 18,446,744,073,709,551,615 bytes .* in a file of 8'),
    ((100).to_bytes(8, 'little') + b'{}', 'a header of 100 bytes .* in a file of 10'),
    (raw(b'\xff{}'), 'JSON cannot be read .*utf-8'), (raw(b'{"a":'), 'JSON cannot be read'),
    (raw([1]), 'not an object'),
    (raw(b'[' * 100_000), 'JSON cannot be read .*recursion'), (raw(b'9' * 5000), 'JSON cannot be read'),
    (raw(b'{"a":{},"a":{}}'), "'a' is there twice"),
    (raw(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' is there twice"),
    (raw(b'{"\\ud800":{}}'), 'surrogates not allowed'), (raw({'__metadata__': {'a': 1}}), '__metadata__ .*1'),
    *((raw({'__metadata__': value}), '__metadata__ .* is not text by name') for value in (0, [], None, 'a')),
    (raw({'a': 3}), "tensor 'a': dtype False is none of U64"),
    (raw({'a': tensor(dtype='F4')}), "tensor 'a': dtype 'F4' is"),
    (raw({'a': tensor(dtype=['U8'])}), 'dtype .*U8.* is none'),
    (raw({'a': {**tensor(), 'shape': 2}}), 'shape 2 is not'),
    *((raw({'a': {**tensor(), 'shape': shape}}), 'shape .* is not that of an array') for shape in (
        [-2], [True, 2], [2.0], ['2'], [[2]], [1] * 65, [2**64], [0, 2**63], [2**40, 0, 2**40], [10**4000] * 64, None)),
    *((raw({'a': {**tensor(), 'data_offsets': span}}, b'12'), 'data_offsets .* are not a begin and') for span in (
        [2, 0], [-1, 1], [0], [0, 1, 2], [0.0, 2.0], 'ab', None, [False, 2])),
    (raw({'a': tensor()}, b'1'), r"tensor 'a': data_offsets \[0, 2\] are beyond the 1 bytes of data: the"),
    (raw({'a': {**tensor(), 'data_offsets': [0, 10**1000]}}, b'12'), 'are beyond the 2 bytes'),
    (raw({'a': {**tensor(), 'data_offsets': [0, 1]}}, b'12'), r'\[0, 1\] do not fit the 2 bytes of U8 \[2\]'),
    (raw({'a': tensor(), 'b': tensor(begin=1)}, b'123'), "tensor 'b' begins at byte 1 .* before it end at 2"),
    (raw({'a': tensor(), 'b': tensor((0,), 1)}, b'12'), "'b' begins at byte 1 .* before it end at 2"),
    (raw({'a': tensor(), 'b': tensor(begin=3)}, b'12345'), "tensor 'b' begins at byte 3 .* before it end at 2"),
    (raw({'a': tensor(begin=1)}, b'123'), "tensor 'a' begins at byte 1 .* before it end at 0"),
    (raw({'a': tensor()}, b'123'), 'end of the file begins at byte 3 .* before it end at 2'),
    (raw({}, b'123'), 'end of the file begins at byte 3 .* end at 0')])
def test_damaged_files_are_refused(tmp_path, content, match):
  put(tmp_path, model=content)
  assert f'{tmp_path}/{SINGLE}' in refused(tmp_path, match)


def test_a_header_of_more_than_100_MB_is_refused(tmp_path):
  put(tmp_path, model=(100_000_001).to_bytes(8, 'little'))
  os.truncate(tmp_path / SINGLE, 1 << 30)
  refused(tmp_path, r'a header of 100,000,001 bytes \(at most 100,000,000\)')


def test_folders_without_safetensors_are_refused(tmp_path):
  refused(tmp_path / 'absent', f'no folder {tmp_path}/absent: give the folder')
  refused(tmp_path, f'{tmp_path} has no {SINGLE} and no {INDEX}')
  put(tmp_path, adapter_model=raw({}))
  refused(tmp_path, 'only .*adapter_model.safetensors')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80')
  refused(tmp_path, 'only as pickle, .*pytorch_model.bin.* is never loaded: convert them to safetensors')
  refused(tmp_path / 'pytorch_model.bin', 'there is no folder')
  os.mkfifo(tmp_path / SINGLE)  # opening it would wait forever
  refused(tmp_path, 'not a file')


A, B = raw({'a': tensor()}, b'12'), raw({'b': tensor()}, b'12')
a, b = 'a.safetensors', 'b.safetensors'


@pytest.mark.parametrize('contents, match', [
    ({'index': {'a': a, 'b': b}, 'a': A}, "shard 'b.safetensors' that it names is missing"),
    ({'index': {'a': a, 'b': b, 'c': b}, 'a': A, 'b': B}, "b.safetensors: it lacks tensor 'c'"),
    ({'index': {'a': a}, 'a': raw({'a': tensor(), 'b': tensor(begin=2)}, b'1234')}, f"tensor 'b', which {INDEX} lacks"),
    ({'index': {'a': a, 'b': b}, 'a': A, 'b': A}, f"b.safetensors: it has tensor 'a', which {INDEX} says is in a.safe"),
    ({'index': {'a': a, 'b': b}, 'a': A, 'b': B[:-1]}, "b.safetensors: tensor 'b': .* truncated"),
    ({'index': {}}, 'weight_map {} does not give'), ({'index': [a]}, 'weight_map'), ({'index': {'a': 3}}, 'weight_map'),
    *(({'index': {'a': name}, 'a': A}, 'that it names is outside the folder|is missing') for name in (
        '/etc/passwd', '../a.safetensors', '..', '.', '', 'sub/../a.safetensors', 'x\0', '\ud800', 'x' * 5000,
        './' + a))])
def test_indexes_that_do_not_fit_are_refused(tmp_path, contents, match):
  put(tmp_path, a=A)  # the file that `..` would reach
  refused(put(tmp_path / 'folder', **contents), match)


def test_indexes_that_are_not_json_are_refused(tmp_path):
  for text in (b'\0', b'[]', b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}', b'\xff', b'{' * 10):
    (tmp_path / INDEX).write_bytes(text)
    refused(tmp_path, f'{INDEX}: its JSON')
  os.truncate(tmp_path / INDEX, 100_000_001)
  refused(tmp_path, 'more than 100,000,000 bytes')


def test_links_out_of_the_folder_are_refused_but_in_the_cache_of_the_hub(tmp_path):
  snapshot = tmp_path / 'models--org--name/snapshots/0123'
  blobs = put(tmp_path / 'models--org--name/blobs', a=A)
  for folder in (tmp_path / 'folder', snapshot):
    put(folder, index={'a': a})
    (folder / a).symlink_to(blobs / a)
  refused(tmp_path / 'folder', f'a.safetensors is a link to {blobs}/a.safetensors, outside the folder: copy')
  (tmp_path / 'link').symlink_to(snapshot)
  for folder in (snapshot, tmp_path / 'link'):
    with files.Weights(folder) as weights:
      assert bytes(weights['a']) == b'12'
  for target in (put(tmp_path, a=A) / a, tmp_path / 'models--org--name/blobs2' / a):
    (snapshot / a).unlink()
    (snapshot / a).symlink_to(target)
    refused(snapshot, 'outside the folder')
  for name in (SINGLE, 'model.loop'):
    (snapshot / name).symlink_to(name)  # a link to itself
  refused(snapshot, 'not a file')
