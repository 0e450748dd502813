"""A new family of models is one file: what its config means, and which names its tensors have."""
import importlib.util
import json

import numpy as np
import pytest

from lm.hf import files, weights

FILE = '''"""StarCoder 2 (Lozhkov et al. 2024): Llama with LayerNorm, biases, and a feed-forward without a gate."""
import jax

from lm.hf import names
from lm.hf.config import Config, Sizes
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer


def model(c: Config) -> transformer.Transformer:
  """Asks for every field once: what nobody asks for is refused, and so is what has no part here."""
  c.defaults({'num_key_value_heads': 2, 'tie_word_embeddings': True})
  s, eps = Sizes.read(c), c.get('norm_epsilon', float, 1e-5)
  c.only('hidden_act', 'gelu_pytorch_tanh')
  c.only('use_bias', True)
  for name in ('embedding_dropout', 'residual_dropout'):   # of training
    c.get(name, float, None)
  attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rope(c, s.max_length, s.head_size), bias=True,
                               scores=attend.AttentionScores(window=c.size('sliding_window', None)))
  feed_forward = parts.FeedForward(s.hidden, jax.nn.gelu, gated=False, bias=True)
  block = parts.Block(attention, feed_forward, parts.LayerNorm(eps), parts.LayerNorm(eps))
  return transformer.Transformer(s.vocab, s.width, stack.stacks([block] * s.layers), parts.LayerNorm(eps),
                                 s.max_length, tied=s.tied)


def config(model: transformer.Transformer) -> dict:
  """The other way."""
  attention = model.layers[0].attention
  return {**Sizes.of(model).config(), 'norm_epsilon': model.norm.eps, 'hidden_act': 'gelu_pytorch_tanh',
          'use_bias': True, 'sliding_window': attention.scores.window,
          **rope_config(attention.rotary, attention.head_size)}


def layer(block: parts.Block) -> list[names.Map]:
  """Tensors, after `model.layers.N.`, and leaves of the block; a map turns one into the other, both ways."""
  found = list(names.llama_attention(block.attention))
  for tensor, leaf in (('c_fc', 'up'), ('c_proj', 'down')):
    found += [names.linear(f'mlp.{tensor}.weight', f'feed_forward/{leaf}'),
              names.same(f'mlp.{tensor}.bias', f'feed_forward/{leaf}_bias')]
  for tensor, leaf in (('input_layernorm', 'attention_norm'), ('post_attention_layernorm', 'feed_forward_norm')):
    found += [names.same(f'{tensor}.weight', f'{leaf}/scale'), names.same(f'{tensor}.bias', f'{leaf}/bias')]
  return found


def outer(model: transformer.Transformer) -> list[names.Map]:
  return [*names.llama_outer(model), names.same('model.norm.bias', 'norm/bias')]


FAMILY = names.Family('Starcoder2ForCausalLM', 'starcoder2', model, config, layer, outer)
'''

CONFIG = {'architectures': ['Starcoder2ForCausalLM'], 'model_type': 'starcoder2', 'hidden_size': 16,
          'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 24,
          'vocab_size': 32, 'max_position_embeddings': 64, 'sliding_window': 8, 'rope_theta': 1e5}
# Shapes as in a file of StarCoder 2: [out, in].
TENSORS = {'model.embed_tokens.weight': (32, 16), 'model.norm.weight': (16,), 'model.norm.bias': (16,)} | {
    f'model.layers.{i}.{name}': shape for i in range(2) for name, shape in {
        'self_attn.q_proj.weight': (16, 16), 'self_attn.q_proj.bias': (16,),
        'self_attn.k_proj.weight': (8, 16), 'self_attn.k_proj.bias': (8,),
        'self_attn.v_proj.weight': (8, 16), 'self_attn.v_proj.bias': (8,),
        'self_attn.o_proj.weight': (16, 16), 'self_attn.o_proj.bias': (16,),
        'mlp.c_fc.weight': (24, 16), 'mlp.c_fc.bias': (24,), 'mlp.c_proj.weight': (16, 24), 'mlp.c_proj.bias': (16,),
        'input_layernorm.weight': (16,), 'input_layernorm.bias': (16,),
        'post_attention_layernorm.weight': (16,), 'post_attention_layernorm.bias': (16,)}.items()}


@pytest.fixture
def family(tmp_path):
  path = tmp_path / 'starcoder2.py'
  path.write_text(FILE)
  spec = importlib.util.spec_from_file_location('starcoder2', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.FAMILY


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in TENSORS.items()}
  files.write(tmp_path / 'in', {name: (w.shape, w.dtype, lambda w=w: w) for name, w in arrays.items()})
  (tmp_path / 'in' / 'config.json').write_text(json.dumps(CONFIG))
  return tmp_path / 'in'


def test_a_family_in_a_file_of_its_own_imports_and_exports(family, folder, tmp_path):
  with pytest.raises(ValueError, match='Starcoder2ForCausalLM'):
    weights.open_model(folder)
  families = *weights.FAMILIES, family
  model, opened_family = weights.open_model(folder, families=families)
  assert opened_family.model is family.model
  with files.Weights(folder) as tensors:
    params = weights.load_params(model, opened_family, tensors)
  weights.write(tmp_path / 'out', model, params, families=families)
  assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == (folder / 'model.safetensors').read_bytes()
  assert weights.open_model(tmp_path / 'out', families=families)[0] == model


@pytest.mark.parametrize('field, value', [('use_bias', False), ('hidden_act', 'silu'), ('of_mine', 1)])
def test_a_field_that_the_file_does_not_read_is_refused(family, folder, field, value):
  (folder / 'config.json').write_text(json.dumps(CONFIG | {field: value}))
  with pytest.raises(ValueError, match=f'{field}={value!r}'):
    weights.open_model(folder, families=(family,))
