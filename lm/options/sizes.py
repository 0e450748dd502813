"""Shapes of published decoders by name: what `--size` fills in.

A size is the shape alone: parameters of the published model have it too, but training begins from new ones.
"""
import dataclasses
from typing import Literal

Architecture = Literal['llama', 'gpt2']


@dataclasses.dataclass(frozen=True)
class Size:
  """The shape of a decoder.

  Args:
    architecture: `llama` or `gpt2`, see `models.transformer`.
    layers: how many blocks.
    width: of the residual stream.
    heads: of attention.
    kv_heads: of keys and values; None for as many as heads.
    hidden: width of the feed-forward; None for 8/3 the width (llama) or 4 times it (gpt2).
    tied: whether the head is the embedding.
    rope_theta: base of the rotary positions of llama.
    vocab: tokens of the published model; None for a shape without one.
  """
  architecture: Architecture
  layers: int
  width: int
  heads: int
  kv_heads: int | None = None
  hidden: int | None = None
  tied: bool = True
  rope_theta: float = 10_000.
  vocab: int | None = None


Name = Literal['gpt2-small', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'llama-1b', 'llama-3b', 'llama-8b', 'llama2-7b',
               'tinyllama-1b', 'mistral-7b', 'smollm2-135m', 'smollm2-360m', 'smollm2-1.7b']

# From the config.json of each model. Llama is 3.2 (1b, 3b) and 3.1 (8b), without its scaling of rotary positions, which
# is for texts longer than those that it was trained on first.
NAMED: dict[Name, Size] = {
    'gpt2-small': Size('gpt2', 12, 768, 12, vocab=50257),
    'gpt2-medium': Size('gpt2', 24, 1024, 16, vocab=50257),
    'gpt2-large': Size('gpt2', 36, 1280, 20, vocab=50257),
    'gpt2-xl': Size('gpt2', 48, 1600, 25, vocab=50257),
    'llama-1b': Size('llama', 16, 2048, 32, 8, 8192, True, 5e5, 128256),
    'llama-3b': Size('llama', 28, 3072, 24, 8, 8192, True, 5e5, 128256),
    'llama-8b': Size('llama', 32, 4096, 32, 8, 14336, False, 5e5, 128256),
    'llama2-7b': Size('llama', 32, 4096, 32, 32, 11008, False, 1e4, 32000),
    'tinyllama-1b': Size('llama', 22, 2048, 32, 4, 5632, False, 1e4, 32000),
    'mistral-7b': Size('llama', 32, 4096, 32, 8, 14336, False, 1e4, 32000),
    'smollm2-135m': Size('llama', 30, 576, 9, 3, 1536, True, 1e5, 49152),
    'smollm2-360m': Size('llama', 32, 960, 15, 5, 2560, True, 1e5, 49152),
    'smollm2-1.7b': Size('llama', 24, 2048, 32, 32, 8192, True, 1.3e5, 49152)}
