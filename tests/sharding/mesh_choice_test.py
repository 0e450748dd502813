"""Meshes are named by their axes, chosen such that a model fits, and refused where sizes do not divide."""
import dataclasses

import jax
import numpy as np
import pytest
from helpers.meshes import mesh_of, on
from helpers.runs import RUN
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.models import transformer
from lm.sharding import partial
from lm.studies import mesh_traces
from lm.train import checks


@pytest.mark.parametrize('model,shape,message', [
    (transformer.gpt2(), 'fsdp:128,tensor:4',
     r'embedding: .* D has size 768, .* multiple of 512, .* fsdp:128, tensor:4 \(tensor is one of them because it does '
     r'not divide V\); choose another --mesh, where that size is 1 or 2 or 3 .* or 384, or another size'),
    (transformer.gpt2(vocab=64), 'fsdp:2,tensor:8', r'query: .* N has size 12, .* tensor:8'),
    (transformer.gpt2(vocab=64), 'fsdp:512', r'embedding: .* D has size 768, .* fsdp:512'),
    (transformer.llama(64, 32, 1, heads=4, kv_heads=2), 'tensor:4', r'key: .* K has size 2, .* tensor:4'),
    (transformer.llama(64, 32, 1, heads=4, hidden=10), 'tensor:4', r'gate: .* F has size 10, .* tensor:4'),
], ids=['width_for_vocab', 'heads', 'width', 'kv_heads', 'hidden'])
def test_sizes_that_a_mesh_does_not_divide_are_refused(model, shape, message):
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(shape)), pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0)))


