"""Families of Hugging Face checkpoints: `transformers` computes the same, and gets the same bytes back."""
import contextlib
import copy
import dataclasses
import functools
import gc
import json
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_rows import VOCAB, forward, jit, random_tokens, rows

from lm.describe import describe
from lm.hf import files, gpt_neox, weights
from lm.hf.config import Config
from lm.models import attention as attend
from lm.models import latent, moe
from lm.models import layers as parts
from lm.models.rotary import LongRope, Rotary, Yarn
from lm.models.stack import Stack
from lm.models.transformer import Transformer

torch = pytest.importorskip('torch')
with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  transformers = pytest.importorskip('transformers')

LLAMA = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'num_key_value_heads': 2,
         'intermediate_size': 48, 'vocab_size': VOCAB, 'max_position_embeddings': 64}
NEOX = {key: value for key, value in LLAMA.items() if key != 'num_key_value_heads'} | {'hidden_size': 64}
NO_TOKENS = dict.fromkeys(('pad_token_id', 'bos_token_id', 'eos_token_id'))   # of the class, they pass the vocabulary
GEMMA3 = LLAMA | NO_TOKENS | {
    'sliding_window': 9, 'head_dim': 12, 'num_key_value_heads': 1, 'query_pre_attn_scalar': 7,
    'layer_types': ['sliding_attention', 'sliding_attention', 'full_attention'], 'rope_parameters': {
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e3},
        'full_attention': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.}}}

QWEN_MOE = LLAMA | {'num_experts': 6, 'num_experts_per_tok': 3, 'moe_intermediate_size': 24}
GPT_OSS = LLAMA | NO_TOKENS | {
    'num_local_experts': 4, 'num_experts_per_tok': 2, 'head_dim': 16, 'sliding_window': 9, 'swiglu_limit': 0.6,
    'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 8., 'beta_fast': 8., 'beta_slow': 1.,
                        'truncate': False, 'original_max_position_embeddings': 8}}
DEEPSEEK = LLAMA | NO_TOKENS | {
    'num_key_value_heads': 4, 'kv_lora_rank': 8, 'qk_nope_head_dim': 6, 'qk_rope_head_dim': 4, 'v_head_dim': 5,
    'n_routed_experts': 8, 'moe_intermediate_size': 12, 'num_experts_per_tok': 3}
