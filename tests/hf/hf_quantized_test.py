"""Quantised weights are the numbers that their formats define, and are dequantised one layer at a time."""
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import on
from helpers.quantized import FP8, GPT_OSS, MXFP4, QWEN, load, make_folder, opened, put, random_fp8, random_mxfp4
from helpers.slow import slow

from lm import sharding
from lm.hf import quantized, weights


def float_of_bits(bits, exponent, mantissa, bias):
  """Returns the value of a small float by its definition, one number at a time."""
  sign, e, m = bits >> exponent + mantissa, bits >> mantissa & (1 << exponent) - 1, bits & (1 << mantissa) - 1
  return (-1) ** sign * (2 ** (1 - bias) * m / 2 ** mantissa if e == 0 else 2 ** (e - bias) * (1 + m / 2 ** mantissa))


def naive_mxfp4(blocks, scales):
  """Returns the decoded weights [E, in, out], one number at a time."""
  values = np.zeros((*blocks.shape[:2], 32 * blocks.shape[2]))
  for e, o, g, b in np.ndindex(blocks.shape):
    for half in range(2):
      value = float_of_bits(int(blocks[e, o, g, b]) >> 4 * half & 15, 2, 1, 1)
      values[e, o, 32 * g + 2 * b + half] = value * 2. ** (int(scales[e, o, g]) - 127)
  return values.swapaxes(1, 2)


