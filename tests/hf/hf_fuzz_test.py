"""Files and indexes of weights with any bytes in them open whole or are refused."""
import json
import pathlib
import tempfile

import pytest
from helpers.safetensors_files import INDEX, put, raw, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.hf import files


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


A, B = raw({'a': tensor()}, b'12'), raw({'b': tensor()}, b'12')
a, b = 'a.safetensors', 'b.safetensors'
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