LLAMA4 = LLAMA | NO_TOKENS | {'head_dim': 12, 'num_local_experts': 4, 'intermediate_size_mlp': 40,
                              'attention_chunk_size': 9}


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny model of a family: the class of `transformers`, and its config."""
  name: str
  config: dict
  unused: tuple = ()   # fields of it that change nothing

  @property
  def architecture(self):
    return self.name.partition('-')[0]


CASES = [
    Case('GPT2LMHeadModel', {'n_embd': 32, 'n_layer': 2, 'n_head': 4, 'n_positions': 64, 'vocab_size': VOCAB}),
    Case('LlamaForCausalLM', LLAMA),
    Case('LlamaForCausalLM-3.2', LLAMA | {'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True,
                                          'head_dim': 16, 'rope_parameters': {
        'rope_type': 'llama3', 'rope_theta': 5e3, 'factor': 8., 'low_freq_factor': 1., 'high_freq_factor': 4.,
        'original_max_position_embeddings': 16}}),
    Case('GPTNeoXForCausalLM', NEOX),
    Case('GPTNeoXForCausalLM-sequential', NEOX | {
        'use_parallel_residual': False, 'attention_bias': False, 'hidden_act': 'gelu_new', 'tie_word_embeddings': True,
        'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e3, 'factor': 2., 'partial_rotary_factor': 0.5}}),
    Case('MistralForCausalLM', LLAMA | {'sliding_window': 9, 'head_dim': 12}),
    Case('MistralForCausalLM-full', LLAMA | {'sliding_window': None, 'num_key_value_heads': 1,
                                             'tie_word_embeddings': True}),
    Case('Qwen2ForCausalLM', LLAMA | {'rope_parameters': {
        'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4., 'original_max_position_embeddings': 16}},
         unused=('sliding_window', 'use_sliding_window')),
    Case('Qwen2ForCausalLM-windows', LLAMA | {'use_sliding_window': True, 'sliding_window': 9, 'max_window_layers': 1,
                                              'tie_word_embeddings': True}),
    Case('Qwen3ForCausalLM', LLAMA | {'head_dim': 12, 'use_sliding_window': True, 'sliding_window': 9,
                                      'max_window_layers': 2, 'attention_bias': True}),
    Case('SmolLM3ForCausalLM', LLAMA | {
        'no_rope_layers': [1, 0, 1], 'use_sliding_window': True, 'sliding_window': 9, 'attention_bias': True,
        'mlp_bias': True, **NO_TOKENS}),
    Case('Phi3ForCausalLM', LLAMA | NO_TOKENS | {
        'head_dim': 8, 'tie_word_embeddings': True, 'original_max_position_embeddings': 24, 'rope_parameters': {
            'rope_type': 'longrope', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5, 'short_factor': [1., 1.5],
            'long_factor': [2., 5.]}}),
    Case('Phi3ForCausalLM-window', LLAMA | NO_TOKENS | {'num_key_value_heads': 4, 'sliding_window': 9},
         unused=('original_max_position_embeddings',)),
    Case('Olmo2ForCausalLM', LLAMA | NO_TOKENS | {'attention_bias': True, 'head_dim': 12}),
    Case('Olmo3ForCausalLM', LLAMA | NO_TOKENS | {
        'sliding_window': 9, 'num_key_value_heads': 4, 'num_hidden_layers': 4, 'rope_parameters': {
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
            'full_attention': {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4.,
                               'original_max_position_embeddings': 16}}}),
    Case('Gemma2ForCausalLM', LLAMA | NO_TOKENS | {
        'sliding_window': 9, 'head_dim': 12, 'query_pre_attn_scalar': 7, 'attn_logit_softcapping': 2.,
        'final_logit_softcapping': 3.}),
    Case('Gemma2ForCausalLM-untied', LLAMA | NO_TOKENS | {
        'sliding_window': 9, 'head_dim': 12, 'layer_types': ['full_attention', 'sliding_attention', 'full_attention'],
        'attn_logit_softcapping': None, 'final_logit_softcapping': None, 'tie_word_embeddings': False,
        'attention_bias': True}),
    Case('Gemma3ForCausalLM', GEMMA3),
    Case('Gemma3ForCausalLM-untied', LLAMA | NO_TOKENS | {
        'sliding_window': 9, 'head_dim': 8, 'final_logit_softcapping': 3., 'tie_word_embeddings': False,
        'attention_bias': True, 'layer_types': ['full_attention', 'sliding_attention', 'sliding_attention']}),
    Case('MixtralForCausalLM', LLAMA | NO_TOKENS | {'num_local_experts': 5, 'sliding_window': 9, 'head_dim': 12}),
    Case('MixtralForCausalLM-full', LLAMA | NO_TOKENS | {
        'num_local_experts': 4, 'num_experts_per_tok': 3, 'tie_word_embeddings': True, 'rope_parameters': {
            'rope_type': 'linear', 'rope_theta': 1e3, 'factor': 2.}}),
    Case('Qwen2MoeForCausalLM', QWEN_MOE | {
        'shared_expert_intermediate_size': 20, 'decoder_sparse_step': 2, 'num_hidden_layers': 4,
        'use_sliding_window': True, 'sliding_window': 9, 'max_window_layers': 3, 'num_key_value_heads': 4}),
    Case('Qwen2MoeForCausalLM-sparse', QWEN_MOE | {
        'shared_expert_intermediate_size': 32, 'norm_topk_prob': True, 'qkv_bias': False, 'tie_word_embeddings': True},
         unused=('intermediate_size', 'sliding_window', 'use_sliding_window')),
    Case('Qwen3MoeForCausalLM', QWEN_MOE | {
        'norm_topk_prob': True, 'mlp_only_layers': [1], 'head_dim': 12, 'use_sliding_window': True, 'sliding_window': 9,
        'attention_bias': True}),
    Case('Qwen3MoeForCausalLM-sparse', QWEN_MOE | {'tie_word_embeddings': True, 'rope_parameters': {
        'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4., 'original_max_position_embeddings': 16}},
         unused=('intermediate_size', 'sliding_window', 'use_sliding_window')),
    Case('GptOssForCausalLM', GPT_OSS),
    Case('GptOssForCausalLM-full', LLAMA | NO_TOKENS | {
        'num_local_experts': 3, 'num_experts_per_tok': 1, 'head_dim': 12, 'attention_bias': False, 'swiglu_alpha': 1.2,
        'sliding_window': 7, 'layer_types': ['full_attention', 'full_attention', 'sliding_attention'],
        'tie_word_embeddings': True, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e3}}),
    Case('DeepseekV3ForCausalLM', DEEPSEEK | {
        'q_lora_rank': 12, 'attention_bias': True, 'n_group': 4, 'topk_group': 2, 'routed_scaling_factor': 1.5,
        'first_k_dense_replace': 1, 'rope_parameters': {
            'rope_type': 'yarn', 'rope_theta': 1e3, 'factor': 40., 'mscale': 0.7, 'mscale_all_dim': 1.,
            'original_max_position_embeddings': 16}},
         unused=('num_nextn_predict_layers',)),
    Case('DeepseekV3ForCausalLM-plain', DEEPSEEK | {
        'q_lora_rank': None, 'n_group': 1, 'topk_group': 1, 'norm_topk_prob': False, 'first_k_dense_replace': 0,
        'n_shared_experts': 2, 'rope_interleave': False, 'tie_word_embeddings': True},
         unused=('num_nextn_predict_layers', 'intermediate_size')),
    Case('Llama4ForCausalLM', LLAMA4 | {
        'num_hidden_layers': 4, 'interleave_moe_layer_step': 2, 'floor_scale': 8, 'attn_scale': 0.7}),
    Case('Llama4ForCausalLM-16E', LLAMA4 | {
        'no_rope_layers': [0, 1, 1], 'layer_types': ['chunked_attention', 'full_attention', 'chunked_attention'],
        'use_qk_norm': False, 'num_experts_per_tok': 2, 'attn_temperature_tuning': False, 'attention_bias': True,
        'tie_word_embeddings': True, 'rope_parameters': {
            'rope_type': 'llama3', 'rope_theta': 5e3, 'factor': 16., 'low_freq_factor': 1., 'high_freq_factor': 1.,
            'original_max_position_embeddings': 16}},
         unused=('intermediate_size_mlp', 'floor_scale', 'attn_scale')),
]
families = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)


def torch_model(case: Case):
  """A random one, whose parameters are all away from what they start as, and whose logits are of size one."""
  torch.manual_seed(0)
  kind = getattr(transformers, case.architecture)
  config = kind.config_class(**copy.deepcopy(case.config)) if isinstance(case.config, dict) else case.config
  model = kind(config).eval()   # float32: neither class nor config says otherwise
  model.config._attn_implementation = 'eager'
  with torch.no_grad():
    for p in model.parameters():
      if p.ndim > 1:
        p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
      else:
        p.add_(0.3 * torch.randn_like(p))
    for name, buffer in model.named_buffers():
      if name.endswith('e_score_correction_bias'):   # a weight, though nothing trains it by gradient
        buffer.add_(0.03 * torch.randn_like(buffer))
  return model


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  """(torch's model, our model, parameters, folder) of a case."""
  @functools.cache
  def make(case: Case):
    folder = tmp_path_factory.mktemp(case.name)
    theirs = torch_model(case)
    theirs.save_pretrained(folder)
    model, family = weights.open_model(folder)
    with files.Weights(folder) as found:
      params = weights.load_params(model, family, found)
    return theirs, model, params, folder
  yield make
  gc.collect()


Case.__hash__ = lambda self: hash(self.name)


def logits_of(theirs, tokens):
  with torch.no_grad():
    return theirs(torch.tensor(tokens).long(), use_cache=False).logits.numpy()


@families
def test_logits_are_those_of_transformers(opened, case):
  """On rows as long as the model can place: past windows, chunks and the original context of stretched positions."""
  theirs, model, params, _ = opened(case)
  tokens = random_tokens(2, 64)
  actual, expected = forward(model, params, rows(tokens[:1], tokens[1:])), logits_of(theirs, tokens)
  assert np.std(expected) > 0.3
  assert np.abs(actual - expected).max() <= 1e-4


@families
def test_padded_and_packed_rows_are_as_if_alone(opened, case):
  theirs, model, params, _ = opened(case)
  a, b, c = (random_tokens(n, seed=n) for n in (23, 9, 17))
  logits = np.asarray(forward(model, params, rows([a, b], [c], pads=(0, 5))))
  for document, actual in ((a, logits[0, :23]), (b, logits[0, 23:32]), (c, logits[1, 5:22])):
    assert np.abs(actual - logits_of(theirs, document[None])[0]).max() <= 1e-4


@families
def test_cached_decoding_equals_the_full_forward(opened, case):
  _, model, params, _ = opened(case)
  tokens = random_tokens(2, 40, seed=2)
  pads, params_ = (0, 5), model.unstack(params)
  batch = rows([tokens[0]], [tokens[1, :35]], pads=pads)
  step = jit(lambda params, batch, cache: model.apply(params, batch, cache=cache))
  cache, logits = model.init_cache(2, 44), []
  for part in (slice(0, 30), *(slice(i, i + 1) for i in range(30, 40))):
    out = step(params_, jax.tree.map(lambda x, part=part: x[:, part], batch), cache)
    cache = out.cache
    logits.append(out.head(out.hidden))
  logits, expected = np.concatenate(logits, axis=1), np.asarray(forward(model, params, rows(tokens[:1], tokens[1:])))
  for row, pad in enumerate(pads):
    assert np.abs(logits[row, pad:] - expected[row, :40 - pad]).max() <= 1e-4


@families
def test_what_goes_out_is_what_came_in(opened, case, tmp_path):
  """Byte for byte; and transformers opens it without a key missing or left over."""
  theirs, model, params, folder = opened(case)
  own = [family for family in weights.FAMILIES if family.architecture == case.architecture]
  weights.write(tmp_path / 'out', model, params, own)
  with files.Weights(folder) as came, files.Weights(tmp_path / 'out') as goes:
    assert set(came) == set(goes)
    for name in came:
      assert came[name].dtype == goes[name].dtype
      np.testing.assert_array_equal(came[name], goes[name], err_msg=name)
  kind = getattr(transformers, case.architecture)
  again, info = kind.from_pretrained(tmp_path / 'out', output_loading_info=True, attn_implementation='eager')
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  np.testing.assert_array_equal(logits_of(again, random_tokens(2, 64)), logits_of(theirs, random_tokens(2, 64)))
  family, values = weights.export_config(model)   # maybe of another family, that computes the same
  assert describe(family.model(Config(values))) == describe(model)


@families
def test_every_switch_of_a_config_matters_or_is_refused(opened, case):
  """A field set to another value makes another model, or is refused by its name: none is ignored."""
  _, model, _, folder = opened(case)
  values = json.loads((folder / 'config.json').read_text())
  for name, value in values.items():
    if name in ASIDE or name in case.unused or name.endswith('_token_id'):
      continue
    changed = other(value)
    with contextlib.suppress(ValueError):
      assert described(values | {name: changed}) != describe(model), f'{name}={changed!r} is ignored'


def described(values):
  config = Config(values)
  model = weights.family_of(values).model(config)
  config.finish()
  return describe(model)


# The last are what `layer_types` and `no_rope_layers` are made of where they are absent.
ASIDE = {'dtype', 'transformers_version', 'initializer_range', 'use_cache', 'attention_dropout', 'attn_pdrop',
         'embd_pdrop', 'resid_pdrop', 'hidden_dropout', 'classifier_dropout', 'model_type', 'pretraining_tp',
         'is_decoder', 'output_router_logits', 'router_aux_loss_coef', 'router_jitter_noise', 'max_window_layers',
         'no_rope_layer_interval', 'interleave_moe_layer_step', '_sliding_window_pattern'} | {
             'summary_' + name for name in ('type', 'use_proj', 'activation', 'first_dropout', 'proj_to_labels')}


def other(value):
  match value:
    case bool():
      return not value
    case int():
      return value // 2 or 2
    case float():
      return value * 64
    case str():
      return 'another'
    case dict():
      return {key: item if isinstance(item, str) else other(item) for key, item in value.items()} or {'x': 1}
    case list():
      return [other(item) for item in value] or [1]
    case None:
      return 3


def minimal(family):
  """Sizes, as files that leave out all else have them."""
  return {'architectures': [family.architecture], **(NEOX if family.architecture.startswith('GPTNeoX') else LLAMA)}


@pytest.mark.parametrize('family', [family for family in weights.FAMILIES
                                    if family.architecture.endswith('ForCausalLM')], ids=lambda f: f.architecture)
def test_absent_fields_have_the_values_that_transformers_gives_them(family):
  heads = 128 if family.model_type == 'deepseek_v3' else 32   # a multiple of all default kv_heads
  sizes = minimal(family) | {'hidden_size': 256, 'num_attention_heads': heads}
  sizes.pop('num_key_value_heads', None)
  kind = getattr(transformers, family.architecture).config_class
  filled = json.loads(kind(**sizes).to_json_string())
  assert described(sizes) == described(filled | {'architectures': [family.architecture]})


OLD = [
    ('GPTNeoXForCausalLM', {'rotary_emb_base': 5000, 'rotary_pct': 0.5, 'rope_scaling': {
        'type': 'linear', 'factor': 2.}}),
    ('MistralForCausalLM', {'rope_theta': 5000., 'sliding_window': None}),
    ('Qwen2ForCausalLM', {'rope_theta': 5000., 'use_sliding_window': True, 'sliding_window': 9,
                          'max_window_layers': 2}),
    ('Qwen2ForCausalLM', {'use_sliding_window': False, 'sliding_window': 9, 'max_window_layers': 2, 'rope_scaling': {
        'type': 'yarn', 'factor': 4., 'original_max_position_embeddings': 16}}),
    ('Qwen3ForCausalLM', {'rope_theta': 5000., 'head_dim': 12, 'use_sliding_window': True, 'sliding_window': 9,
                          'max_window_layers': 1}),
    ('SmolLM3ForCausalLM', {'rope_theta': 5e6, 'no_rope_layer_interval': 2, 'use_sliding_window': True,
                            'sliding_window': 9}),
    ('Phi3ForCausalLM', {'rope_theta': 5000., 'partial_rotary_factor': 0.5, 'original_max_position_embeddings': 24,
                         'rope_scaling': {'type': 'longrope', 'short_factor': [1., 2.], 'long_factor': [3., 4.]}}),
    ('Olmo2ForCausalLM', {'rope_theta': 500000, 'rope_scaling': None}),
    ('Olmo3ForCausalLM', {'rope_theta': 500000, 'rope_scaling': {
        'rope_type': 'yarn', 'factor': 8., 'original_max_position_embeddings': 16, 'attention_factor': 1.2,
        'beta_fast': 32., 'beta_slow': 1.}}),
    ('Gemma2ForCausalLM', {'rope_theta': 5000., 'cache_implementation': 'hybrid', 'hidden_act': 'gelu_pytorch_tanh'}),
    ('Gemma3ForCausalLM', {'rope_theta': 5e5, 'rope_local_base_freq': 5e3, 'sliding_window_pattern': 2,
                           'rope_scaling': {'rope_type': 'linear', 'factor': 8.}}),
    ('Gemma3ForCausalLM', {'_sliding_window_pattern': 6, 'use_bidirectional_attention': False}),
    ('MixtralForCausalLM', {'rope_theta': 5000., 'num_local_experts': 4, 'sliding_window': 4096}),
    ('Qwen2MoeForCausalLM', {'rope_theta': 5000., 'use_sliding_window': False, 'sliding_window': 9,
                             'max_window_layers': 2, 'decoder_sparse_step': 2, 'norm_topk_prob': False}),
    ('Qwen2MoeForCausalLM', {'use_sliding_window': True, 'sliding_window': 9, 'max_window_layers': 2,
                             'mlp_only_layers': [2]}),
    ('Qwen3MoeForCausalLM', {'rope_theta': 1000000, 'head_dim': 12, 'max_window_layers': 48, 'sliding_window': None,
                             'use_sliding_window': False, 'num_experts': 96, 'rope_scaling': None}),
    ('GptOssForCausalLM', {
        'rope_theta': 150000, 'experts_per_token': 4, 'initial_context_length': 4096, 'rope_scaling': {
            'beta_fast': 32., 'beta_slow': 1., 'factor': 32., 'original_max_position_embeddings': 4096,
            'rope_type': 'yarn', 'truncate': False}}),
    ('GptOssForCausalLM', {'rope_theta': 5000, 'num_experts': 16}),
    ('DeepseekV3ForCausalLM', {
        'num_key_value_heads': 4, 'rope_theta': 10000, 'moe_layer_freq': 1, 'scoring_func': 'sigmoid', 'seq_aux': True,
        'topk_method': 'noaux_tc', 'aux_loss_alpha': 0.001, 'ep_size': 1, 'num_nextn_predict_layers': 1,
        'max_position_embeddings': 640, 'rope_scaling': {
            'type': 'yarn', 'factor': 40, 'mscale': 1.0, 'mscale_all_dim': 1.0, 'beta_fast': 32, 'beta_slow': 1,
            'original_max_position_embeddings': 16}}),
    ('Llama4ForCausalLM', {
        'rope_theta': 5000., 'no_rope_layers': [], 'no_rope_layer_interval': 2, 'for_llm_compressor': False,
        'interleave_moe_layer_step': 2, 'cache_implementation': 'hybrid', 'rope_scaling': {
            'rope_type': 'llama3', 'factor': 8., 'low_freq_factor': 1., 'high_freq_factor': 4.,
            'original_max_position_embeddings': 16}}),
]


@pytest.mark.parametrize('architecture, fields', OLD, ids=lambda value: value if isinstance(value, str) else '')
def test_an_old_config_is_read_as_transformers_reads_it(architecture, fields):
  family = next(family for family in weights.FAMILIES if family.architecture == architecture)
  old = minimal(family) | fields
  new = json.loads(getattr(transformers, architecture).config_class(**copy.deepcopy(old)).to_json_string())
  assert described(old) == described(new | {'architectures': [architecture]})


def test_the_first_files_of_llama_4_have_a_number_for_a_switch():
  sizes = {'architectures': ['Llama4ForCausalLM'], **LLAMA, 'num_hidden_layers': 4}
  assert described(sizes | {'attn_temperature_tuning': 4}) == described(sizes)
  assert described(sizes | {'attn_temperature_tuning': False}) != described(sizes)


@pytest.mark.parametrize('architecture, fields', [
    ('LlamaForCausalLM', {'partial_rotary_factor': 0.5}),
    ('LlamaForCausalLM', {'rope_scaling': {'type': 'dynamic', 'factor': 2.}}),
    ('MistralForCausalLM', {'layer_types': ['full_attention'] * 3}),
    ('Qwen2ForCausalLM', {'layer_types': ['full_attention', 'sliding_attention', 'full_attention']}),
    ('Qwen3ForCausalLM', {'layer_types': ['full_attention']}),
    ('Qwen3ForCausalLM', {'layer_types': ['full_attention', 'linear_attention', 'full_attention']}),
    ('SmolLM3ForCausalLM', {'no_rope_layers': [1, 0]}),
    ('Phi3ForCausalLM', {'rope_scaling': {'type': 'linear', 'factor': 2.}}),
    ('Olmo3ForCausalLM', {'rope_theta': 1e4}),
    ('Olmo3ForCausalLM', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}),
    ('Gemma2ForCausalLM', {'use_bidirectional_attention': True}),
    ('Gemma3ForCausalLM', {'attn_logit_softcapping': 50.}),
    ('MixtralForCausalLM', {'num_experts_per_tok': 9}), ('MixtralForCausalLM', {'num_local_experts': -8}),
    ('MixtralForCausalLM', {'num_local_experts': 4, 'num_experts': 8}),
    ('MixtralForCausalLM', {'num_local_experts': 20_000}), ('MixtralForCausalLM', {'hidden_act': 'gelu'}),
    ('Qwen2MoeForCausalLM', {'num_experts': 0}), ('Qwen2MoeForCausalLM', {'num_local_experts': 60}),
    ('Qwen2MoeForCausalLM', {'moe_intermediate_size': -1}), ('Qwen2MoeForCausalLM', {'mlp_only_layers': [0, 3]}),
    ('Qwen2MoeForCausalLM', {'decoder_sparse_step': 0}), ('Qwen3MoeForCausalLM', {'mlp_only_layers': [-1]}),
    ('Qwen3MoeForCausalLM', {'mlp_only_layers': [True]}), ('Qwen3MoeForCausalLM', {'num_experts_per_tok': 0}),
    ('Qwen3MoeForCausalLM', {'use_sliding_window': True, 'max_window_layers': 2}),
    ('GptOssForCausalLM', {'rope_parameters': None}), ('GptOssForCausalLM', {'swiglu_limit': -7.}),
    ('GptOssForCausalLM', {'experts_per_token': 2}), ('GptOssForCausalLM', {'initial_context_length': 8}),
    ('DeepseekV3ForCausalLM', {'num_key_value_heads': 2}),
    ('DeepseekV3ForCausalLM', {'num_key_value_heads': 4, 'n_group': 3}),
    ('DeepseekV3ForCausalLM', {'num_key_value_heads': 4, 'topk_group': 9}),
    ('DeepseekV3ForCausalLM', {'num_key_value_heads': 4, 'num_experts_per_tok': 129}),
    ('DeepseekV3ForCausalLM', {'num_key_value_heads': 4, 'scoring_func': 'softmax'}),
    ('Llama4ForCausalLM', {'num_experts_per_tok': 17}),
    ('Llama4ForCausalLM', {'moe_layers': [1, 3]}),
    ('Llama4ForCausalLM', {'no_rope_layers': [1, 0]}),
    ('Llama4ForCausalLM', {'layer_types': ['sliding_attention'] * 3}),
    ('Llama4ForCausalLM', {'attention_chunk_size': None})])