def naive_fp8(numbers, scales, block):
  bits = numbers.view(np.uint8)
  return np.array([[float_of_bits(int(bits[o, i]), 4, 3, 7) * float(scales[o // block[0], i // block[1]])
                    for i in range(bits.shape[1])] for o in range(bits.shape[0])])


def plain(config, tensors):
  """Returns the tensors of a folder without quantisation, in float32."""
  decoded = opened(config['quantization_config'], tensors)
  return {name: np.asarray(x[()], np.float32) for name, x in decoded.items()}


def test_mxfp4_is_as_its_format_defines_it():
  """This covers every byte, and every scale but the one that means NaN."""
  blocks = np.arange(256, dtype=np.uint8).reshape(1, 4, 4, 16)
  blocks = np.concatenate([blocks] * 16)
  scales = np.arange(256, dtype=np.uint8).reshape(16, 4, 4)
  scales[-1, -1, -1] = 0
  decoded = opened(MXFP4, {'x_blocks': blocks, 'x_scales': scales})
  assert list(decoded) == ['x'] and decoded['x'].shape == (16, 128, 4) and decoded['x'].dtype == jnp.bfloat16
  expected = naive_mxfp4(blocks, scales)
  expected[np.abs(expected) >= 2. ** 128] *= np.inf
  np.testing.assert_array_equal(np.asarray(decoded['x'][()], np.float64), expected)
  np.testing.assert_array_equal(decoded['x'][(slice(3, 5),)], decoded['x'][()][3:5])


def test_a_scale_of_mxfp4_that_is_nan_gives_nan():
  x = opened(MXFP4, {'x_blocks': np.zeros((1, 1, 1, 16), np.uint8), 'x_scales': np.full((1, 1, 1), 255, np.uint8)})['x']
  assert np.isnan(np.asarray(x[()], np.float32)).all()


@pytest.mark.parametrize('block', [[16, 24], [128, 128], [7, 64]])
def test_fp8_is_as_its_format_defines_it(block):
  """Blocks at the edges may be partial."""
  numbers, scales = random_fp8(np.random.default_rng(0), 40, 64, block)
  decoded = opened(FP8 | {'weight_block_size': block}, {'x': numbers, 'x_scale_inv': scales, 'y': scales})
  assert set(decoded) == {'x', 'y'} and decoded['x'].shape == (40, 64) and decoded['x'].dtype == np.float32
  np.testing.assert_array_equal(decoded['x'][()], naive_fp8(numbers, scales, block).astype(np.float32))


@pytest.mark.parametrize('config', [GPT_OSS, QWEN], ids=['mxfp4', 'fp8'])
def test_a_quantised_folder_gives_the_model_of_its_dequantised_weights(config, tmp_path):
  tensors = make_folder(tmp_path / 'small', config)
  put(tmp_path / 'large', {**config, 'quantization_config': None}, plain(config, tensors))
  (model, params), (same, expected) = load(tmp_path / 'small', jnp.float32), load(tmp_path / 'large')
  assert model == same
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('config', [GPT_OSS, QWEN], ids=['mxfp4', 'fp8'])
@pytest.mark.parametrize('mesh', ['fsdp:4,tensor:2', *slow('fsdp:1', 'fsdp:2,tensor:2')])
def test_each_shard_dequantises_its_part(config, mesh, tmp_path):
  make_folder(tmp_path / 'a', config)
  expected = load(tmp_path / 'a')[1]
  with on(mesh):
    params = load(tmp_path / 'a')[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, expected)


@pytest.mark.slow
@pytest.mark.parametrize('config, kind', [(GPT_OSS, quantized.Mxfp4), (QWEN, quantized.Fp8)], ids=['mxfp4', 'fp8'])
def test_one_layer_at_a_time_is_dequantised(config, kind, tmp_path, monkeypatch):
  """A shard of the experts dequantises its experts alone."""
  make_folder(tmp_path / 'a', config)
  alive, read, sizes = [], kind.__getitem__, []
  def watched(self, index):
    assert not any(reference() is not None for reference in alive)
    array = read(self, index)
    alive.append(weakref.ref(array if array.base is None else array.base))
    sizes.append(len(array))
    return array
  monkeypatch.setattr(kind, '__getitem__', watched)
  load(tmp_path / 'a')
  whole, sizes[:] = list(sizes), []
  assert len(whole) == (3 * (2 + 1) if kind is quantized.Mxfp4 else 3 * 4 + 2 * 3 * 4 + 3)
  with jax.set_mesh(sharding.make_mesh('tensor:2', jax.devices()[:2])):
    load(tmp_path / 'a')
  if kind is quantized.Mxfp4:
    assert whole == [4] * 9 and sizes == [2] * 18


@pytest.mark.parametrize('fields, match', [
    ({'quant_method': 'gptq'}, "quantization_config: quant_method='gptq' is not supported .*mxfp4"),
    ({'quant_method': None}, 'quant_method is missing'),
    ({'bits': 4}, 'bits=4 is not a supported field'),
    ({'modules_to_not_convert': [3]}, 'modules_to_not_convert'),
    ({'modules_to_not_convert': 'lm_head'}, 'modules_to_not_convert'),
    ({'weight_block_size': [128]}, r'weight_block_size=\[128\]'), ({'weight_block_size': [128, 0]}, 'block_size=.*0'),
    ({'weight_block_size': [128., 128]}, 'weight_block_size'), ({'weight_block_size': None}, 'block_size is missing'),
    ({'activation_scheme': 'static'}, "activation_scheme='static'"), ({'fmt': 'e5m2'}, "fmt='e5m2'"),
    ({'scale_fmt': 'int'}, 'scale_fmt'), ({'expert_dtype': 'fp4'}, 'expert_dtype'),
    ({'modules_to_convert': ['x']}, 'modules_to_convert')])
def test_what_is_not_supported_is_refused_by_the_name_of_its_field(fields, match, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({**QWEN, 'quantization_config': FP8 | fields}))
  with pytest.raises(ValueError, match=match):
    weights.open_model(tmp_path)


@pytest.mark.parametrize('config, change, match', [
    (MXFP4, lambda x: x | {'a.mlp.x_scales': x['a.mlp.x_scales'][:1]}, 'x_blocks and a.mlp.x_scales, .* are not MXFP4'),
    (MXFP4, lambda x: x | {'a.mlp.x_blocks': x['a.mlp.x_blocks'].view(np.int8)}, 'int8.* are not MXFP4'),
    (MXFP4 | {'modules_to_not_convert': ['a.*.x']}, lambda x: x, 'a.mlp.x is quantised, where modules_to_not_convert'),
    (MXFP4 | {'modules_to_not_convert': ['a']}, lambda x: x, 'a.mlp.x is quantised, where modules_to_not_convert'),
    (FP8, lambda x: x | {'y_scale_inv': x['y_scale_inv'][1:]}, r'do not fit weight_block_size=\[16, 24\]'),
    (FP8, lambda x: x | {'y_scale_inv': x['y_scale_inv'][0]}, 'do not fit weight_block_size'),
    (FP8, lambda x: x | {'y': x['y'][0]}, 'do not fit weight_block_size'),
    (FP8, lambda x: x | {'y': x['y'].view(np.uint8)}, 'y and y_scale_inv, uint8.* are not FP8'),
    (FP8, lambda x: x | {'y_scale_inv': x['y_scale_inv'].astype(np.int32)}, 'are not FP8')])
def test_tensors_that_do_not_fit_are_refused_by_name(config, change, match):
  rng = np.random.default_rng(0)
  blocks, scales = random_mxfp4(rng, 2, 64, 3)
  numbers, inverse = random_fp8(rng, 20, 50)
  tensors = {'a.mlp.x_blocks': blocks, 'a.mlp.x_scales': scales, 'y': numbers, 'y_scale_inv': inverse}
  opened(config | {'modules_to_not_convert': ['a.mlp.xy', 'b.*']}, tensors)
  with pytest.raises(ValueError, match=match):
    opened(config, change(tensors))


@pytest.mark.parametrize('change, match', [
    (lambda x: {n: a for n, a in x.items() if not n.endswith('0.mlp.experts.down_proj_scales')},
     'tensor model.layers.0.mlp.experts.down_proj is missing'),
    (lambda x: x | {'model.layers.0.mlp.experts.down_proj': np.zeros((4, 64, 32), np.float32)},
     '2 tensors are not weights of this model: model.layers.0.mlp.experts.down_proj_blocks'),
    (lambda x: x | {n: np.concatenate([a] * 2, axis=2) for n, a in x.items()
                    if '0.mlp.experts.down_proj_' in n and a.ndim > 2},
     r'down_proj of shape \(4, 128, 32\) make .*down of shape \(4, 128, 32\), where the config gives \(4, 64, 32\)')])
def test_a_folder_that_does_not_fit_is_refused(change, match, tmp_path):
  tensors = change(make_folder(tmp_path / 'a', GPT_OSS))
  put(tmp_path / 'b', GPT_OSS, tensors)
  with pytest.raises(ValueError, match=match):
    load(tmp_path / 'b')


@pytest.mark.parametrize('config, match', [(GPT_OSS, 'gate_up_proj is missing'), (QWEN, 'dtype float8_e4m3fn')])
def test_quantised_tensors_without_a_quantization_config_are_refused(config, match, tmp_path):
  put(tmp_path / 'b', {**config, 'quantization_config': None}, make_folder(tmp_path / 'a', config))
  with pytest.raises(ValueError, match=match):
    load(tmp_path / 'b')
