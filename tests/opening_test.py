"""What belongs together is opened together: parameters, tokenizer, model and script of a run."""
import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from train_test import RUN, TEXTS, go, saved, steps_kept

from lm import describe, sharding, train
from lm.data import dataset, tokenizer
from lm.data.source import Source


def snapshot(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def text(name, documents=TEXTS, control=2):
  """Data whose tokenizer is trained, and another one for another `control`."""
  return dataset.Text(Source('numbers', {'train': documents, 'validation': documents[:9]}, name),
                      functools.partial(trained_tokenizer, control), 16, ())


def trained_tokenizer(control, documents):
  return tokenizer.Bytes(tuple(f'<|{len(documents) + i}|>' for i in range(control)))


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_made(tmp_path):
  run = dataclasses.replace(RUN, data=text('a'), steps=2)
  go(tmp_path, run)
  shutil.rmtree(tmp_path / 'data')
  before = snapshot(tmp_path)
  for other, message in ((text('b', TEXTS[:-1]), 'tokenizer: .* before, .* now'), (text('b'), 'data: .* before')):
    with pytest.raises(ValueError, match=message):
      go(tmp_path, run, data=other, steps=4)
    assert snapshot(tmp_path) == before and not (tmp_path / 'data').exists()
  assert go(tmp_path, run, steps=4).step == 4   # what was deleted is made again where it comes out the same


def test_no_message_advises_to_delete_a_tokenizer(tmp_path):
  go(tmp_path, dataclasses.replace(RUN, data=text('a'), steps=2))
  with pytest.raises(ValueError, match='made with other settings; go back to them, or choose another --workdir') as e:
    go(tmp_path, dataclasses.replace(RUN, data=text('b'), steps=2))
  assert 'delete' not in str(e.value)


def test_a_fingerprint_of_parameters_is_that_of_their_bits_on_any_mesh():
  rng = np.random.default_rng(0)
  params = {'w': rng.normal(size=(8, 4)).astype('f4'), 'b': {'c': rng.normal(size=8).astype(jax.numpy.bfloat16)}}
  expected = describe.fingerprint(params)
  for shape in ('1x1', '8x1', '4x2'):
    with jax.set_mesh(mesh := sharding.make_mesh(shape, jax.devices()[:eval(shape.replace('x', '*'))])):
      specs = {'w': jax.P('data', 'model'), 'b': {'c': jax.P('data')}}
      placed = jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), params, specs)
      assert describe.fingerprint(placed) == expected
  seen = {expected}
  for change in (lambda w: w.__setitem__((3, 2), np.nextafter(w[3, 2], 9)), lambda w: w.__setitem__(slice(2), w[1::-1]),
                 lambda w: w.__setitem__((slice(None), slice(2)), w[:, 1::-1])):
    changed = jax.tree.map(np.copy, params)
    change(changed['w'])
    seen.add(describe.fingerprint(changed))
  seen.add(describe.fingerprint({'w': params['w'].T, 'b': params['b']}))
  seen.add(describe.fingerprint({'v': params['w'], 'b': params['b']}))
  assert len(seen) == 6


def test_a_checkpoint_tells_the_fingerprints_of_its_tokenizer_and_parameters(tmp_path):
  go(tmp_path, steps=2)
  facts = train.checkpoint.stored_facts(tmp_path / 'checkpoints')
  assert facts['tokenizer'] == RUN.data.tokenizer.fingerprint
  assert facts['parameters'] == describe.fingerprint(saved(tmp_path)[1].params) and steps_kept(tmp_path) == [2]
