"""A byte-level tokenizer of the library `tokenizers`, and text to train it on."""
import json
import pathlib

import pytest

from lm.data.tokenizers import folder as tokenizer

TEXT = ''.join(pathlib.Path(json.__file__).with_name(name).read_text() for name in ('decoder.py', 'encoder.py'))


def byte_level(documents):
  tokenizers = pytest.importorskip('tokenizers')
  t = tokenizers.Tokenizer(tokenizers.models.BPE())
  t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.decoder = tokenizers.decoders.ByteLevel()
  t.train_from_iterator(documents, tokenizers.trainers.BpeTrainer(
      vocab_size=600, special_tokens=['<|endoftext|>', '<|mask|>'], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  t.enable_truncation(5)  # published files have it, and it must not cut documents
  return tokenizer.HuggingFace(t.to_str(), '<|endoftext|>', '<|endoftext|>')
