"""A random decoder for the tests of lm-evaluation-harness."""
import pytest
from helpers import decoders

from lm.data.tokenizers.folder import Bytes


@pytest.fixture(scope='module')
def library():
  return pytest.importorskip('lm_eval')


@pytest.fixture(scope='module')
def parts():
  """Returns a random decoder of 304 tokens, its parameters, and a tokenizer with control tokens."""
  tokenizer = Bytes(('<|user|>', '<|assistant|>', '<|system|>', '<|end|>'))
  model, params = decoders.make()
  assert tokenizer.vocab_size <= model.vocab
  return model, params, tokenizer
