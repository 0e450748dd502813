"""The fields of config.json with which models of each family are published."""
from helpers.published_fields import (
    COMMON,
    DEEPSEEK,
    FP8,
    GEMMA3,
    GEMMA3_TYPES,
    MAVERICK,
    OLD_GPT2,
    PHI4_MINI,
    QWEN2,
    QWEN3,
    ROTARY,
    SCOUT,
    SMOLLM2,
    V3,
    YARN,
    gemma3,
    gpt2,
    llama3,
    llama4,
    no_kv,
    sizes,
)

# By family: (the fields that its models share, {model: (its own fields, number of parameters)}). The number is the one
# on the model's page or in its report; where neither states one, it is None.
PUBLISHED = {
    'GPT2LMHeadModel': ({
        'activation_function': 'gelu_new', 'attn_pdrop': 0.1, 'embd_pdrop': 0.1, 'resid_pdrop': 0.1, 'n_ctx': 1024,
        'n_positions': 1024, 'layer_norm_epsilon': 1e-5, 'summary_activation': None, 'summary_first_dropout': 0.1,
        'summary_proj_to_labels': True, 'summary_type': 'cls_index', 'summary_use_proj': True, 'vocab_size': 50257,
        'tie_word_embeddings': None, 'task_specific_params': {'text-generation': {'do_sample': True}}}, {
            'gpt2': (gpt2(768, 12, 12), 124_439_808),
            'gpt2-medium': (gpt2(1024, 24, 16, **OLD_GPT2), 354_823_168),
            'gpt2-large': (gpt2(1280, 36, 20, **OLD_GPT2), 774_030_080),
            'gpt2-xl': (gpt2(1600, 48, 25, **OLD_GPT2, output_past=True), 1_557_611_200),
            'distilgpt2': (gpt2(768, 6, 12, _num_labels=1, id2label={'0': 'LABEL_0'}, label2id={'LABEL_0': 0}),
                           81_912_576)}),
    'GPTNeoXForCausalLM': ({
        'hidden_act': 'gelu', 'layer_norm_eps': 1e-5, 'max_position_embeddings': 2048, 'rotary_emb_base': 10000,
        'rotary_pct': 0.25, 'use_parallel_residual': True, 'vocab_size': 50304}, {
            'pythia-70m': (no_kv(sizes(512, 6, 8, 8, 2048, 2048)), 70_426_624),
            'pythia-160m': (no_kv(sizes(768, 12, 12, 12, 3072, 2048, attention_bias=True, attention_dropout=0.,
                                        classifier_dropout=0.1, hidden_dropout=0., rope_scaling=None)), 162_322_944),
            'gpt-neox-20b': (no_kv(sizes(6144, 44, 64, 64, 24576, 2048, hidden_act='gelu_fast', vocab_size=50432,
                                         attention_probs_dropout_prob=0, hidden_dropout_prob=0)), 20_554_567_680),
            'dolly-v2-3b': (no_kv(sizes(2560, 32, 32, 32, 10240, 2048, vocab_size=50280, custom_pipelines={
                'text-generation': {'impl': 'instruct_pipeline.InstructionTextGenerationPipeline'}})), None),
            'polyglot-ko-1.3b': (no_kv(sizes(2048, 24, 16, 16, 8192, 2048, rotary_pct=0.5, vocab_size=30080,
                                             num_steps='global_step320000')), None),
            'RedPajama-INCITE-Base-3B-v1': (no_kv(sizes(2560, 32, 32, 32, 10240, 2048, rotary_pct=1.0, vocab_size=50432,
                                                        use_parallel_residual=False)), None)}),
    'LlamaForCausalLM': (ROTARY, {
        'Llama-2-7b-hf': (sizes(4096, 32, 32, 32, 11008, 4096, pretraining_tp=1, rope_scaling=None), 6_738_415_616),
        'llama-7b': (no_kv(sizes(4096, 32, 32, 32, 11008, 2048, max_sequence_length=2048, pad_token_id=0)), None),
        'Llama-3.2-1B': (sizes(2048, 16, 32, 8, 8192, 131072, vocab_size=128256, tie_word_embeddings=True,
                               rope_scaling=llama3(32.), mlp_bias=False, head_dim=64, pretraining_tp=1,
                               rope_theta=500000., attention_bias=False, eos_token_id=[128001, 128008, 128009]),
                         1_235_814_400),
        'Llama-3.2-3B': (sizes(3072, 28, 24, 8, 8192, 131072, vocab_size=128256, tie_word_embeddings=True,
                               rope_scaling=llama3(32.), mlp_bias=False, head_dim=128, pretraining_tp=1,
                               rope_theta=500000., attention_bias=False), 3_212_749_824),
        'Llama-3.1-8B': (sizes(4096, 32, 32, 8, 14336, 131072, vocab_size=128256, rope_scaling=llama3(8.),
                               mlp_bias=False, pretraining_tp=1, rope_theta=500000., attention_bias=False),
                         8_030_261_248),
        'SmolLM2-135M': (sizes(576, 30, 9, 3, 1536, 8192, **SMOLLM2, rope_theta=100000), 134_515_008),
        'SmolLM2-360M': (sizes(960, 32, 15, 5, 2560, 8192, **SMOLLM2, rope_theta=100000), 361_821_120),
        'SmolLM2-1.7B-Instruct': (sizes(2048, 24, 32, 32, 8192, 8192, **SMOLLM2, rope_theta=130000, pad_token_id=2),
                                  1_711_376_384),
        'TinyLlama-1.1B-Chat-v1.0': (sizes(2048, 22, 32, 4, 5632, 2048, pretraining_tp=1, rope_scaling=None,
                                           attention_bias=False), 1_100_048_384),
        'Falcon3-1B-Base': (sizes(2048, 18, 8, 4, 8192, 4096, activation='swiglu', head_dim=256, mlp_bias=False,
                                  attention_bias=False, vocab_size=131072, rope_theta=1000042), None),
        'deepseek-coder-1.3b-base': (sizes(2048, 24, 16, 16, 5504, 16384, vocab_size=32256, rope_theta=100000,
                                           rope_scaling={'factor': 4., 'type': 'linear'}), None)}),
    'MistralForCausalLM': (ROTARY, {
        'Mistral-7B-v0.1': (sizes(4096, 32, 32, 8, 14336, 32768, sliding_window=4096), 7_241_732_096),
        'Mistral-7B-Instruct-v0.3': (sizes(4096, 32, 32, 8, 14336, 32768, sliding_window=None, vocab_size=32768),
                                     7_248_023_552),
        'Mistral-Nemo-Base-2407': (sizes(5120, 40, 32, 8, 14336, 128000, sliding_window=None, head_dim=128,
                                         vocab_size=131072, rope_theta=1000000.), 12_247_782_400),
        'Ministral-8B-Instruct-2410': (sizes(4096, 36, 32, 8, 12288, 32768, sliding_window=32768, head_dim=128,
                                             vocab_size=131072, rope_theta=1e8), None),
        'zephyr-7b-beta': (sizes(4096, 32, 32, 8, 14336, 32768, sliding_window=4096, pad_token_id=2), None),
        'OpenHermes-2.5-Mistral-7B': (sizes(4096, 32, 32, 8, 14336, 32768, sliding_window=4096, vocab_size=32002,
                                            _flash_attn_2_enabled=True), None)}),
    'Qwen2ForCausalLM': (ROTARY | QWEN2, {
        'Qwen2-0.5B': (sizes(896, 24, 14, 2, 4864, 131072, tie_word_embeddings=True), 494_032_768),
        'Qwen2.5-0.5B': (sizes(896, 24, 14, 2, 4864, 32768, tie_word_embeddings=True, use_mrope=False), 494_032_768),
        'Qwen2.5-1.5B': (sizes(1536, 28, 12, 2, 8960, 131072, tie_word_embeddings=True, use_mrope=False), None),
        'Qwen2.5-7B': (sizes(3584, 28, 28, 4, 18944, 131072, vocab_size=152064, use_mrope=False), 7_615_616_512),
        'Qwen1.5-0.5B-Chat': (sizes(1024, 24, 16, 16, 2816, 32768, tie_word_embeddings=True), None),
        'DeepSeek-R1-Distill-Qwen-1.5B': (sizes(1536, 28, 12, 2, 8960, 131072, use_mrope=False, sliding_window=4096),
                                          1_777_088_000)}),
    'Qwen3ForCausalLM': (ROTARY | QWEN3, {
        'Qwen3-0.6B': (sizes(1024, 28, 16, 8, 3072, 40960, tie_word_embeddings=True), 596_049_920),
        'Qwen3-1.7B': (sizes(2048, 28, 16, 8, 6144, 40960, tie_word_embeddings=True), 1_720_574_976),
        'Qwen3-4B': (sizes(2560, 36, 32, 8, 9728, 40960, tie_word_embeddings=True), 4_022_468_096),
        'Qwen3-4B-Instruct-2507': (sizes(2560, 36, 32, 8, 9728, 262144, tie_word_embeddings=True, rope_theta=5e6),
                                   4_022_468_096),
        'Qwen3-8B': (sizes(4096, 36, 32, 8, 12288, 40960), 8_190_735_360),
        'Qwen3-32B': (sizes(5120, 64, 64, 8, 25600, 40960), 32_762_123_264)}),
    'SmolLM3ForCausalLM': (ROTARY | {
        'max_window_layers': 28, 'pretraining_tp': 2, 'no_rope_layer_interval': 4, 'use_sliding_window': False,
        'no_rope_layers': [1, 1, 1, 0] * 9, 'layer_types': ['full_attention'] * 36, 'mlp_bias': False,
        'sliding_window': None, 'attention_bias': False, 'rope_theta': 5e6, 'rms_norm_eps': 1e-6, 'rope_scaling': None,
        'vocab_size': 128256}, {
            name: (sizes(2048, 36, 16, 4, 11008, length, tie_word_embeddings=True, **others), 3_075_098_624)
            for name, length, others in (
                ('SmolLM3-3B', 65536, {}), ('SmolLM3-3B-Base', 65536, {}), ('SmolLM3-3B-checkpoints', 4096, {}),
                ('unsloth/SmolLM3-3B', 65536, {'unsloth_fixed': True, 'pad_token_id': 128004}))}),
    'Phi3ForCausalLM': (ROTARY | {
        'vocab_size': 32064, 'embd_pdrop': 0., 'resid_pdrop': 0., 'original_max_position_embeddings': 4096,
        'auto_map': {'AutoConfig': 'configuration_phi3.Phi3Config'}, 'rope_scaling': None}, {
            'Phi-3-mini-4k-instruct': (sizes(3072, 32, 32, 32, 8192, 4096, attention_bias=False, sliding_window=2047),
                                       3_821_079_552),
            'Phi-3.5-mini-instruct': (sizes(3072, 32, 32, 32, 8192, 131072, sliding_window=262144, rope_scaling={
                'type': 'longrope', 'short_factor': [1.] * 48, 'long_factor': [1.1] * 48}), 3_821_079_552),
            'Phi-3-medium-4k-instruct': (sizes(5120, 40, 40, 10, 17920, 4096, sliding_window=2047), 13_960_238_080),
            'phi-4': (sizes(5120, 40, 40, 10, 17920, 16384, vocab_size=100352, rope_theta=250000,
                            original_max_position_embeddings=16384, sliding_window=None, attention_bias=False),
                      14_659_507_200),
            'Phi-4-mini-instruct': (sizes(3072, 32, 24, 8, 8192, 131072, **PHI4_MINI), 3_836_021_760)}),
    'Olmo2ForCausalLM': (ROTARY | {'rms_norm_eps': 1e-6, 'rope_theta': 500000, 'rope_scaling': None,
                                   'attention_bias': False, 'vocab_size': 100352, 'pad_token_id': 100277}, {
        'OLMo-2-0425-1B': (sizes(2048, 16, 16, 16, 8192, 4096), 1_484_916_736),
        'OLMo-2-1124-7B': (sizes(4096, 32, 32, 32, 11008, 4096), 7_298_617_344),
        'OLMo-2-1124-13B': (sizes(5120, 40, 40, 40, 13824, 4096), 13_716_198_400),
        'OLMo-2-0325-32B': (sizes(5120, 64, 40, 8, 27648, 4096), None),
        'OLMo-2-0425-1B-Instruct': (sizes(2048, 16, 16, 16, 8192, 4096, use_cache=False), 1_484_916_736)}),
    'Olmo3ForCausalLM': (ROTARY | {
        'rms_norm_eps': 1e-6, 'rope_theta': 500000, 'sliding_window': 4096, 'attention_bias': False,
        'vocab_size': 100278, 'pad_token_id': 100277, 'rope_scaling': {
            'attention_factor': 1.2079441541679836, 'beta_fast': 32., 'beta_slow': 1., 'factor': 8.,
            'original_max_position_embeddings': 8192, 'rope_type': 'yarn'}}, {
        name: (sizes(*shape, 65536, layer_types=(['sliding_attention'] * 3 + ['full_attention']) * (shape[1] // 4)),
               None)
        for name, shape in (('Olmo-3-1025-7B', (4096, 32, 32, 32, 11008)),
                            ('Olmo-3-7B-Think', (4096, 32, 32, 32, 11008)),
                            ('Olmo-3-7B-Instruct', (4096, 32, 32, 32, 11008)),
                            ('Olmo-3-1125-32B', (5120, 64, 40, 8, 27648)),
                            ('Olmo-3-32B-Think', (5120, 64, 40, 8, 27648)))}),
    'Gemma2ForCausalLM': ({
        'attention_bias': False, 'attention_dropout': 0., 'attn_logit_softcapping': 50., 'rope_theta': 10000.,
        'cache_implementation': 'hybrid', 'final_logit_softcapping': 30., 'hidden_act': 'gelu_pytorch_tanh',
        'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-6, 'head_dim': 256,
        'sliding_window': 4096, 'vocab_size': 256000, 'pad_token_id': 0, 'tie_word_embeddings': None}, {
            'gemma-2-2b': (sizes(2304, 26, 8, 4, 9216, 8192), 2_614_341_888),
            'gemma-2-2b-it': (sizes(2304, 26, 8, 4, 9216, 8192, eos_token_id=[1, 107]), 2_614_341_888),
            'gemma-2-9b': (sizes(3584, 42, 16, 8, 14336, 8192, sliding_window_size=4096), 9_241_705_984),
            'gemma-2-27b': (sizes(4608, 46, 32, 16, 36864, 8192, head_dim=128, query_pre_attn_scalar=144,
                                  sliding_window_size=4096, _attn_implementation='eager'), 27_227_128_320),
            'shieldgemma-2b': (sizes(2304, 26, 8, 4, 9216, 8192), 2_614_341_888)}),
    'Gemma3ForCausalLM': (GEMMA3 | {'tie_word_embeddings': None}, {
        'gemma-3-270m': (sizes(640, 18, 4, 1, 2048, 32768, _sliding_window_pattern=6, use_bidirectional_attention=False,
                               layer_types=GEMMA3_TYPES[:18], rope_scaling=None), 268_098_176),
        'gemma-3-1b-pt': (sizes(1152, 26, 4, 1, 6912, 32768, sliding_window_pattern=6, rope_scaling=None), 999_885_952),
        'gemma-3-1b-it': (sizes(1152, 26, 4, 1, 6912, 32768, sliding_window_pattern=6), 999_885_952),
        'gemma-3-270m-it': (sizes(640, 18, 4, 1, 2048, 32768, _sliding_window_pattern=6, layer_types=GEMMA3_TYPES[:18],
                                  use_bidirectional_attention=False), 268_098_176),
        'unsloth/gemma-3-1b-it': (sizes(1152, 26, 4, 1, 6912, 32768, layer_types=GEMMA3_TYPES, unsloth_fixed=True,
                                        _sliding_window_pattern=6), 999_885_952)}),
    'Gemma3ForConditionalGeneration': ({'torch_dtype': 'bfloat16', 'initializer_range': 0.02}, {
        'gemma-3-4b-it': (gemma3(2560, 34, 8, 4, 10240, 131072), 3_880_099_328),
        'gemma-3-4b-pt': (gemma3(2560, 34, 8, 4, 10240, 131072), 3_880_099_328),
        'gemma-3-12b-it': (gemma3(3840, 48, 16, 8, 15360, 131072), None),
        'gemma-3-27b-it': (gemma3(5376, 62, 32, 16, 21504, 131072, head_dim=128, query_pre_attn_scalar=168),
                           None),
        'medgemma-4b-it': (gemma3(2560, 34, 8, 4, 10240, 131072, use_cache=True), 3_880_099_328)}),
    'MixtralForCausalLM': (ROTARY | {'num_experts_per_tok': 2, 'num_local_experts': 8, 'output_router_logits': False,
                                     'router_aux_loss_coef': 0.02, 'sliding_window': None, 'rope_theta': 1e6}, {
        'Mixtral-8x7B-v0.1': (sizes(4096, 32, 32, 8, 14336, 32768), 46_702_792_704),
        'Mixtral-8x7B-Instruct-v0.1': (sizes(4096, 32, 32, 8, 14336, 32768), 46_702_792_704),
        'Mixtral-8x22B-v0.1': (sizes(6144, 56, 48, 8, 16384, 65536, router_jitter_noise=0.), None),
        'Nous-Hermes-2-Mixtral-8x7B-DPO': (sizes(4096, 32, 32, 8, 14336, 32768, vocab_size=32002), None),
        'dolphin-2.5-mixtral-8x7b': (sizes(4096, 32, 32, 8, 14336, 32768, vocab_size=32002, use_cache=False), None)}),
    'Qwen2MoeForCausalLM': (ROTARY | QWEN2 | {
        'decoder_sparse_step': 1, 'norm_topk_prob': False, 'output_router_logits': False,
        'router_aux_loss_coef': 0.001}, {
            name: (sizes(*shape[:5], 8192, moe_intermediate_size=shape[5], shared_expert_intermediate_size=shape[6],
                         num_experts=shape[7], num_experts_per_tok=shape[8], **others), parameters)
            for name, shape, parameters, others in (
                ('Qwen1.5-MoE-A2.7B', (2048, 24, 16, 16, 5632, 1408, 5632, 60, 4), 14_315_784_192, {}),
                ('Qwen1.5-MoE-A2.7B-Chat', (2048, 24, 16, 16, 5632, 1408, 5632, 60, 4), 14_315_784_192, {
                    'qkv_bias': True, 'mlp_only_layers': []}),
                ('Qwen2-57B-A14B', (3584, 28, 28, 4, 18944, 2560, 20480, 64, 8), None, {}),
                ('Qwen2-57B-A14B-Instruct', (3584, 28, 28, 4, 18944, 2560, 20480, 64, 8), None, {}))}),
    'Qwen3MoeForCausalLM': (ROTARY | QWEN3 | {
        'decoder_sparse_step': 1, 'mlp_only_layers': [], 'norm_topk_prob': True, 'num_experts_per_tok': 8,
        'output_router_logits': False, 'router_aux_loss_coef': 0.001}, {
            'Qwen3-30B-A3B': (sizes(2048, 48, 32, 4, 6144, 40960, moe_intermediate_size=768, num_experts=128,
                                    max_window_layers=48), 30_532_122_624),
            'Qwen3-30B-A3B-Instruct-2507': (sizes(2048, 48, 32, 4, 6144, 262144, moe_intermediate_size=768,
                                                  num_experts=128, rope_theta=10000000), 30_532_122_624),
            'Qwen3-Coder-30B-A3B-Instruct': (sizes(2048, 48, 32, 4, 5472, 262144, moe_intermediate_size=768,
                                                   num_experts=128, qkv_bias=False, use_qk_norm=True,
                                                   shared_expert_intermediate_size=0), 30_532_122_624),
            'Qwen3-235B-A22B': (sizes(4096, 94, 64, 4, 12288, 40960, moe_intermediate_size=1536, num_experts=128),
                                235_093_634_560),
            'Qwen3-Coder-480B-A35B-Instruct': (sizes(6144, 62, 96, 8, 8192, 262144, moe_intermediate_size=2560,
                                                     num_experts=160, qkv_bias=False, use_qk_norm=True,
                                                     shared_expert_intermediate_size=0), None)}),
    'GptOssForCausalLM': (ROTARY | {
        'attention_bias': True, 'experts_per_token': 4, 'num_experts_per_tok': 4, 'head_dim': 64, 'vocab_size': 201088,
        'initial_context_length': 4096, 'output_router_logits': False, 'router_aux_loss_coef': 0.9,
        'rope_theta': 150000, 'sliding_window': 128, 'swiglu_limit': 7., 'eos_token_id': 200002,
        'pad_token_id': 199999, 'rope_scaling': {
            'beta_fast': 32., 'beta_slow': 1., 'factor': 32., 'original_max_position_embeddings': 4096,
            'rope_type': 'yarn', 'truncate': False}, 'quantization_config': {
                'modules_to_not_convert': ['model.layers.*.self_attn', 'model.embed_tokens', 'lm_head'],
                'quant_method': 'mxfp4'}}, {
        name: (sizes(2880, layers, 64, 8, 2880, 131072, num_local_experts=experts, layer_types=[
            'sliding_attention', 'full_attention'] * (layers // 2), **others), parameters)
        for name, layers, experts, parameters, others in (
            ('gpt-oss-20b', 24, 32, 20_914_757_184, {}), ('gpt-oss-120b', 36, 128, 116_829_156_672, {}),
            ('gpt-oss-safeguard-20b', 24, 32, 20_914_757_184, {}), ('gpt-oss-safeguard-120b', 36, 128, None, {}),
            ('unsloth/gpt-oss-20b-BF16', 24, 32, 20_914_757_184, {
                'quantization_config': None, 'unsloth_version': '2025.8.2'}))}),
    'DeepseekV3ForCausalLM': (ROTARY, {
        'DeepSeek-V3': (V3, 671_026_419_200), 'DeepSeek-V3-Base': (V3, 671_026_419_200),
        'DeepSeek-R1': (V3, 671_026_419_200),
        'DeepSeek-V3.1': (V3 | {'quantization_config': {**FP8, 'scale_fmt': 'ue8m0'}}, 671_026_419_200),
        'Kimi-K2-Instruct': (V3 | {
            'model_type': 'kimi_k2', 'num_attention_heads': 64, 'num_key_value_heads': 64, 'first_k_dense_replace': 1,
            'n_group': 1, 'topk_group': 1, 'n_routed_experts': 384, 'routed_scaling_factor': 2.827,
            'num_nextn_predict_layers': 0, 'max_position_embeddings': 131072, 'vocab_size': 163840,
            'rope_theta': 50000., 'rope_scaling': {**YARN, 'factor': 32., 'beta_fast': 1., 'beta_slow': 1.}}, None),
        'Moonlight-16B-A3B': (sizes(2048, 27, 16, 16, 11264, 8192, **{
            **DEEPSEEK, 'q_lora_rank': None, 'n_routed_experts': 64, 'n_shared_experts': 2, 'num_experts_per_tok': 6,
            'moe_intermediate_size': 1408, 'n_group': 1, 'topk_group': 1, 'first_k_dense_replace': 1,
            'routed_scaling_factor': 2.446, 'rope_scaling': None, 'vocab_size': 163840,
            'num_nextn_predict_layers': 0}), None)}),
    'Llama4ForConditionalGeneration': ({'torch_dtype': 'bfloat16', 'transformers_version': '4.51.0.dev0'}, {
        'Llama-4-Scout-17B-16E': (llama4(SCOUT), None), 'Llama-4-Scout-17B-16E-Instruct': (llama4(SCOUT), None),
        'Llama-4-Maverick-17B-128E': (llama4(MAVERICK), None),
        'Llama-4-Maverick-17B-128E-Instruct': (llama4(MAVERICK), None),
        'unsloth/Llama-4-Scout-17B-16E-Instruct': (llama4(SCOUT) | {'unsloth_fixed': True}, None)}),
    'BertForMaskedLM': ({
        'attention_probs_dropout_prob': 0.1, 'hidden_act': 'gelu', 'hidden_dropout_prob': 0.1, 'layer_norm_eps': 1e-12,
        'type_vocab_size': 2, 'pad_token_id': 0, 'tie_word_embeddings': None}, {
            'bert-base-uncased': (no_kv(sizes(768, 12, 12, 12, 3072, 512, vocab_size=30522,
                                              gradient_checkpointing=False, position_embedding_type='absolute')),
                                  109_514_298),
            'bert-base-cased': (no_kv(sizes(768, 12, 12, 12, 3072, 512, vocab_size=28996)), 108_340_804),
            'bert-large-uncased': (no_kv(sizes(1024, 24, 16, 16, 4096, 512, vocab_size=30522)), 335_174_458),
            'bert-base-multilingual-cased': (no_kv(sizes(
                768, 12, 12, 12, 3072, 512, vocab_size=119547, directionality='bidi', pooler_fc_size=768,
                pooler_num_attention_heads=12, pooler_num_fc_layers=3, pooler_size_per_head=128,
                pooler_type='first_token_transform')), 177_974_523),
            'bert-base-german-cased': (no_kv(sizes(768, 12, 12, 12, 3072, 512, vocab_size=30000, output_past=True,
                                                   num_labels=2, pruned_heads={}, torchscript=False)), None)}),
    'BertForSequenceClassification': ({
        'attention_probs_dropout_prob': 0.1, 'hidden_act': 'gelu', 'hidden_dropout_prob': 0.1, 'layer_norm_eps': 1e-12,
        'type_vocab_size': 2, 'pad_token_id': 0, 'tie_word_embeddings': None, 'id2label': {'0': 'LABEL_0'},
        'label2id': {'LABEL_0': 0}}, {
            'cross-encoder/ms-marco-MiniLM-L-6-v2': (no_kv(sizes(
                384, 6, 12, 12, 1536, 512, vocab_size=30522, gradient_checkpointing=False,
                position_embedding_type='absolute')), 22_713_601)}),
    'BleurtForSequenceClassification': ({
        'attention_probs_dropout_prob': 0.1, 'hidden_act': 'gelu', 'hidden_dropout_prob': 0.1, 'layer_norm_eps': 1e-12,
        'type_vocab_size': 2, 'pad_token_id': 0, 'position_embedding_type': 'absolute', 'use_cache': False}, {
            'lucadiliello/BLEURT-20-D12': (no_kv(sizes(1024, 12, 16, 16, 4096, 512, vocab_size=120300,
                                                       embedding_size=128)), 167_801_857)}),   # published: 167M
    'T5ForConditionalGeneration': ({
        'decoder_start_token_id': 0, 'dropout_rate': 0.1, 'eos_token_id': 1, 'initializer_factor': 1.,
        'pad_token_id': 0, 'is_encoder_decoder': True, 'layer_norm_epsilon': 1e-6,
        'relative_attention_num_buckets': 32, 'd_kv': 64, 'vocab_size': 32128, 'initializer_range': None,
        'tie_word_embeddings': None}, {
            't5-small': ({'d_ff': 2048, 'd_model': 512, 'num_heads': 8, 'num_layers': 6, 'n_positions': 512,
                          'output_past': True, 'task_specific_params': {'summarization': {'num_beams': 4}}},
                         60_506_624),
            't5-base': ({'d_ff': 3072, 'd_model': 768, 'num_heads': 12, 'num_layers': 12, 'n_positions': 512,
                         'output_past': True}, 222_903_552),
            't5-v1_1-small': ({'d_ff': 1024, 'd_model': 512, 'num_heads': 6, 'num_layers': 8, 'num_decoder_layers': 8,
                               'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}, 76_961_152),
            'flan-t5-base': ({'d_ff': 2048, 'd_model': 768, 'num_heads': 12, 'num_layers': 12, 'num_decoder_layers': 12,
                              'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False, 'is_gated_act': True,
                              'dense_act_fn': 'gelu_new', 'relative_attention_max_distance': 128, 'n_positions': 512,
                              'output_past': True}, 247_577_856),
            'byt5-small': ({'d_ff': 3584, 'd_model': 1472, 'num_heads': 6, 'num_layers': 12, 'num_decoder_layers': 4,
                            'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False, 'vocab_size': 384,
                            'tokenizer_class': 'ByT5Tokenizer', 'gradient_checkpointing': False}, 299_637_760),
            'codet5-small': ({'d_ff': 2048, 'd_model': 512, 'num_heads': 8, 'num_layers': 6, 'num_decoder_layers': 6,
                              'feed_forward_proj': 'relu', 'vocab_size': 32100, 'gradient_checkpointing': False,
                              'id2label': {'0': 'LABEL_0'}, 'n_positions': 512, 'output_past': True}, 60_492_288)}),
}

# By name of the model: its config.json, and its number of parameters or None.
CONFIGS = {name: ({'architectures': [family], **({} if 'text_config' in fields else COMMON), **shared, **fields}, count)
           for family, (shared, models) in PUBLISHED.items() for name, (fields, count) in models.items()}