def test_what_no_model_here_computes_is_refused_by_name(architecture, fields):
  values = next(minimal(family) for family in weights.FAMILIES if family.architecture == architecture) | fields
  with pytest.raises(ValueError, match='|'.join([*fields, 'rope_parameters', 'use_sliding_window', 'rope_type'])):
    described(values)


VISION = {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 16,
          'image_size': 28, 'patch_size': 14}
WITH_IMAGES = {
    'Gemma3': {'text_config': GEMMA3, 'vision_config': VISION | {'vision_use_head': False}, 'mm_tokens_per_image': 4},
    'Llama4': {'text_config': LLAMA4 | {'interleave_moe_layer_step': 2}, 'vision_config': VISION | {
        'vision_output_dim': 16, 'projector_input_dim': 16, 'projector_output_dim': 16}}}


@pytest.mark.parametrize('kind', WITH_IMAGES)
def test_of_models_that_see_images_the_language_model_is_read(kind, tmp_path):
  """And written by itself; a folder may leave out sizes that are those of the class."""
  config = getattr(transformers, kind + 'Config')(
      **WITH_IMAGES[kind], image_token_index=95, boi_token_index=93, eoi_token_index=94)
  theirs = torch_model(Case(kind + 'ForConditionalGeneration', config))
  theirs.save_pretrained(tmp_path / 'in')
  model, family = weights.open_model(tmp_path / 'in')
  with files.Weights(tmp_path / 'in') as found:
    params = weights.load_params(model, family, found)
  tokens = random_tokens(2, 64) % 90
  expected = logits_of(theirs, tokens)
  assert np.abs(forward(model, params, rows(tokens[:1], tokens[1:])) - expected).max() <= 1e-4
  weights.write(tmp_path / 'out', model, params)
  alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager')
  assert type(alone) is getattr(transformers, kind + 'ForCausalLM')
  np.testing.assert_array_equal(logits_of(alone, tokens), expected)


