"""Makes tests/fixtures: tiny random models as `transformers` saves them, each with tokens and its logits on them.

  python tests/helpers/make_fixtures.py

Run it by hand where torch and transformers are installed; `fixtures_test.py` needs neither. The seed is fixed, so every
run makes the same weights. They are stored in bfloat16 to be small; the logits are computed from the same numbers in
float32.
"""
import json
import pathlib
import shutil

import numpy as np
import torch
from helpers import hf_cases
from helpers.hf_rows import random_tokens

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures'
LENGTH = 32
SMALL = {'hidden_size': 8, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 1,
         'intermediate_size': 16, 'vocab_size': 24}
EPS = {'rms_norm_eps': 1e-2}   # large, so that a norm that ignores it gives other logits
LLAMA = hf_cases.LLAMA | SMALL | hf_cases.NO_TOKENS | EPS | {'max_position_embeddings': LENGTH}
MOE = LLAMA | {'num_experts': 3, 'num_experts_per_tok': 2, 'moe_intermediate_size': 12, 'norm_topk_prob': True}
YARN = {'rope_type': 'yarn', 'rope_theta': 1e3, 'factor': 4., 'original_max_position_embeddings': 16}
WINDOW = {'use_sliding_window': True, 'sliding_window': 9, 'max_window_layers': 1}
T5 = {'d_model': 8, 'd_kv': 4, 'd_ff': 12, 'num_layers': 2, 'num_decoder_layers': 1, 'num_heads': 2, 'vocab_size': 24,
      'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 20, 'layer_norm_epsilon': 1e-2,
      'decoder_start_token_id': 0}
