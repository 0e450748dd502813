"""Small stores of tokenised text, and their sources."""
import dataclasses

import numpy as np
import pytest

from lm.data import store, tokenizers
from lm.data.encoding import Column, TextEncoder
from lm.data.text import clean
from lm.data.text.source import Source

TRAIN = [f'document {i}: é{"x" * (i % 7)}' for i in range(23)]

TRAIN[5], TRAIN[9], TRAIN[20] = TRAIN[3], '  ', 'held out 1 '
# A duplicate within train, an empty text, and a duplicate of validation once it is cleaned.

SOURCE = Source('toy', {'train': TRAIN, 'validation': [f'held out {i}' for i in range(4)]}, 'abc')

BYTES = tokenizers.Bytes()


def quiet(line):
  """Reports no progress."""


def build(folder, source=SOURCE, tokenizer=BYTES, rules=clean.DEFAULT, **options):
  """Returns the stores by split that `store.build` makes of a source, without printing progress."""
  return store.build(folder, source, TextEncoder(tokenizer), rules, **{'progress': quiet} | options)


def contents(folder):
  """Returns the bytes of each file below a folder, by relative path."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
  """Lets stores be written in groups of five documents, so that a few documents make several groups."""
  monkeypatch.setattr(store, '_GROUP_DOCUMENTS', 5)


@dataclasses.dataclass(frozen=True)
class Wide(tokenizers.Bytes):
  """A tokenizer whose ids need more than 16 bits, and which gives no token for short texts."""
  vocab_size = 70_000

  def encode_batch(self, texts):
    return [ids + 69_000 if len(ids) > 10 else ids[:0] for ids in super().encode_batch(texts)]


@dataclasses.dataclass(frozen=True)
class Counted(TextEncoder):
  """An encoder with two further columns: the place of each token in its document, and the length of each document."""
  tokenizer: tokenizers.Tokenizer = BYTES

  columns = {'place': Column(np.dtype(np.int16), 'token'), 'length': Column(np.dtype(np.int64), 'document')}

  def encode(self, documents):
    return [encoded._replace(columns={'place': np.arange(len(encoded.tokens)), 'length': len(encoded.tokens)})
            for encoded in super().encode(documents)]
