"""Weight folders equal the library's bytes both ways, damaged ones are refused, and only what is used is read."""
import functools
import json
import mmap
import os
import pathlib
import resource
import tempfile
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.hf import files

DTYPES = ('bool', 'uint8', 'int8', 'int16', 'uint16', 'float16', 'int32', 'uint32', 'float32', 'float64', 'int64',
          'uint64', jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2)
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


def array(shape, dtype=np.float32, start=0):
  return (np.arange(start, start + np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)


def example():
  """Returns tensors of every dtype, with odd sizes, a scalar, an empty tensor, and a name outside ASCII."""
  return {f't.{np.dtype(dtype).name}': array((3, i + 1), dtype, i) for i, dtype in enumerate(DTYPES)} | {
      'scalar': np.float32(3), 'empty': np.zeros((2, 0, 5), np.float16), 'é "quoted"': array((7,), np.uint8)}


def write(folder, tensors, **options):
  files.write(folder, {name: (x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in tensors.items()},
              **options)
  return folder


def same(weights, tensors):
  assert set(weights) == set(tensors)
  for name, x in tensors.items():
    assert (weights[name].shape, weights[name].dtype, weights[name].tobytes()) == (x.shape, x.dtype, x.tobytes())


def raw(header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, 'little') + text + data


def put(folder, **contents):
  """Writes the files of a folder: `a=...` is a.safetensors, and `index=...` the map of weights."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in contents.items():
    if name == 'index':
      (folder / INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': content}))
    else:
      (folder / f'{name}.safetensors').write_bytes(content)
  return folder


def tensor(shape=(2,), begin=0, dtype='U8'):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, begin + int(np.prod(shape))]}


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


def opens_or_refuses(folder):
  """Returns whether a folder opens, with every byte of its tensors readable; the only error allowed is our ValueError.
  """
  try:
    weights = files.Weights(folder)
  except ValueError as error:
    assert str(folder) in str(error) and len(str(error)) < 2000, error
    return False
  with weights:
    for name, info in weights.info.items():
      assert info.start >= 8 and info.start + weights[name].nbytes <= info.file.stat().st_size
      weights[name].tobytes()
  return True


@st.composite
def mutated(draw, content):
  content = bytearray(content)
  for _ in range(draw(st.integers(1, 4))):
    place = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(['flip', 'cut', 'insert', 'replace', 'repeat'])):
      case 'flip' if place < len(content):
        content[place] ^= draw(st.integers(1, 255))
      case 'cut':
        del content[place:]
      case 'insert':
        content[place:place] = draw(st.binary(max_size=9))
      case 'replace':
        content[place:place + 1] = draw(st.sampled_from(
            [b'"', b'{', b'}', b'[', b'-', b'9', b'0', b'e9', b'null', b'\\u', b',']))
      case 'repeat':
        content[place:place] = content[place:place + draw(st.integers(1, 60))]
  return bytes(content)


NUMBERS = st.one_of(st.integers(-2, 40), st.integers(), st.just(2**63), st.booleans(), st.floats(), st.none())
JSON = st.recursive(st.one_of(NUMBERS, st.text(max_size=3)), lambda x: st.one_of(
    st.lists(x, max_size=3), st.dictionaries(st.text(max_size=3), x, max_size=3)), max_leaves=5)
ENTRY = st.one_of(JSON, st.fixed_dictionaries({
    'dtype': st.one_of(st.sampled_from(['U8', 'BF16', 'F8_E4M3', 'BOOL', 'I64']), JSON),
    'shape': st.one_of(st.lists(NUMBERS, max_size=3), JSON),
    'data_offsets': st.one_of(st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted), JSON)}))
WHOLE = raw({'__metadata__': {'format': 'pt'}, 'a': tensor((2, 3)), 'b': tensor((2,), 6, 'BOOL'),
             'c': {'dtype': 'BF16', 'shape': [4], 'data_offsets': [8, 16]}}, bytes(16))
HEADER = json.loads(WHOLE[8:-16])
SAME = settings(deadline=None, derandomize=True, max_examples=300, database=None)


@pytest.mark.slow
@SAME
@given(st.one_of(
    mutated(WHOLE), mutated(WHOLE[8:-16]).map(lambda text: raw(text, bytes(16))),
    st.dictionaries(st.sampled_from(['a', 'b', 'c', '__metadata__', 'd']), ENTRY, max_size=3).map(
        lambda edits: raw(HEADER | edits, bytes(16)))))
def test_fuzzed_files_open_whole_or_are_refused(content):
  library = pytest.importorskip('safetensors')
  with tempfile.TemporaryDirectory() as folder:
    if opens_or_refuses(put(pathlib.Path(folder), model=content)):
      with files.Weights(folder) as weights:
        theirs = {name: bytes(x['data']) for name, x in library.deserialize(content)}  # the library opens it too
        assert theirs == {name: x.tobytes() for name, x in weights.items()}


PLACED = json.dumps({'metadata': {'total_size': 4}, 'weight_map': {'a': a, 'b': b}}).encode()


@SAME
@given(st.one_of(mutated(PLACED), st.dictionaries(
    st.sampled_from(['a', 'b', 'c']), st.one_of(st.sampled_from([a, b, '../' + a, INDEX]), JSON), max_size=3).map(
        lambda placed: json.dumps({'weight_map': placed}).encode())))
def test_fuzzed_indexes_open_whole_or_are_refused(text):
  with tempfile.TemporaryDirectory() as folder:
    put(pathlib.Path(folder), a=A, b=B).joinpath(INDEX).write_bytes(text)
    if opens_or_refuses(folder):
      assert (placed := json.loads(text)['weight_map']) and placed.items() <= {'a': a, 'b': b}.items()


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
