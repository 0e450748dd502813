"""Fields of config.json that several published models share."""

COMMON = {'torch_dtype': 'bfloat16', 'transformers_version': '4.40.0', 'use_cache': True, 'initializer_range': 0.02,
          'vocab_size': 32000, 'bos_token_id': 1, 'eos_token_id': 2, 'tie_word_embeddings': False}
ROTARY = {'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'attention_dropout': 0., 'rope_theta': 10000.}


def sizes(width, layers, heads, kv_heads, hidden, length, **others):
  """Returns the fields of a shape, and `others`."""
  return {'hidden_size': width, 'num_hidden_layers': layers, 'num_attention_heads': heads,
          'num_key_value_heads': kv_heads, 'intermediate_size': hidden, 'max_position_embeddings': length, **others}


def no_kv(fields):
  """Returns the fields without the number of key-value heads."""
  return {name: value for name, value in fields.items() if name != 'num_key_value_heads'}


def llama3(factor):
  """Returns the `rope_scaling` of Llama 3."""
  return {'factor': factor, 'low_freq_factor': 1., 'high_freq_factor': 4., 'original_max_position_embeddings': 8192,
          'rope_type': 'llama3'}


def gpt2(width, layers, heads, **others):
  """Returns the fields of a shape as GPT-2 calls them, and `others`."""
  return {'n_embd': width, 'n_layer': layers, 'n_head': heads, **others}


OLD_GPT2 = {'n_special': 0, 'predict_special_tokens': True}
PHI4_MINI = {'vocab_size': 200064, 'full_attn_mod': 1, 'interpolate_factor': 1, 'lm_head_bias': False,
             'mlp_bias': False, 'partial_rotary_factor': 0.75, 'tie_word_embeddings': True, 'sliding_window': 262144,
             'attention_bias': False, 'rope_scaling': {
                 'type': 'longrope', 'short_factor': [1.] * 48, 'long_factor': [1.1] * 48}}
SMOLLM2 = {'is_llama_config': True, 'rope_interleaved': False, 'pretraining_tp': 1, 'rope_scaling': None,
           'attention_bias': False, 'tie_word_embeddings': True, 'vocab_size': 49152, 'mlp_bias': False,
           'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16', 'q4f16': 'float16'}}}
QWEN2 = {'rope_theta': 1e6, 'vocab_size': 151936, 'rms_norm_eps': 1e-6, 'sliding_window': 32768,
         'use_sliding_window': False, 'max_window_layers': 21}
QWEN3 = {**QWEN2, 'head_dim': 128, 'attention_bias': False, 'rope_scaling': None, 'sliding_window': None}
GEMMA3 = {'hidden_activation': 'gelu_pytorch_tanh', 'rms_norm_eps': 1e-6, 'attn_logit_softcapping': None,
          'final_logit_softcapping': None, 'attention_bias': False, 'query_pre_attn_scalar': 256, 'head_dim': 256,
          'rope_local_base_freq': 10000., 'rope_theta': 1e6, 'sliding_window': 512, 'vocab_size': 262144,
          'cache_implementation': 'hybrid', 'pad_token_id': 0, 'eos_token_id': [1, 106]}
GEMMA3_TYPES = [('sliding_attention', 'full_attention')[(i + 1) % 6 == 0] for i in range(26)]
YARN = {'beta_fast': 32, 'beta_slow': 1, 'factor': 40, 'mscale': 1., 'mscale_all_dim': 1.,
        'original_max_position_embeddings': 4096, 'type': 'yarn'}
DEEPSEEK = {
    'aux_loss_alpha': 0.001, 'ep_size': 1, 'first_k_dense_replace': 3, 'kv_lora_rank': 512, 'moe_layer_freq': 1,
    'moe_intermediate_size': 2048, 'n_group': 8, 'n_routed_experts': 256, 'n_shared_experts': 1,
    'norm_topk_prob': True, 'num_experts_per_tok': 8, 'num_nextn_predict_layers': 1, 'pretraining_tp': 1,
    'q_lora_rank': 1536, 'qk_nope_head_dim': 128, 'qk_rope_head_dim': 64, 'routed_scaling_factor': 2.5,
    'scoring_func': 'sigmoid', 'seq_aux': True, 'topk_group': 4, 'topk_method': 'noaux_tc', 'v_head_dim': 128,
    'attention_bias': False, 'rms_norm_eps': 1e-6, 'rope_scaling': YARN, 'vocab_size': 129280,
    'auto_map': {'AutoConfig': 'configuration_deepseek.DeepseekV3Config'}}
FP8 = {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8', 'weight_block_size': [128, 128]}
V3 = sizes(7168, 61, 128, 128, 18432, 163840, **DEEPSEEK, quantization_config=FP8)
LLAMA4 = {
    'attention_bias': False, 'attention_chunk_size': 8192, 'head_dim': 128, 'intermediate_size_mlp': 16384,
    'model_type': 'llama4_text', 'num_experts_per_tok': 1, 'use_qk_norm': True, 'vocab_size': 202048,
    'rope_theta': 500000., 'output_router_logits': False, 'router_aux_loss_coef': 0.001, 'router_jitter_noise': 0.,
    'no_rope_layers': [], 'for_llm_compressor': False, 'bos_token_id': 200000, 'eos_token_id': [200001, 200007, 200008],
    'pad_token_id': 200018, '_attn_implementation_autoset': True, 'cache_implementation': 'hybrid'}
SCOUT = sizes(5120, 48, 40, 8, 8192, 10485760, **LLAMA4, num_local_experts=16, interleave_moe_layer_step=1,
              attn_temperature_tuning=4, floor_scale=8192, attn_scale=0.1, rope_scaling=llama3(16.) | {
                  'high_freq_factor': 1.})
MAVERICK = sizes(5120, 48, 40, 8, 8192, 1048576, **LLAMA4, num_local_experts=128, interleave_moe_layer_step=2,
                 moe_layers=list(range(1, 48, 2)), rope_scaling=None)


def llama4(text):
  """Returns the config of a multimodal Llama 4 whose language model has the fields `text`."""
  return {'text_config': ROTARY | text, 'boi_token_index': 200080, 'eoi_token_index': 200081,
          'image_token_index': 200092, 'vision_config': {'hidden_size': 1408}, 'tie_word_embeddings': False}


def gemma3(*args, **others):
  """Returns the config of a multimodal Gemma 3 whose language model has this shape."""
  text = sizes(*args, **{**GEMMA3, 'model_type': 'gemma3_text', 'sliding_window': 1024, **others})
  return {'text_config': {**text, 'rope_scaling': {'factor': 8., 'rope_type': 'linear'}}, 'boi_token_index': 255999,
          'eoi_token_index': 256000, 'image_token_index': 262144, 'mm_tokens_per_image': 256, 'vision_config': {
              'hidden_size': 1152, 'image_size': 896}, 'eos_token_id': [1, 106], 'tie_word_embeddings': True}
