"""Tiny models of the families of Hugging Face, for the tests that compare with `transformers`.

A test file that imports this one is skipped where torch or transformers is not installed.
"""
import copy
import dataclasses
import functools
import warnings

import pytest
from helpers.hf_rows import VOCAB

from lm.hf import files, weights
from lm.hf.config import Config
from lm.workdir.describe import describe

torch = pytest.importorskip('torch')
with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  transformers = pytest.importorskip('transformers')

LLAMA = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'num_key_value_heads': 2,
         'intermediate_size': 48, 'vocab_size': VOCAB, 'max_position_embeddings': 64}
NEOX = {key: value for key, value in LLAMA.items() if key != 'num_key_value_heads'} | {'hidden_size': 64}
# The default ids of the config classes exceed this small vocabulary.
NO_TOKENS = dict.fromkeys(('pad_token_id', 'bos_token_id', 'eos_token_id'))
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
  """A tiny model of a family: the class of `transformers`, with an optional suffix, and the fields of its config."""
  name: str
  config: dict
  unused: tuple = ()   # fields of the config that change no logit

  @property
  def architecture(self):
    return self.name.partition('-')[0]

  def __hash__(self):   # the config is a dict, which has no hash
    return hash(self.name)


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

def torch_model(case: Case):
  """Returns a random torch model. Every parameter differs from its initial value, and the logits are of order one."""
  torch.manual_seed(0)
  kind = getattr(transformers, case.architecture)
  config = kind.config_class(**copy.deepcopy(case.config)) if isinstance(case.config, dict) else case.config
  model = kind(config).eval()   # in float32, the default of class and config
  model.config._attn_implementation = 'eager'
  with torch.no_grad():
    for p in model.parameters():
      if p.ndim > 1:
        p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
      else:
        p.add_(0.3 * torch.randn_like(p))
    for name, buffer in model.named_buffers():
      if name.endswith('e_score_correction_bias'):   # a buffer that counts as a weight
        buffer.add_(0.03 * torch.randn_like(buffer))
  return model


def opener(make_folder):
  """Returns a cached function from a case to (torch model, our model, our params, folder)."""
  @functools.cache
  def make(case: Case):
    folder = make_folder(case.name)
    theirs = torch_model(case)
    theirs.save_pretrained(folder)
    model, family = weights.open_model(folder)
    with files.Weights(folder) as tensors:
      params = weights.load_params(model, family, tensors)
    return theirs, model, params, folder
  return make


def logits_of(theirs, tokens):
  """Returns the logits [B, T, V] of a torch model for token ids [B, T], as a NumPy array."""
  with torch.no_grad():
    return theirs(torch.tensor(tokens).long(), use_cache=False).logits.numpy()


def described(values):
  """Returns the description of our model for the fields of a config, and checks that every field was read."""
  config = Config(values)
  model = weights.family_of(values).model(config)
  config.finish()
  return describe(model)