def test_a_model_that_sees_images_may_leave_out_all_that_is_so_in_its_class():
  for kind in WITH_IMAGES:
    text = json.loads(getattr(transformers, kind + 'TextConfig')().to_json_string())
    named = {'architectures': [kind + 'ForConditionalGeneration']}
    assert described(named | {'text_config': {}}) == described(named | {'text_config': text})


def test_layers_of_deepseek_that_predict_further_tokens_are_left_out(opened, tmp_path):
  """As the files of V3 and R1 have them; but a layer too many is refused, and so are experts that are not alike."""
  _, model, params, folder = opened(next(case for case in CASES if case.name == 'DeepseekV3ForCausalLM'))
  further = 'model.layers.61.'

  def load(name, change):
    with files.Weights(folder) as found:
      tensors = {key: (w.shape, w.dtype, lambda w=w: w) for key, w in change(dict(found)).items()}
      files.write(tmp_path / name, tensors)
    model, family = weights.open_model(folder)
    with files.Weights(tmp_path / name) as found:
      return weights.load_params(model, family, found)

  own = load('further', lambda found: found | {
      further + name.removeprefix('model.layers.2.'): w for name, w in found.items() if '.2.' in name} | {
          further + name: found['model.norm.weight'] for name in (
              'enorm.weight', 'hnorm.weight', 'shared_head.norm.weight', 'eh_proj.weight', 'embed_tokens.weight')})
  assert jax.tree.all(jax.tree.map(np.array_equal, own, params))
  expert = 'model.layers.2.mlp.experts.5.up_proj.weight'
  for name, change, message in (
      ('more', lambda found: found | {further.replace('61', '3') + 'mlp.gate.weight': found[expert]}, 'not weights'),
      ('missing', lambda found: {key: w for key, w in found.items() if key != expert}, f'{expert} is missing'),
      ('odd', lambda found: found | {expert: found[expert][1:]}, r'\(11, 32\) make .* where the config gives')):
    with pytest.raises(ValueError, match=message):
      load(name, change)


