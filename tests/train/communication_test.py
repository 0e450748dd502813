"""What devices exchange in a step is what theory says, in number and in bytes."""
import dataclasses

import jax
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN

from lm import train
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
  assert first == ('all-gather', ('f32[8,32]',), 1024, 4, 15, 'jit(f)/a')
  assert second == ('all-reduce', ('f32[4]', 'bf16[2,3]'), 28, 2, 15, '')
  assert third == ('reduce-scatter', ('f32[2,3]',), 96, 4, 3, '')   # the whole is four times the part
  assert communication.totals(program) == {
      'all-gather': (15, 15360), 'reduce-scatter': (3, 288), 'all-reduce': (30, 420)}


def compiled(mesh):
  run = dataclasses.replace(RUN, model=MODEL, batch=ROWS)
  with jax.set_mesh(mesh := mesh_of(mesh)):
    arguments = abstract_state(run, mesh), abstract_batch(run, mesh), abstract_constants(run)
    return train.make_step(run).lower(*arguments).compile().as_text()


def weights() -> tuple[int, int]:
  """Returns the bytes of the matrices of all layers, and of the embedding."""
  params = jax.eval_shape(MODEL.init, jax.random.key(0))
  blocks = sum(x.size for x in jax.tree.leaves(params['blocks']) if x.ndim > 2)
  return FLOAT * blocks, FLOAT * VOCAB * WIDTH


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