@pytest.mark.parametrize('shape,message', [
    ('4x2', "mesh '4x2' does not name its axes; write --mesh=fsdp:4,tensor:2$"),
    ('8', "the part '8', which is not AXIS:SIZE; write it as in fsdp:8; the axes are replica, stage, fsdp, context, "
          "expert, tensor$"),
    ('', "mesh '' has the part ''"), ('fsdp:4,', "the part ''"), ('2x2x2', "the part '2x2x2'"),
    ('fsdp', "the part 'fsdp'"),
    ('fsdp:8,tenser:1', "the axis 'tenser', which does not exist; choose from replica, stage, fsdp, context, expert, "
     "tensor$"),
    ('data:8', "the axis 'data', which does not exist; it is now called fsdp; choose from"),
    ('model:8', "the axis 'model', which does not exist; it is now called tensor; choose from"),
    ('fsdp:4,fsdp:2', 'the axis fsdp twice; give it once$'), ('fsdp:0', "the size '0' for the axis fsdp; give a whole"),
    ('fsdp:-8', "the size '-8'"), ('fsdp:x', "the size 'x'"), ('tensor:', "the size ''"),
    ('fsdp:-1,tensor:-1', 'the size -1 for fsdp, tensor; give it to one axis'),
    ('fsdp:-1,tensor:3', 'no whole number of devices for the axis fsdp: 3 does not divide the 8 devices; give '
     'other sizes, whose product is 1 or 2 or 4 or 8$'),
    ('fsdp:4,tensor:4', "mesh 'fsdp:4,tensor:4' needs 16 devices, but JAX sees 8; give sizes whose product is 8"),
    ('tensor:4', "mesh 'tensor:4' needs 4 devices, but JAX sees 8"),
])
def test_a_bad_mesh_is_refused(shape, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(shape)


def test_a_mesh_puts_all_devices_on_fsdp_by_default():
  assert dict(sharding.make_mesh().shape) == {'fsdp': 8}
  assert dict(sharding.make_mesh('fsdp:2,tensor:4').shape) == {'fsdp': 2, 'tensor': 4}
  assert sharding.make_mesh('tensor:4, fsdp:2') == sharding.make_mesh('fsdp:2,tensor:4')   # in any order
  assert dict(sharding.make_mesh('fsdp:-1,tensor:4').shape) == {'fsdp': 2, 'tensor': 4}
  assert dict(sharding.make_mesh('replica:2,fsdp:-1').shape) == {'replica': 2, 'fsdp': 4}
  assert sharding.mesh_text(sharding.make_mesh('tensor:4,fsdp:2')) == 'fsdp:2,tensor:4'
  assert sharding.mesh_text(mesh_of('fsdp:1')) == 'fsdp:1'
  assert dict(sharding.abstract_mesh('fsdp:64,tensor:4').shape) == {'fsdp': 64, 'tensor': 4}


@pytest.mark.parametrize('width,rows,expected,reason', [
    (32, 8, 'fsdp:8', 'weights are split over all devices'),
    (12, 8, 'replica:2,fsdp:4', 'over 4 devices; over more: w: its axis D has size 12, which is not a multiple of 8'),
    (9, 8, 'replica:8', 'over 1 devices; over more: w: its axis D has size 9')])
def test_the_mesh_is_chosen_such_that_a_model_fits(width, rows, expected, reason):
  def fits(mesh):
    with jax.sharding.use_abstract_mesh(mesh):
      sharding.check('DF', (width, 8), 'w')

  mesh, why = sharding.choose_mesh(fits)
  assert sharding.mesh_text(mesh) == expected and reason in why


@pytest.mark.parametrize('devices, sizes', [(6, (18, 72)), (32, (32, 64))])
def test_the_proof_fits_any_number_of_devices(devices, sizes):
  assert mesh_traces.sizes_for(devices, 4) == sizes
  run = dataclasses.replace(RUN, model=transformer.llama(272, sizes[1], 1, 4, max_length=128), batch=sizes[0])
  for shape in mesh_traces.meshes_of(devices).split(';'):
    checks.check_mesh(run, sharding.abstract_mesh(shape.strip()))


def test_where_no_mesh_fits_the_last_error_is_raised():
  def fits(mesh):
    raise ValueError(f'no mesh of {mesh.size}')
  with pytest.raises(ValueError, match='mesh of 8'):
    sharding.choose_mesh(fits)


def test_slices_hold_replicas():
  class Device:
    def __init__(self, number):
      self.id, self.slice_index = number, number // 4
  tried = []

  def fits(mesh):
    tried.append(sharding.mesh_text(mesh))
    raise ValueError('too large')
  with pytest.raises(ValueError):
    sharding.choose_mesh(fits, [Device(i) for i in range(8)])
  assert tried == ['replica:2,fsdp:4', 'replica:4,fsdp:2', 'replica:8']


def test_a_mesh_axis_is_used_once_by_the_first_letter():
  assert sharding.spec('BTD') is None
  with on('fsdp:4,tensor:2'):
    assert sharding.spec('BTD') == P('fsdp', None, None)
    assert sharding.spec('DNH') == P('fsdp', 'tensor', None)
    assert sharding.spec('VD') == P('tensor', 'fsdp')
    assert sharding.spec('NKF') == P('tensor', None, None)
    assert sharding.spec('-') == P(None)
  with on('tensor:8'):   # axes of size 1 are not in layouts
    assert sharding.spec('BTD') == P(None, None, None)
  with on('replica:2,fsdp:2,expert:2'):
    assert sharding.spec('BTD') == P(('replica', 'fsdp', 'expert'), None, None)
    assert sharding.spec('DNH') == P(('fsdp', 'expert'), None, None)
    assert sharding.spec('EDF') == P('expert', 'fsdp', None)
    assert partial.gathered_spec('EDF') == P('expert', None, None, reduced={'replica', 'fsdp'})


def test_rows_of_a_batch_are_split_in_order():
  rows = np.arange(16 * 3).reshape(16, 3)
  mesh = sharding.make_mesh('fsdp:4,tensor:2')
  assert sharding.local_rows(16, mesh) == range(16)
  batch = sharding.shard_rows({'x': rows}, mesh)['x']
  np.testing.assert_array_equal(batch, rows)
  for shard in batch.addressable_shards:
    fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
    np.testing.assert_array_equal(shard.data, rows[4 * fsdp:4 * fsdp + 4])
