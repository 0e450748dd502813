"""Shapes of published decoders by name, which `--size` fills in.

A size is the shape alone: training begins from new parameters.
"""
import dataclasses
from typing import Literal

Architecture = Literal['llama', 'gpt2']


@dataclasses.dataclass(frozen=True)
class Size:
  """The shape of a decoder.

  Args:
    architecture: `llama` or `gpt2`, see `models.transformer`.
    layers: number of blocks.
    width: size of the residual stream.
    heads: number of heads of attention.
    kv_heads: number of heads of keys and values; None for as many as `heads`.
    hidden: width of the feed-forward layers; None for 8/3 of the width (llama) or 4 times it (gpt2).
    tied: whether the output head is the embedding.
    rope_theta: base of the rotary positions of llama.
    vocab: number of tokens of the published model; None for a shape without one.
    head_size: size of each head; None for the width divided by `heads`.
    qk_norm: whether the queries and the keys of each head of llama are normalised.
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
  head_size: int | None = None
  qk_norm: bool = False


Name = Literal['gpt2-small', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'llama-1b', 'llama-3b', 'llama-8b', 'llama2-7b',
               'tinyllama-1b', 'mistral-7b', 'mistral-nemo-12b', 'smollm2-135m', 'smollm2-360m', 'smollm2-1.7b',
               'qwen3-0.6b', 'qwen3-1.7b', 'qwen3-4b', 'qwen3-8b', 'qwen3-32b']


def _qwen3(layers: int, width: int, heads: int, hidden: int, tied: bool) -> Size:
  return Size('llama', layers, width, heads, 8, hidden, tied, 1e6, 151936, 128, qk_norm=True)


# From the config.json of each model. Llama is 3.2 (1b, 3b) and 3.1 (8b), without the scaling of its rotary positions,
# which is for longer texts than those of its first training. Mistral 7B is v0.1, without its window of 4,096 tokens.
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
    'mistral-nemo-12b': Size('llama', 40, 5120, 32, 8, 14336, False, 1e6, 131072, 128),
    'smollm2-135m': Size('llama', 30, 576, 9, 3, 1536, True, 1e5, 49152),
    'smollm2-360m': Size('llama', 32, 960, 15, 5, 2560, True, 1e5, 49152),
    'smollm2-1.7b': Size('llama', 24, 2048, 32, 32, 8192, True, 1.3e5, 49152),
    'qwen3-0.6b': _qwen3(28, 1024, 16, 3072, True),
    'qwen3-1.7b': _qwen3(28, 2048, 16, 6144, True),
    'qwen3-4b': _qwen3(36, 2560, 32, 9728, True),
    'qwen3-8b': _qwen3(36, 4096, 32, 12288, False),
    'qwen3-32b': _qwen3(64, 5120, 64, 25600, False)}