FIXTURES = {
    'gpt2': hf_cases.Case('GPT2LMHeadModel', {
        'n_embd': 8, 'n_layer': 2, 'n_head': 2, 'n_positions': LENGTH, 'vocab_size': 24, 'layer_norm_epsilon': 1e-2}),
    'gpt_neox': hf_cases.Case('GPTNeoXForCausalLM', hf_cases.NO_TOKENS | {
        **{name: value for name, value in SMALL.items() if name != 'num_key_value_heads'}, 'hidden_size': 16,
        'max_position_embeddings': LENGTH, 'layer_norm_eps': 1e-2, 'rope_parameters': {
            'rope_type': 'default', 'rope_theta': 1e3, 'partial_rotary_factor': 0.5}}),
    'llama': hf_cases.Case('LlamaForCausalLM', LLAMA | {'mlp_bias': True, 'rope_parameters': {
        'rope_type': 'llama3', 'rope_theta': 1e3, 'factor': 8., 'low_freq_factor': 1., 'high_freq_factor': 4.,
        'original_max_position_embeddings': 16}}),
    'mistral': hf_cases.Case('MistralForCausalLM', LLAMA | {'sliding_window': 9, 'head_dim': 6}),
    'qwen2': hf_cases.Case('Qwen2ForCausalLM', LLAMA | WINDOW | {'rope_parameters': YARN}),
    'qwen3': hf_cases.Case('Qwen3ForCausalLM', LLAMA | WINDOW | {'head_dim': 6, 'tie_word_embeddings': True}),
    'smollm3': hf_cases.Case('SmolLM3ForCausalLM', LLAMA | {'no_rope_layers': [1, 0], 'attention_bias': True}),
    'phi3': hf_cases.Case('Phi3ForCausalLM', LLAMA | {
        'head_dim': 8, 'hidden_size': 16, 'original_max_position_embeddings': 20, 'rope_parameters': {
            'rope_type': 'longrope', 'rope_theta': 1e3, 'partial_rotary_factor': 0.5, 'short_factor': [1., 1.5],
            'long_factor': [2., 5.]}}),
    'olmo2': hf_cases.Case('Olmo2ForCausalLM', LLAMA),
    'olmo3': hf_cases.Case('Olmo3ForCausalLM', LLAMA | {
        'sliding_window': 9, 'layer_types': ['sliding_attention', 'full_attention'], 'rope_parameters': {
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e3}, 'full_attention': YARN}}),
    'gemma2': hf_cases.Case('Gemma2ForCausalLM', LLAMA | {
        'sliding_window': 9, 'head_dim': 6, 'query_pre_attn_scalar': 7, 'attn_logit_softcapping': 2.,
        'final_logit_softcapping': 3.}),
    'gemma3': hf_cases.Case('Gemma3ForCausalLM', hf_cases.GEMMA3 | SMALL | EPS | {
        'head_dim': 8, 'layer_types': ['sliding_attention', 'full_attention']}),
    'mixtral': hf_cases.Case('MixtralForCausalLM', LLAMA | {'num_local_experts': 3, 'sliding_window': 9}),
    'qwen2_moe': hf_cases.Case('Qwen2MoeForCausalLM', MOE | {
        'shared_expert_intermediate_size': 10, 'decoder_sparse_step': 2}),
    'qwen3_moe': hf_cases.Case('Qwen3MoeForCausalLM', MOE | {'mlp_only_layers': [0], 'head_dim': 6}),
    'gpt_oss': hf_cases.Case('GptOssForCausalLM', hf_cases.GPT_OSS | SMALL | EPS | {
        'num_local_experts': 3, 'head_dim': 6, 'num_key_value_heads': 1}),
    'deepseek_v3': hf_cases.Case('DeepseekV3ForCausalLM', hf_cases.DEEPSEEK | SMALL | EPS | {
        'num_key_value_heads': 2, 'kv_lora_rank': 4, 'q_lora_rank': 6, 'n_routed_experts': 4,
        'moe_intermediate_size': 8, 'num_experts_per_tok': 2, 'n_group': 2, 'topk_group': 1,
        'first_k_dense_replace': 1, 'rope_parameters': YARN | {'mscale': 0.7, 'mscale_all_dim': 1.}}),
    'llama4': hf_cases.Case('Llama4ForCausalLM', hf_cases.LLAMA4 | SMALL | EPS | {
        'head_dim': 4, 'num_local_experts': 2, 'intermediate_size': 12, 'intermediate_size_mlp': 24, 'moe_layers': [1],
        'no_rope_layers': [1, 0], 'floor_scale': 8, 'attn_scale': 0.7}),
    'bert': hf_cases.Case('BertForMaskedLM', {
        'hidden_size': 8, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 16, 'vocab_size': 24,
        'max_position_embeddings': LENGTH, 'layer_norm_eps': 1e-2}),
    't5': hf_cases.Case('T5ForConditionalGeneration', T5),
    't5_gated': hf_cases.Case('T5ForConditionalGeneration', T5 | {
        'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}),
}


def main() -> None:
  for name, case in FIXTURES.items():
    folder = FOLDER / name
    model = hf_cases.torch_model(case)
    if name == 't5_gated':   # transformers ties these tables unless the files hold two different ones
      model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    with torch.no_grad():   # the rotary frequencies are not in the state and stay in float32
      for weight in model.state_dict().values():
        weight.copy_(weight.to(torch.bfloat16))
    inputs = {'tokens': random_tokens(1, LENGTH) % SMALL['vocab_size']}
    if case.architecture.startswith('T5'):
      inputs['source'] = random_tokens(1, LENGTH, seed=1) % SMALL['vocab_size']
    # Phi-3 uses other frequencies within its original context of 20 positions.
    extra = {'short': _logits(model, inputs['tokens'][:, :20])} if name == 'phi3' else {}
    np.savez_compressed(_empty(folder) / 'expected.npz', **inputs, **extra, logits=_logits(model, **inputs))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / 'generation_config.json').unlink(missing_ok=True)   # no test reads it
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')


def _logits(model: torch.nn.Module, tokens: np.ndarray, source: np.ndarray | None = None) -> np.ndarray:
  if source is None:
    return hf_cases.logits_of(model, tokens)
  with torch.no_grad():
    return model(input_ids=torch.tensor(source).long(), decoder_input_ids=torch.tensor(tokens).long()).logits.numpy()


def _empty(folder: pathlib.Path) -> pathlib.Path:
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  return folder


if __name__ == '__main__':
  main()