def replaced(kind, change):
  """Parts of `kind`, with the fields that `change` gives; falsy where it leaves a part alone."""
  def apply(part):
    fields = change(part) if isinstance(part, kind) else None
    return part if not fields else part.clone(**fields) if isinstance(part, nn.Module) else (
        dataclasses.replace(part, **fields))
  return apply


def swapped(block):
  other = {parts.Block: parts.ParallelBlock, parts.ParallelBlock: parts.Block}.get(type(block))
  if other is None or getattr(block, 'attention_norm', None) is None:
    return block
  return other(block.attention, block.feed_forward, block.attention_norm, block.feed_forward_norm)


def moved(block):
  """Norms before what they were after, or the other way; both, before alone."""
  if not isinstance(block, parts.Block):
    return block
  before = block.attention_norm, block.feed_forward_norm
  after = block.attention_out_norm, block.feed_forward_out_norm
  both = None not in before + after
  return parts.Block(block.attention, block.feed_forward, *(before if both else after),
                     *((None, None) if both else before))


def turned(model):
  """Each layer with the attention of the next."""
  blocks = [stack.pattern[0] for stack in model.blocks]
  return {'blocks': tuple(Stack((block.clone(attention=other.attention),), 1)
                          for block, other in zip(blocks, (*blocks[1:], blocks[0])))}


