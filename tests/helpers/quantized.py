"""Folders of small quantised models."""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from lm.hf import files, quantized, weights
from lm.hf.config import Config

SIZES = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'num_key_value_heads': 2,
         'intermediate_size': 64, 'vocab_size': 96, 'max_position_embeddings': 64}

MXFP4 = {'quant_method': 'mxfp4', 'modules_to_not_convert': ['model.layers.*.self_attn', 'model.layers.*.mlp.router',
                                                             'model.embed_tokens', 'lm_head']}

FP8 = {'quant_method': 'fp8', 'weight_block_size': [16, 24], 'activation_scheme': 'dynamic', 'fmt': 'e4m3'}

GPT_OSS = SIZES | {'architectures': ['GptOssForCausalLM'], 'num_local_experts': 4, 'num_experts_per_tok': 2,
                   'head_dim': 16, 'sliding_window': 9, 'swiglu_limit': 1., 'quantization_config': MXFP4}

QWEN = SIZES | {'architectures': ['Qwen3MoeForCausalLM'], 'num_experts': 4, 'num_experts_per_tok': 2, 'head_dim': 16,
                'moe_intermediate_size': 56, 'norm_topk_prob': True, 'mlp_only_layers': [1], 'quantization_config': FP8}


def random_mxfp4(rng, experts, width, out):
  """Returns random MXFP4 (blocks [experts, out, width / 32, 16], scales [experts, out, width / 32]) of small values."""
  blocks = rng.integers(0, 256, (experts, out, width // 32, 16), np.uint8)
  return blocks, rng.integers(122, 126, (experts, out, width // 32), np.uint8)


def random_fp8(rng, out, width, block=FP8['weight_block_size']):
  """Returns random float8 numbers [out, width] without NaN, and float32 scales of their blocks."""
  numbers = rng.integers(0, 256, (out, width), np.uint8)
  numbers[(numbers & 127) == 127] = 0   # these bits are NaN
  scales = rng.uniform(0.5, 2, [-(-n // b) for n, b in zip((out, width), block)]).astype(np.float32) / 1000
  return numbers.view(jnp.float8_e4m3fn), scales


def opened(config, tensors):
  """Returns lazily decoded tensors by name, read from stored `tensors` under a `quantization_config`."""
  return quantized.reader(Config({'quantization_config': config}))(tensors)


@functools.cache
def random_tensors(text, seed=0):
  """Returns random stored tensors by name, for the model of a config given as JSON text.

  In MXFP4 the experts alone are quantised; in FP8 every projection is. These are the tensors that published models
  quantise.
  """
  config, rng, tensors = json.loads(text), np.random.default_rng(seed), {}
  family = weights.family_of(config)
  model = family.model(Config(config))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  for name, (shape, _, _) in weights.tensors(model, family, shapes, np.float32).items():
    if 'mlp.experts' in name and name.endswith('_proj'):
      tensors[name + '_blocks'], tensors[name + '_scales'] = random_mxfp4(rng, *shape)
    elif config['quantization_config']['quant_method'] == 'fp8' and name.endswith('_proj.weight'):
      block = config['quantization_config']['weight_block_size']
      tensors[name], tensors[name + '_scale_inv'] = random_fp8(rng, *shape, block)
    else:
      tensors[name] = (rng.normal(size=shape) * 0.2 + (len(shape) == 1)).astype(jnp.bfloat16)
  return tensors


def make_folder(folder, config):
  """Writes a folder with random tensors for this config, and returns the tensors by name."""
  tensors = random_tensors(json.dumps(config))
  put(folder, config, tensors)
  return dict(tensors)


def put(folder, config, tensors):
  """Writes a folder of these tensors and this config."""
  with files.new_folder(folder) as new:
    files.write(new, {name: (x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in tensors.items()})
    (new / 'config.json').write_text(json.dumps(config))


def load(folder, dtype=None):
  """Returns (model, params) of a folder."""
  model, family = weights.open_model(folder)
  with files.Weights(folder) as tensors:
    return model, weights.load_params(model, family, tensors, dtype)
