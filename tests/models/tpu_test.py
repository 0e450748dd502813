"""Programs for TPU, without one: lowered on any machine, and compiled where libtpu is installed."""
import functools

import jax
import jax.numpy as jnp
from helpers import tpu

from lm import sharding
from lm.data.batch import Batch
from lm.models import transformer
from lm.objectives.next_token import next_token
from lm.options import Computation


def gradient(model, mesh, length=256):
  """Traces the gradient of a model's loss over packed documents, on a mesh that is set."""
  params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  rows = functools.partial(jax.ShapeDtypeStruct, (2 * sharding.parts('B'), length), sharding=sharding.row_layout(mesh))
  batch = Batch(*(rows(dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
  loss = next_token().loss
  return jax.jit(jax.grad(lambda params, batch: loss(model.apply, params, batch, None)[0])).trace(params, batch)


def tiny(**options):
  return transformer.llama(64, 64, 2, 4, kv_heads=2, max_length=256, **options)


def test_a_model_is_lowered_with_the_splash_kernel_on_every_shard():
  mesh = sharding.abstract_mesh('fsdp:4,tensor:2', tpu.KIND)
  with jax.sharding.use_abstract_mesh(mesh):
    text = gradient(tiny(), mesh).lower(lowering_platforms=('tpu',)).as_text()
  for name in ('fwd', 'dq', 'dkv'):
    calls = [line for line in text.splitlines() if f'splash_mha_{name}_segmented' in line and 'custom_call' in line]
    assert calls and all('tensor<2x2x256x16xf32>' in line for line in calls), name   # rows and heads of one shard


def test_a_model_is_compiled_with_the_splash_kernel():
  mesh = sharding.make_mesh(None, tpu.devices('v5e:2x2'))
  with jax.set_mesh(mesh):
    program = gradient(tiny(dtype=jnp.bfloat16), mesh).lower().compile()
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3   # forward, dq, and dk with dv


def test_activations_are_kept_in_the_memory_of_the_host():
  mesh = sharding.make_mesh(None, tpu.devices('v5e:2x2'))
  with jax.set_mesh(mesh):
    model = Computation('bfloat16', offload=('gate', 'up')).apply(tiny(hidden=256))
    memory = gradient(model, mesh).lower().compile().memory_analysis()
  size = 2 * 2 * 2 * 256 * 256 * 2   # names, layers, rows, T, F, bytes
  assert size <= memory.host_temp_size_in_bytes <= 2 * size   # XLA has a buffer more, where layers are few
