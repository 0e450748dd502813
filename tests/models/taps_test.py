"""Named activations are read and replaced by functions, through scan, rematerialisation and a cache, on any mesh."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import mesh_of
from helpers.slow import slow
from helpers.transformers import GPT2, LLAMA, ROWS, TIME, make_batch, random_params

from lm.data.batch import Batch
from lm.models import encoder_decoder
from lm.models.context import read

NAMES = ('query', 'key', 'value', 'attended', 'residual', 'up', 'output')


def same(x, layer):
  return x, None


@pytest.mark.parametrize('mesh', ['fsdp:2,tensor:2', *slow('fsdp:1')])
def test_an_activation_replaced_by_itself_changes_no_bit(mesh):
  batch = jax.tree.map(lambda x: x[:2], make_batch(True))

  def loss(params, taps):
    return jnp.sum(jnp.sin(LLAMA.apply(params, batch, taps=taps).hidden.astype(jnp.float32)))

  with jax.set_mesh(mesh_of(mesh)):
    shapes = jax.eval_shape(LLAMA.init, jax.random.key(0))
    params = jax.tree.map(lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh_of(mesh), s.sharding.spec)),
                          random_params(LLAMA), shapes)
    plain, tapped = (jax.jit(jax.value_and_grad(lambda params, taps=taps: loss(params, taps)))(params)
                     for taps in ((), tuple((name, same) for name in (*NAMES, 'gate'))))
  jax.tree.map(np.testing.assert_array_equal, tapped, plain)


def test_ablating_a_head_is_zeroing_its_rows_of_the_output_projection():
  params, batch = random_params(GPT2), make_batch(True)

  def ablate(x_BTNH, layer):
    return jnp.where((layer == 1) & (jnp.arange(x_BTNH.shape[2]) == 1)[:, None], 0, x_BTNH), None

  out = params['blocks']['0']['attention']['out'].at[1, 1].set(0)
  without = {**params, 'blocks': {'0': {**params['blocks']['0'], 'attention': {
      **params['blocks']['0']['attention'], 'out': out}}}}
  expected, actual, plain = (jax.jit(lambda p, taps=taps: GPT2.apply(p, batch, taps=taps).hidden)(p) for p, taps in (
      (without, ()), (params, (('attended', ablate),)), (params, ())))
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  assert np.abs(actual - plain).max() > 1e-3


@pytest.mark.slow
def test_activations_are_read_stacked_over_layers_with_or_without_a_cache():
  params, batch = random_params(GPT2), make_batch(False)
  taps = tuple((name, read) for name in NAMES)
  out = jax.jit(lambda params: GPT2.apply(params, batch, taps=taps))(params)
  heads, size = GPT2.layers[0].attention.heads, GPT2.layers[0].attention.head_size
  assert out.readings.keys() == set(NAMES)
  assert out.readings['query'].shape == (len(GPT2.layers), ROWS, TIME, heads, size)
  last = GPT2.norm.apply({'params': params['norm']}, out.readings['output'][-1])
  np.testing.assert_allclose(last, out.hidden, atol=1e-6)   # the norm is compiled twice
  cached = jax.jit(lambda params: GPT2.apply(params, batch, cache=GPT2.init_cache(ROWS, TIME), taps=taps))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), dict(cached.readings), dict(out.readings))


def test_equal_layers_are_traced_once_with_a_cache_and_know_their_numbers():
  traces = []

  def number(x, layer):
    traces.append(layer)
    return x, layer

  def numbers(params):
    cache = GPT2.init_cache(ROWS, TIME)
    return GPT2.apply(params, make_batch(False), cache=cache, taps=(('output', number),)).readings['output']

  assert jax.jit(numbers)(random_params(GPT2)).tolist() == list(range(len(GPT2.layers))) and len(traces) == 1


def test_nothing_is_stored_where_nothing_is_read():
  params, batch = random_params(GPT2), make_batch(False)
  program = lambda taps: str(jax.make_jaxpr(lambda params: GPT2.apply(params, batch, taps=taps).hidden)(params))
  assert program(()).count('scan') == 1 and program((('query', same),)).count('f32[2,') == program(()).count('f32[2,')


@pytest.mark.slow
def test_taps_of_an_encoder_decoder_name_its_side():
  model = encoder_decoder.t5(32, 8, 2, 2, 4, 16)
  params = jax.jit(model.init)(jax.random.key(0))
  batch = Batch(np.ones((1, 3), 'i4'), source=np.ones((1, 5), 'i4'))
  out = model.apply(params, batch, taps=(('encoder/residual', read), ('cross_query', read)))
  assert {name: x.shape for name, x in out.readings.items()} == {
      'encoder/residual': (2, 1, 5, 8), 'cross_query': (2, 1, 3, 2, 4)}


def test_a_name_that_no_layer_has_is_refused():
  with pytest.raises(ValueError, match="a tap of 'querry', and no layer has an activation of that name"):
    GPT2.apply(random_params(GPT2), make_batch(False), taps=(('querry', read),))
