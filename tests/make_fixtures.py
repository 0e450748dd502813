"""Makes tests/fixtures: tiny random models as `transformers` saves them, each with tokens and its logits on them.

  python tests/make_fixtures.py

Run it by hand where torch and transformers are; `fixtures_test.py` needs neither. The seed is fixed, so that it makes
the same weights again. They are bfloat16, for size; the logits are those of the same numbers in float32.
"""
import json
import pathlib
import shutil

import hf_cases
import numpy as np
import torch
from hf_rows import random_tokens

FOLDER = pathlib.Path(__file__).parent / 'fixtures'
LENGTH = 32
SMALL = {'hidden_size': 8, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 1,
         'intermediate_size': 16, 'vocab_size': 24}
FIXTURES = {
    'gpt2': hf_cases.Case('GPT2LMHeadModel', {
        'n_embd': 8, 'n_layer': 2, 'n_head': 2, 'n_positions': LENGTH, 'vocab_size': 24}),
    'llama': hf_cases.Case('LlamaForCausalLM', hf_cases.LLAMA | SMALL | {'rope_parameters': {
        'rope_type': 'llama3', 'rope_theta': 1e3, 'factor': 8., 'low_freq_factor': 1., 'high_freq_factor': 4.,
        'original_max_position_embeddings': 16}}),
    'gemma3': hf_cases.Case('Gemma3ForCausalLM', hf_cases.GEMMA3 | SMALL | {
        'head_dim': 8, 'layer_types': ['sliding_attention', 'full_attention']}),
    'deepseek_v3': hf_cases.Case('DeepseekV3ForCausalLM', hf_cases.DEEPSEEK | SMALL | {
        'num_key_value_heads': 2, 'kv_lora_rank': 4, 'q_lora_rank': 6, 'n_routed_experts': 4,
        'moe_intermediate_size': 8, 'num_experts_per_tok': 2, 'n_group': 2, 'topk_group': 1,
        'first_k_dense_replace': 1, 'rope_parameters': {
            'rope_type': 'yarn', 'rope_theta': 1e3, 'factor': 4., 'mscale': 0.7, 'mscale_all_dim': 1.,
            'original_max_position_embeddings': 16}}),
    'llama4': hf_cases.Case('Llama4ForCausalLM', hf_cases.LLAMA4 | SMALL | {
        'head_dim': 4, 'num_local_experts': 2, 'intermediate_size': 12, 'intermediate_size_mlp': 24, 'moe_layers': [1],
        'no_rope_layers': [1, 0], 'floor_scale': 8, 'attn_scale': 0.7}),
}


def main() -> None:
  for name, case in FIXTURES.items():
    folder = FOLDER / name
    model = hf_cases.torch_model(case)
    with torch.no_grad():   # not all that it holds: frequencies stay what they are
      for weight in model.state_dict().values():
        weight.copy_(weight.to(torch.bfloat16))
    tokens = random_tokens(1, LENGTH) % SMALL['vocab_size']
    logits = hf_cases.logits_of(model, tokens)
    np.savez_compressed(_empty(folder) / 'expected.npz', tokens=tokens, logits=logits)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / 'generation_config.json').unlink()   # which nothing here reads
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')


def _empty(folder: pathlib.Path) -> pathlib.Path:
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  return folder


if __name__ == '__main__':
  main()