WRONG = {
    'a window longer by one': replaced(attend.Scores, lambda s: s.window and {'window': s.window + 1}),
    'a window shorter by one': replaced(attend.Scores, lambda s: s.window and {'window': s.window - 1}),
    'another scale': replaced(attend.Scores, lambda s: {'scale': (s.scale or 0.3) * 1.1}),
    'no soft cap': replaced((attend.Scores, Transformer), lambda s: s.softcap and {'softcap': None}),
    'another theta': replaced(Rotary, lambda r: {'theta': r.theta * 1.1}),
    'neighbours as pairs': replaced(Rotary, lambda r: {'interleaved': True}),
    'all of a head turns': replaced(
        Rotary, lambda r: r.size and not isinstance(r.scaling, LongRope) and {'size': None}),
    'no stretched positions': replaced(Rotary, lambda r: r.scaling and {'scaling': None}),
    'cosines of size one': replaced((Yarn, LongRope), lambda s: {'attention': 1.}),
    'no positions': replaced(attend.Attention, lambda a: a.rotary and {'rotary': None}),
    'positions on all layers': replaced(attend.Attention, lambda a: not a.rotary and {'rotary': Rotary()}),
    'no bias': replaced((attend.Attention, parts.FeedForward, moe.Experts), lambda a: a.bias and {'bias': False}),
    'an output bias more or less': replaced(attend.Attention, lambda a: a.bias and {'out_bias': a.out_bias is False}),
    'no norm of queries': replaced((attend.Attention, latent.LatentAttention),
                                   lambda a: a.query_norm and {'query_norm': None}),
    'no norm of keys': replaced(attend.Attention, lambda a: a.key_norm and {'key_norm': None}),
    'norms after the rotation': replaced(attend.Attention, lambda a: a.query_norm and {'norms_last': True}),
    'another offset': replaced(parts.RMSNorm, lambda n: {'offset': 1 - n.offset}),
    'another epsilon': replaced((parts.RMSNorm, parts.LayerNorm), lambda n: {'eps': 0.01}),
    'another activation': replaced(parts.FeedForward, lambda f: {'activation': {
        parts.silu_gated: parts.gelu_gated, parts.gelu_gated: parts.silu_gated, jax.nn.gelu: gpt_neox.erf_gelu,
        gpt_neox.erf_gelu: jax.nn.gelu}[f.activation]}),
    'no bias of the router': replaced(moe.SoftmaxRouter, lambda r: r.bias and {'bias': False}),
    'weights that sum to one, or not': replaced(moe.SoftmaxRouter, lambda r: {'renormalize': not r.renormalize}),
    'an expert less for a token': replaced(moe.SoftmaxRouter, lambda r: {'top_k': r.top_k - 1}),
    'another limit': replaced(moe.ClampedGated, lambda a: {'limit': a.limit * 1.1}),
    'another slope': replaced(moe.ClampedGated, lambda a: {'alpha': a.alpha * 1.1}),
    'no sinks': replaced(attend.Attention, lambda a: a.sinks and {'sinks': False}),
    'no gate of the shared expert': replaced(moe.Experts, lambda e: e.shared_gate and {'shared_gate': False}),
    'no shared expert': replaced(moe.Experts, lambda e: e.shared and {'shared': None, 'shared_gate': False}),
    'side by side, or in turn': swapped,
    'norms elsewhere': moved,
    'attention of other layers': replaced(Transformer, turned),
    'another head': replaced(Transformer, lambda m: {'tied': not m.tied}),
    'no norm of the latent': replaced(latent.LatentAttention, lambda a: {'key_value_norm': None}),
    'no bias of the latents': replaced(latent.LatentAttention, lambda a: a.bias and {'bias': False}),
    'no temperature': replaced(attend.Attention, lambda a: a.temperature and {'temperature': None}),
    'a temperature one position later': replaced(attend.Temperature, lambda t: {'floor': t.floor + 1}),
    'a chunk longer by one': replaced(attend.Scores, lambda s: s.chunk and {'chunk': s.chunk + 1}),
    'a window for chunks': replaced(attend.Scores, lambda s: s.chunk and {'window': s.chunk, 'chunk': None}),
    'an expert less': replaced((moe.SigmoidRouter, moe.SigmoidGroupRouter),
                               lambda r: r.top_k > 1 and {'top_k': r.top_k - 1}),
    'all groups': replaced(moe.SigmoidGroupRouter, lambda r: r.groups > 1 and {'groups': 1, 'top_groups': 1}),
    'a group more': replaced(moe.SigmoidGroupRouter,
                             lambda r: r.top_groups < r.groups and {'top_groups': r.top_groups + 1}),
    'weights that do not sum to one': replaced(moe.SigmoidGroupRouter, lambda r: {'renormalize': not r.renormalize}),
    'another scale of experts': replaced(moe.SigmoidGroupRouter, lambda r: {'scale': r.scale * 1.01}),
    'weights on the other side': replaced(moe.Experts, lambda e: {'weight_inputs': not e.weight_inputs}),
    'no scale of the embedding': replaced(Transformer, lambda m: m.embedding_scale and {'embedding_scale': None}),
}


