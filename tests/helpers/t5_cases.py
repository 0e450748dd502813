"""Configs of small T5 models as published for the two versions, and a batch for them."""
import numpy as np

from lm.data.batch import Batch

VOCAB, ROWS, TIME, SOURCE = 97, 4, 20, 40
V10 = {'d_model': 32, 'd_kv': 8, 'd_ff': 48, 'num_layers': 2, 'num_decoder_layers': 3, 'num_heads': 4,
       'vocab_size': VOCAB, 'relative_attention_num_buckets': 16, 'relative_attention_max_distance': 24,
       'decoder_start_token_id': 0}
V11 = V10 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False, 'd_kv': 12}


def make_batch():
  """Returns a batch of sources and targets of unequal lengths, padded on the right."""
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(1, VOCAB, (2, ROWS, TIME)).astype('i4')
  segments = (np.arange(TIME)[None] < np.array([[20], [13], [3], [9]])).astype('i4')
  source_segments = (np.arange(SOURCE)[None] < np.array([[31], [40], [1], [9]])).astype('i4')
  return Batch(tokens, targets, segments.astype('f4'), segments=segments, source_segments=source_segments,
               source=rng.integers(1, VOCAB, (ROWS, SOURCE)).astype('i4'))
