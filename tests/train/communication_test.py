"""What devices exchange in a step is what theory says, in number and in bytes."""
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import tpu
from helpers.meshes import mesh_of
from helpers.runs import RUN

from lm import sharding, train
from lm.models import transformer
from lm.train import communication
from lm.train.run import abstract_batch, abstract_constants, abstract_state

LAYERS, WIDTH, VOCAB, ROWS = 3, 32, 259, 16
MODEL = transformer.llama(VOCAB, WIDTH, LAYERS, heads=4, max_length=64)
FLOAT = 4


def test_loops_count_as_often_as_they_run():
  program = '''HloModule jit_step
%inner (x: f32[4]) -> f32[4] {
  %a = f32[8,32]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(f)/a"}
  ROOT %b = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups=mesh['x'=4,'y'=2], device_ids=([4,2]) {'y'}
}
%outer (x: f32[4]) -> f32[4] {
  %c = f32[4]{0} while(%t), condition=%test, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %s = f32[2,3]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %d = f32[4]{0} while(%t), condition=%test, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %e = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
}
'''
  first, second, third = communication.exchanges(program)
  assert first == ('all-gather', ('f32[8,32]',), 1024, 4, 15, 'jit(f)/a', 0)
  assert second == ('all-reduce', ('f32[4]', 'bf16[2,3]'), 28, 2, 15, '', 0)
  assert third == ('reduce-scatter', ('f32[2,3]',), 96, 4, 3, '', 0)   # the whole is four times the part
  assert communication.totals(program) == {
      'all-gather': (15, 15360), 'reduce-scatter': (3, 288), 'all-reduce': (30, 420)}


def test_an_exchange_that_is_started_counts_its_results_alone():
  """Its operands are named before them, and what the devices count during the transfer after them."""
  program = '''HloModule jit_step
ENTRY %main (x: f32[4]) -> f32[4] {
  %p = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %s = ((f32[4]{0}, bf16[8]{0}), (f32[2]{0}, bf16[4]{0})) reduce-scatter-start(%x, %y), replica_groups={{0,1}}
  %r = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-start(%x, %y), replica_groups={{0,1}}
}
'''
  assert communication.totals(program) == {
      'reduce-scatter': (2, 2 * (8 + 8)), 'all-reduce': (2, 16 + 12), 'collective-permute': (1, 128)}


def test_products_during_an_exchange_are_counted():
  """One is asynchronous, one is spread over the fusions of a chain, and devices wait for the third."""
  program = '''HloModule jit_step
%start (p: f32[4]) -> f32[8] {
  ROOT %a = f32[8]{0} all-gather(%p), replica_groups={{0,1}}, frontend_attributes={chain_id="7"}
}
%fused (p: f32[4], x: f32[2,2]) -> f32[8] {
  %d = f32[2,2]{1,0} convolution(%x, %x)
  ROOT %b = f32[8]{0} all-gather(%p), replica_groups={{0,1}}, frontend_attributes={chain_id="7"}
}
%test (t: (s32[])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%layer (t: (s32[])) -> (s32[]) {
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}
  %d = f32[2,2]{1,0} dot(%y, %y)
  %c = f32[8]{0} fusion(%x), kind=kCustom, calls=%start
  %e = f32[8]{0} fusion(%c, %y), kind=kCustom, calls=%fused
  %t = f32[8]{0} all-gather-done(%s)
  %g = f32[8]{0} all-gather(%x), channel_id=1, replica_groups={{0,1}}
  %h = f32[2,2]{1,0} dot(%y, %y)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%test, body=%layer
}
'''
  kinds = [('all-gather', ('f32[8]',), 32, 2, 5, '', products) for products in (2, 1, 0)]
  assert communication.exchanges(program) == kinds


def compiled(mesh, model=MODEL, length=None):
  """Returns the program of a step on a mesh, or on one of this shape."""
  run = dataclasses.replace(RUN, model=model, batch=ROWS)
  if length is not None:
    run = dataclasses.replace(run, data=dataclasses.replace(RUN.data, length=length))
  with jax.set_mesh(mesh := mesh_of(mesh) if isinstance(mesh, str) else mesh):
    arguments = abstract_state(run, mesh), abstract_batch(run, mesh), abstract_constants(run)
    return train.make_step(run).lower(*arguments).compile().as_text()


def test_flags_of_the_user_decide_on_the_options_of_tpus(monkeypatch):
  assert not sharding.overlap_options()   # on CPUs there are none
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh('fsdp:8', tpu.KIND)):
    options = sharding.overlap_options()
    monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_enable_async_all_gather=false --xla_other=1')
    assert options.pop('xla_enable_async_all_gather') and sharding.overlap_options() == options