def changed(part, change):
  """`part` with `change` made to it and all that it holds."""
  match part:
    case tuple():
      return tuple(changed(item, change) for item in part)
    case _ if not dataclasses.is_dataclass(part):
      return part
  fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in ('parent', 'name')}
  new = {name: changed(value, change) for name, value in fields.items()}
  new = {name: value for name, value in new.items() if value is not fields[name]}
  if new:
    part = part.clone(**new) if isinstance(part, nn.Module) else dataclasses.replace(part, **new)
  return change(part)


@pytest.mark.parametrize('case', [case for case in CASES[1:] if '-' not in case.name], ids=lambda case: case.name)
def test_each_part_matters(opened, case):
  """Logits show any part that is wrong, so that equal logits show that all are right."""
  _, model, params, _ = opened(case)
  # A layer of each sort, in a stack of its own, and every parameter that a wrong model may ask for.
  kept = dict(zip(model.layers, model.unstack(params)['blocks']))
  layers = kept.values()
  alike = {'attention_norm': 'attention_out_norm', 'feed_forward_norm': 'feed_forward_out_norm'}
  alike |= {b: a for a, b in alike.items()}
  layers = [{**{alike[name]: tree for name, tree in layer.items() if name in alike}, **layer} for layer in layers]
  for layer in layers:
    layer['attention'] = {'out_bias': layer['feed_forward_norm']['scale'], **layer['attention']}
  params = {'head': jnp.flip(params['embedding']), **params,
            'blocks': {str(i): jax.tree.map(lambda x: x[None], layer) for i, layer in enumerate(layers)}}
  model = model.clone(blocks=tuple(Stack((block,), 1) for block in kept), remat=None)
  batch = rows(random_tokens(1, 64), random_tokens(1, 40, seed=1))
  def logits(model):
    out = model.apply(params, batch)
    return np.asarray(out.head(out.hidden))[batch.segments > 0]
  with jax.disable_jit():
    right, tried = logits(model), []
    for name, change in WRONG.items():
      wrong = changed(model, change)
      if describe(wrong) != describe(model):
        assert np.abs(logits(wrong) - right).max() > 1e-4, name
        tried.append(name)
  assert len(tried) >= 10
