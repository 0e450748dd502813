"""Checkpoints, tokenizers and parameters have fingerprints, by which those of another run are refused."""
import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN, TEXTS, go, saved, steps_kept

from lm.data import dataset, tokenizers
from lm.data.text.source import Source
from lm.workdir import checkpoint, describe

pytestmark = pytest.mark.usefixtures('compiled_once')


def snapshot(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def text(name, documents=TEXTS, control=2):
  """Returns data whose tokenizer is trained; another `control` gives another tokenizer."""
  return dataset.Text(Source('numbers', {'train': documents, 'validation': documents[:9]}, name),
                      functools.partial(trained_tokenizer, control), 16, ())


def trained_tokenizer(control, documents):
  return tokenizers.Bytes(tuple(f'<|{len(documents) + i}|>' for i in range(control)))


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_written(tmp_path):
  run = dataclasses.replace(RUN, data=text('a'), steps=2)
  go(tmp_path, run)
  shutil.rmtree(tmp_path / 'data')
  before = snapshot(tmp_path)
  for other, message in ((text('b', TEXTS[:-1]), 'tokenizer: .* before, .* now'), (text('b'), 'data: .* before')):
    with pytest.raises(ValueError, match=message):
      go(tmp_path, run, data=other, steps=4)
    assert snapshot(tmp_path) == before and not (tmp_path / 'data').exists()
  assert go(tmp_path, run, steps=4).step == 4   # deleted data is rebuilt if the result is the same


def test_no_message_advises_to_delete_a_tokenizer(tmp_path):
  go(tmp_path, dataclasses.replace(RUN, data=text('a'), steps=2))
  with pytest.raises(ValueError, match='made with other settings; go back to them, or choose another --workdir') as e:
    go(tmp_path, dataclasses.replace(RUN, data=text('b'), steps=2))
  assert 'delete' not in str(e.value)


def test_a_fingerprint_of_parameters_is_that_of_their_bits_on_any_mesh():
  rng = np.random.default_rng(0)
  params = {'w': rng.normal(size=(8, 4)).astype('f4'), 'b': {'c': rng.normal(size=8).astype(jax.numpy.bfloat16)}}
  expected = describe.fingerprint(params)
  for shape, columns in (('fsdp:1', None), ('fsdp:8', None), ('fsdp:4,tensor:2', 'tensor')):
    with jax.set_mesh(mesh := mesh_of(shape)):
      specs = {'w': jax.P('fsdp', columns), 'b': {'c': jax.P('fsdp')}}
      placed = jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), params, specs)
      assert describe.fingerprint(placed) == expected
  fingerprints = {expected}
  for change in (lambda w: w.__setitem__((3, 2), np.nextafter(w[3, 2], 9)), lambda w: w.__setitem__(slice(2), w[1::-1]),
                 lambda w: w.__setitem__((slice(None), slice(2)), w[:, 1::-1])):
    changed = jax.tree.map(np.copy, params)
    change(changed['w'])
    fingerprints.add(describe.fingerprint(changed))
  fingerprints.add(describe.fingerprint({'w': params['w'].T, 'b': params['b']}))
  fingerprints.add(describe.fingerprint({'v': params['w'], 'b': params['b']}))
  assert len(fingerprints) == 6


def test_a_checkpoint_tells_the_fingerprints_of_its_tokenizer_and_parameters(tmp_path):
  go(tmp_path, steps=2)
  facts = checkpoint.stored_facts(tmp_path / 'checkpoints')
  assert facts['tokenizer'] == RUN.data.tokenizer.fingerprint
  assert facts['parameters'] == describe.fingerprint(saved(tmp_path)[1].params) and steps_kept(tmp_path) == [2]
