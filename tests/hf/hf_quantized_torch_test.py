"""Quantised weights equal the dequantisation of `transformers`, and so do the logits of its models."""
import warnings

import jax
import numpy as np
import pytest
from helpers.quantized import FP8, GPT_OSS, MXFP4, QWEN, load, make_folder, opened, random_fp8, random_mxfp4

from lm.data.batch import Batch

torch = pytest.importorskip('torch')
with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  transformers = pytest.importorskip('transformers')
  from transformers.integrations.finegrained_fp8 import Fp8Dequantize
  from transformers.integrations.mxfp4 import convert_moe_packed_tensors


def tensor(x):
  return torch.from_numpy(np.array(x, np.uint8 if x.dtype == np.uint8 else np.float32))


def mxfp4(blocks, scales):
  return convert_moe_packed_tensors(tensor(blocks), tensor(scales)).float()


def fp8(numbers, scales):
  numbers = torch.from_numpy(np.array(numbers.view(np.uint8))).view(torch.float8_e4m3fn)
  return Fp8Dequantize(None)._dequantize_one(numbers, tensor(scales))


def test_mxfp4_is_that_of_transformers():
  rng = np.random.default_rng(0)
  blocks, scales = random_mxfp4(rng, 3, 64, 5)
  scales = rng.integers(0, 250, scales.shape, np.uint8)
  decoded = opened(MXFP4, {'x_blocks': blocks, 'x_scales': scales})['x']
  np.testing.assert_array_equal(np.asarray(decoded[()], np.float32), mxfp4(blocks, scales))


def test_fp8_is_that_of_transformers():
  """`transformers` supports whole blocks alone."""
  numbers, scales = random_fp8(np.random.default_rng(0), 256, 384, (128, 128))
  decoded = opened(FP8 | {'weight_block_size': [128, 128]}, {'x': numbers, 'x_scale_inv': scales})['x']
  np.testing.assert_array_equal(decoded[()], fp8(numbers, scales))


def theirs(config, tensors):
  """Returns the model of `transformers`, with the tensors as it dequantises them."""
  state = {}
  for name, x in tensors.items():
    if name.endswith('_blocks'):
      state[name.removesuffix('_blocks')] = mxfp4(x, tensors[name.replace('_blocks', '_scales')])
    elif name + '_scale_inv' in tensors:
      state[name] = fp8(x, tensors[name + '_scale_inv'])
    elif not name.endswith(('_scales', '_scale_inv')):
      state[name] = tensor(x)
  kind = getattr(transformers, config['architectures'][0])
  values = {name: value for name, value in config.items() if name != 'quantization_config'}
  model = kind.from_pretrained(None, config=kind.config_class(**values), state_dict=state, dtype=torch.float32,
                               attn_implementation='eager')
  return model.eval()


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('config', [GPT_OSS, QWEN | {
    'quantization_config': FP8 | {'weight_block_size': [16, 8]}, 'moe_intermediate_size': 48}], ids=['mxfp4', 'fp8'])
def test_a_quantised_model_gives_the_logits_of_transformers(config, tmp_path):
  tensors = make_folder(tmp_path / 'a', config)
  model, params = load(tmp_path / 'a', np.float32)
  tokens = np.random.default_rng(1).integers(0, 96, (2, 64), np.int32)
  with torch.no_grad():
    expected = theirs(config, tensors)(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
  out = jax.jit(model.apply)(params, Batch(tokens))
  assert np.std(expected) > 0.3
  assert np.abs(out.head(out.hidden) - expected).max() <= 1e-4
