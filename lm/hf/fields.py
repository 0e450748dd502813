"""Fields of a config.json on which no forward pass of any family depends.

They are from the configs of published models, of which `tests/hf/hf_published_test.py` has a table.
"""

# Fields of training, generation and administration, which may have any value.
ASIDE = frozenset({
    'architectures', 'model_type', 'transformers_version', 'torch_dtype', 'dtype', 'use_cache', '_name_or_path',
    'name_or_path', '_commit_hash', 'auto_map', 'tokenizer_class', 'processor_class', 'custom_pipelines',
    'transformers.js_config', 'transformers_weights', 'bos_token_id', 'eos_token_id', 'pad_token_id',
    'sep_token_id', 'cls_token_id', 'mask_token_id', 'unk_token_id', 'decoder_start_token_id', 'initializer_range',
    'initializer_factor', 'attention_dropout', 'attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'hidden_dropout',
    'hidden_dropout_prob', 'attention_probs_dropout_prob', 'classifier_dropout', 'embd_dropout', 'dropout_rate',
    'summary_type', 'summary_use_proj', 'summary_activation', 'summary_first_dropout', 'summary_proj_to_labels',
    'id2label', 'label2id', 'problem_type', 'num_labels', '_num_labels', 'finetuning_task', 'task_specific_params',
    'return_dict', 'output_attentions', 'output_hidden_states', 'output_past', 'output_router_logits',
    'router_aux_loss_coef', 'router_jitter_noise', 'gradient_checkpointing', 'ep_size', 'n_ctx',
    'max_sequence_length', 'prefix', 'num_steps', '_attn_implementation', '_attn_implementation_autoset',
    '_attn_implementation_internal', 'attn_implementation', '_flash_attn_2_enabled', 'cache_implementation',
    'torchscript', 'use_bfloat16', 'chunk_size_feed_forward', 'tf_legacy_loss', 'unsloth_version', 'unsloth_fixed',
    'max_length', 'min_length', 'max_new_tokens', 'do_sample', 'early_stopping', 'num_beams', 'num_beam_groups',
    'diversity_penalty', 'temperature', 'top_k', 'top_p', 'typical_p', 'repetition_penalty', 'length_penalty',
    'no_repeat_ngram_size', 'encoder_no_repeat_ngram_size', 'bad_words_ids', 'num_return_sequences',
    'output_scores', 'return_dict_in_generate', 'forced_bos_token_id', 'forced_eos_token_id',
    'remove_invalid_values', 'exponential_decay_length_penalty', 'suppress_tokens', 'begin_suppress_tokens'})

# Fields that have no effect at these values.
NEUTRAL = {
    'pruned_heads': ({},), 'is_encoder_decoder': (False,), 'is_decoder': (False,), 'add_cross_attention': (False,),
    'tie_encoder_decoder': (False,),
    'pretraining_tp': range(1, 65),   # the number of parts in which products were computed
}
