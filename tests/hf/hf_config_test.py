"""Any config.json gives a model or one clear error."""
import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.hf import weights
from lm.hf.config import Config
from lm.hf.rope import rope
from lm.models import rotary

LLAMA = {'architectures': ['LlamaForCausalLM'], 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'intermediate_size': 48, 'vocab_size': 64, 'max_position_embeddings': 64,
         'rms_norm_eps': 1e-5, 'hidden_act': 'silu', 'tie_word_embeddings': False, 'head_dim': 8,
         'attention_bias': False,
         'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 1e4, 'factor': 8., 'low_freq_factor': 1.,
                             'high_freq_factor': 4., 'original_max_position_embeddings': 16}}
GPT2 = {'architectures': ['GPT2LMHeadModel'], 'n_embd': 32, 'n_layer': 2, 'n_head': 4, 'n_positions': 64,
        'vocab_size': 64, 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'n_inner': None}
SPARSE = {name: value for name, value in LLAMA.items() if name != 'attention_bias'} | {'num_experts_per_tok': 2}
MIXTRAL = {**SPARSE, 'architectures': ['MixtralForCausalLM'], 'num_local_experts': 4, 'sliding_window': None,
           'router_jitter_noise': 0.}
QWEN_MOE = {**SPARSE, 'num_experts': 4, 'moe_intermediate_size': 16, 'decoder_sparse_step': 2, 'mlp_only_layers': [0],
            'norm_topk_prob': False, 'use_sliding_window': True, 'sliding_window': 8}
QWEN2_MOE = {**QWEN_MOE, 'architectures': ['Qwen2MoeForCausalLM'], 'shared_expert_intermediate_size': 16,
             'qkv_bias': True, 'max_window_layers': 1}
QWEN3_MOE = {**QWEN_MOE, 'architectures': ['Qwen3MoeForCausalLM'], 'attention_bias': True, 'quantization_config': {
    'quant_method': 'fp8', 'weight_block_size': [128, 128], 'activation_scheme': 'dynamic', 'fmt': 'e4m3'}}
GPT_OSS = {**SPARSE, 'architectures': ['GptOssForCausalLM'], 'num_local_experts': 4, 'sliding_window': 8,
           'swiglu_limit': 7., 'swiglu_alpha': 1.702, 'experts_per_token': 2, 'attention_bias': True,
           'layer_types': ['sliding_attention', 'full_attention'], 'initial_context_length': 16,
           'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 8., 'truncate': False,
                               'original_max_position_embeddings': 16},
           'quantization_config': {'quant_method': 'mxfp4', 'modules_to_not_convert': ['lm_head']}}
BASES = [LLAMA, GPT2, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, -1, 1, 10 ** 12, 2 ** 63, 'yarn', 'longrope', 'linear', 'default', 'dynamic', 1e308,
                       5e-324]),
    lambda inner: (st.lists(inner, max_size=3)
                   | st.dictionaries(st.sampled_from(sorted(LLAMA['rope_parameters'])), inner)), max_leaves=5)


@pytest.mark.parametrize('values', BASES, ids=lambda values: values['architectures'][0])
def test_each_base_config_is_a_model(values, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(values))
  weights.open_model(tmp_path)


@pytest.mark.slow
@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=st.sampled_from(BASES), data=st.data())
def test_any_config_is_a_model_or_a_value_error(base, data, tmp_path):
  values = copy.deepcopy(base)
  for _ in range(data.draw(st.integers(1, 3))):
    where = values
    inner = [value for value in values.values() if isinstance(value, dict)]
    if inner and data.draw(st.booleans()):
      where = data.draw(st.sampled_from(inner))
    where[data.draw(st.sampled_from(sorted(where) or ['factor']) | st.text(max_size=4))] = data.draw(json_values)
  (tmp_path / 'config.json').write_text(json.dumps(values))
  try:
    model, _ = weights.open_model(tmp_path)
  except ValueError as error:
    assert '\n' not in str(error)
  else:
    assert model.vocab > 0 and len(model.layers) > 0


@pytest.mark.parametrize('text', ['', '[]', '{', 'null', '[' * 100_000, '{"architectures": 5}',
                                  '{"architectures": "x"}', '{"architectures": [["x"]]}', '\x00',
                                  '{"quantization_config": 3}'])
def test_malformed_configs_are_refused(text, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match='config.json|architectures'):
    weights.open_model(tmp_path)


def test_older_files_spell_rotary_scaling_in_another_way():
  scaling = {'type': 'linear', 'factor': 4.}
  new = rope(Config({'rope_parameters': {'rope_type': 'linear', 'factor': 4., 'rope_theta': 5e5}}), 64, 8)
  assert rope(Config({'rope_theta': 5e5, 'rope_scaling': scaling}), 64, 8) == new == rotary.Rotary(
      5e5, scaling=rotary.Linear(4.))
