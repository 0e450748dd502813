"""Each config field of Hugging Face models is read as `transformers` reads it, or refused by its name."""
import contextlib
import copy
import json

import pytest
from helpers import hf_cases
from helpers.config_values import other

from lm.hf import weights

CASES, LLAMA, NEOX = hf_cases.CASES, hf_cases.LLAMA, hf_cases.NEOX
described, transformers = hf_cases.described, hf_cases.transformers


# The last of them give `layer_types` and `no_rope_layers`, where these are absent.
ASIDE = {'dtype', 'transformers_version', 'initializer_range', 'use_cache', 'attention_dropout', 'attn_pdrop',
         'embd_pdrop', 'resid_pdrop', 'hidden_dropout', 'classifier_dropout', 'model_type', 'pretraining_tp',
         'is_decoder', 'output_router_logits', 'router_aux_loss_coef', 'router_jitter_noise', 'max_window_layers',
         'no_rope_layer_interval', 'interleave_moe_layer_step', '_sliding_window_pattern'} | {
             'summary_' + name for name in ('type', 'use_proj', 'activation', 'first_dropout', 'proj_to_labels')}


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_every_switch_of_a_config_matters_or_is_refused(case):
  """A field with another value gives another model, or is refused by its name. No field is ignored."""
  config = getattr(transformers, case.architecture).config_class(**copy.deepcopy(case.config))
  values = json.loads(config.to_json_string()) | {'architectures': [case.architecture]}
  model = described(values)
  for name, value in values.items():
    if name in ASIDE or name in case.unused or name.endswith('_token_id'):
      continue
    changed = other(value)
    with contextlib.suppress(ValueError):
      assert described(values | {name: changed}) != model, f'{name}={changed!r} is ignored'


def minimal(family):
  """Returns the sizes alone, as files have them that leave out all other fields."""
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