def weights(model=MODEL) -> tuple[int, int]:
  """Returns the bytes of the matrices of all layers, and of the embedding."""
  params = jax.eval_shape(model.init, jax.random.key(0))
  blocks = sum(x.size for x in jax.tree.leaves(params['blocks']) if x.ndim > 2)
  return FLOAT * blocks, FLOAT * params['embedding'].size


@pytest.mark.parametrize('mesh', ['fsdp:8', pytest.param('replica:2,fsdp:4', marks=pytest.mark.slow)])
def test_weights_are_gathered_twice_and_their_gradients_scattered_once(mesh):
  """Each layer gathers its weights for the forward and the backward pass; no activation is exchanged."""
  totals, (blocks, embedding) = communication.totals(compiled(mesh)), weights()
  assert totals.keys() == {'all-gather', 'reduce-scatter', 'all-reduce'}
  assert totals['all-gather'] == (LAYERS * 2 * 7 + 1, 2 * blocks + embedding)
  assert totals['reduce-scatter'] == (LAYERS * 7 + 1, blocks + embedding)
  vectors = FLOAT * WIDTH * (2 * LAYERS + 1)   # of norms, whose gradients are summed over all devices
  summed = (blocks + embedding) / mesh_of(mesh).shape['fsdp'] if 'replica' in mesh else 0   # of each device's own part
  assert 0 <= totals['all-reduce'][1] - summed - vectors < 40 * FLOAT   # scalars: losses and norms


@pytest.mark.slow
def test_a_layer_gathers_and_scatters_activations_twice_in_each_direction():
  """These are the halves of the two all-reduces of Megatron; activations are gathered again where they are recomputed.

  The vocabulary, which the mesh does not divide, is padded by a row; a device exchanges its own part of the embedding,
  and that of its gradient.
  """
  totals, (blocks, embedding) = communication.totals(compiled('fsdp:4,tensor:2')), weights()
  embedding += FLOAT * WIDTH
  activations = FLOAT * ROWS // 4 * RUN.data.length * WIDTH
  gathers = LAYERS * (2 + 2 + 2) + 2   # forward, backward, recomputation; and once after the last layer
  assert totals['all-gather'][1] == (2 * blocks + embedding) // 2 + gathers * activations
  assert totals['reduce-scatter'][1] == (blocks + embedding) // 2 + LAYERS * (2 + 2) * activations
  assert totals['all-to-all'][1] == 2 * embedding // 8


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('topology, width, waits', [('v5e:2x4', 1024, 1), ('v6e:2x4', 512, 3)])
def test_on_tpus_weights_are_gathered_during_products(topology, width, waits):
  """Devices wait for few of the 14 weights that a layer gathers, in bfloat16."""
  model = transformer.llama(8 * width, width, LAYERS, heads=width // 128, max_length=width, dtype=jnp.bfloat16)
  program = compiled(sharding.make_mesh('fsdp:8', tpu.devices(topology)), model, length=width)
  blocks, embedding = weights(model)
  assert communication.totals(program)['all-gather'] == (LAYERS * 14 + 1, (2 * blocks + embedding) // 2)
  gathers = [each for each in communication.exchanges(program) if each.kind == 'all-gather' and each.times == LAYERS]
  assert len(gathers) == 14 and sum(not each.products for each in gathers) <= waits


@pytest.mark.slow
def test_a_pipeline_exchanges_weights_once_and_passes_activations_on():
  """A stage passes a microbatch on at each iteration; one more waits to start, and one has ended, in each direction.

  Weights of a layer are gathered and scattered at each iteration, as they are for each part of an accumulated batch.
  """
  model = transformer.llama(VOCAB, WIDTH, 4, heads=4, max_length=64)   # two rounds of two stages, for two microbatches
  program, iterations = compiled('stage:2,fsdp:4', model), 2 * 2 + 1
  totals, (blocks, embedding) = communication.totals(program), weights(model)
  assert totals['all-to-all'] == (2 * 7 * 2, 2 * blocks // 8)   # each device sends a part to each of two stages
  moved = [exchange for exchange in communication.exchanges(program)
           if exchange.kind == 'collective-permute' and exchange.shapes[0].startswith('f32')]
  assert sum(exchange.times for exchange in moved) == 2 * 3 * iterations
  assert {exchange.bytes for exchange in moved} == {FLOAT * ROWS // 8 * RUN.data.length * WIDTH}
  assert totals['all-gather'] == (iterations * 2 * 7 + 1, 2 * iterations * blocks // 4 + embedding)
  assert totals['reduce-scatter'] == (iterations * 7 + 1, iterations * blocks // 4 + embedding)
