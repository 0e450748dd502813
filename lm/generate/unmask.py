"""Text from a masked diffusion model, and a bound on the likelihood of texts (Nie et al. 2025, LLaDA).

  unmask.generate(model, params, tokenizer, ['def '], unmask.Denoising(steps=64), length=128)

`objectives.diffusion.masked_diffusion` trains such a model. Shapes: the legend in `models/transformer.py`.
"""
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import seeds, sharding
from lm.data.batch import Batch
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.completion import random_streams
from lm.generate.filters import process
from lm.generate.sampling import Sampling
from lm.objectives.objective import target_log_probabilities


def low_confidence(log_probabilities_T: jax.Array, key: jax.Array) -> jax.Array:
  """Returns the priority of each drawn token to stay, [T]: here, the least probable tokens are masked again."""
  del key
  return log_probabilities_T


def random(log_probabilities_T: jax.Array, key: jax.Array) -> jax.Array:
  """Returns random priorities: the text then has the distribution that the model's conditionals define."""
  return jax.random.uniform(key, log_probabilities_T.shape)


@dataclasses.dataclass(frozen=True)
class Denoising:
  """How masks become text. Each step draws a token for every mask, keeps its share of them, and masks the others again.

  Args:
    steps: the number of forward passes; as many as there are tokens draws one at a time.
    blocks: the number of parts that are filled from left to right, each in its share of the steps.
    remasking: `low_confidence`, `random`, or another function `(log_probabilities [T], key) -> priorities [T]`.
    sampling: how a token is drawn; its temperature and its filters of probabilities alone, because tokens are not
      written in their order.
  """
  steps: int = 64
  blocks: int = 1
  remasking: Callable[[jax.Array, jax.Array], jax.Array] = low_confidence
  sampling: Sampling = Sampling()

  def __post_init__(self):
    if self.blocks < 1 or self.steps < 1 or self.steps % self.blocks:
      raise ValueError(f'steps={self.steps} are not a positive multiple of blocks={self.blocks}')
    names = 'temperature', 'top_k', 'top_p', 'min_p', 'typical_p', 'eta_cutoff'
    plain = Sampling(**{name: getattr(self.sampling, name) for name in names})
    for field in dataclasses.fields(plain):
      value = getattr(self.sampling, field.name)
      if value != getattr(plain, field.name):
        raise ValueError(f'{field.name}={value}: tokens have no order here; leave it out')


@functools.partial(jax.jit, static_argnames=('model', 'denoising', 'length', 'mask', 'vocab'))
@sharding.whole_rows()
def denoise(model: Any, params: Any, batch: Batch, stream_B: jax.Array, key: jax.Array, *, denoising: Denoising,
            length: int, mask: int, vocab: int) -> jax.Array:
  """Returns the last `length` tokens of each row, which are masks in `batch`: [B, length], on every device.

  All tokens of `batch` are marked as bidirectional. `stream_B` is the number of each row's random stream, uint32. Only
  tokens below `vocab`, and never `mask`, are drawn.
  """
  size, steps_per_block = length // denoising.blocks, denoising.steps // denoising.blocks

  def fill(step, count, logits, tokens, stream, key):
    """Replaces `count` masks of a block."""
    ids = jnp.arange(logits.shape[-1])[None]
    logits = jnp.where((ids < vocab) & (ids != mask), logits.reshape(-1, ids.size), -jnp.inf)
    processed, shape = process(logits, denoising.sampling), (*tokens.shape, ids.size)
    keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(jax.random.fold_in(key, n), step)))(stream)
    if denoising.sampling.greedy:
      drawn = jnp.argmax(processed, -1).reshape(tokens.shape)
    else:
      drawn = jax.vmap(jax.random.categorical)(keys[:, 0], processed.reshape(shape))
    table = jax.nn.log_softmax(logits.reshape(shape))
    log_probabilities = jnp.take_along_axis(table, drawn[..., None], axis=2)[..., 0]
    priorities = jax.vmap(denoising.remasking)(log_probabilities, keys[:, 1])
    priorities = jnp.where(tokens == mask, priorities, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-priorities, axis=1), axis=1)
    return jnp.where(rank < count, drawn, tokens)   # at least `count` masks are there

  def step(i, tokens):
    start = tokens.shape[1] - length + i // steps_per_block * size
    out = model.apply(params, batch._replace(tokens=tokens))
    logits = sharding.whole_logits(out.head, jax.lax.dynamic_slice_in_dim(out.hidden, start, size, 1))
    count = size // steps_per_block + (i % steps_per_block < size % steps_per_block)
    block, local = jax.lax.dynamic_slice_in_dim(tokens, start, size, 1), fill
    rows = sharding.spec('B')
    if rows is not None:   # each shard draws the tokens of its own rows
      local = jax.shard_map(fill, in_specs=(P(), P(), rows, rows, rows, P()), out_specs=rows, check_vma=False)
    return jax.lax.dynamic_update_slice_in_dim(tokens, local(i, count, logits, block, stream_B, key), start, 1)

  batch, stream_B = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch), sharding.constrain(stream_B, 'B')
  return sharding.constrain(jax.lax.fori_loop(0, denoising.steps, step, batch.tokens)[:, -length:], '--')


def generate(model: Any, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], denoising: Denoising = Denoising(),
             *, length: int = 128, seed: int = 0, mask: str = '<|mask|>') -> list[str]:
  """Returns the completion of each prompt: `length` tokens, cut before the first that ends a text.

  A completion is a function of the seed, the prompt, and the number of equal prompts before it. On a mesh, call it
  inside `jax.set_mesh`.

  Raises:
    ValueError: a prompt and `length` tokens are more than the model reads at once; `length` is not a multiple of the
      number of blocks, or below the number of steps; or the tokenizer has no such mask.
  """
  if length < 1 or length % denoising.blocks or denoising.steps > length:
    raise ValueError(f'length={length} must be a multiple of blocks={denoising.blocks} and at least '
                     f'steps={denoising.steps}')
  if not prompts:
    return []
  texts = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(prompts)]
  longest = 1 + max(map(len, texts))
  if longest + length > model.max_length:
    raise ValueError(f'a prompt of {longest} tokens (with bos) and length={length} are more than the '
                     f'{model.max_length} that the model reads at once; shorten one of them')
  rows, mask_id = sharding.padded_rows(len(texts)), tokenizer.control_id(mask)
  tokens, segments = np.full((rows, longest + length), mask_id, np.int32), np.ones((rows, longest + length), np.int32)
  positions = np.zeros_like(tokens)
  for row, ids in enumerate(texts):   # padded on the left
    start = longest - len(ids) - 1
    tokens[row, start:longest], segments[row, :start] = [tokenizer.bos_id, *ids], 0
    positions[row, start:] = np.arange(longest + length - start)
  batch = Batch(tokens, positions=positions, segments=segments, bidirectional=np.ones(tokens.shape, bool))
  streams = random_streams(texts, rows, tokenizer.bos_id)
  generated = np.asarray(denoise(model, params, batch, streams, seeds.key(seed), denoising=denoising, length=length,
                                 mask=mask_id, vocab=tokenizer.vocab_size))
  return [_text(tokenizer, ids, row) for ids, row in zip(texts, generated)]


def _text(tokenizer: Tokenizer, prompt: np.ndarray, generated: np.ndarray) -> str:
  """Returns the text of the generated tokens before the first that ends a text, decoded after the prompt."""
  ends = np.flatnonzero(np.isin(generated, tokenizer.eos_ids))
  generated = generated[:ends[0]] if len(ends) else generated
  return tokenizer.decode([*prompt, *generated])[len(tokenizer.decode(prompt)):]


@functools.partial(jax.jit, static_argnames='apply')
@sharding.whole_rows()
def _log_probabilities(apply, params, batch: Batch) -> jax.Array:
  """Returns the weighted sum of the log-probabilities of each row's targets, [B]."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  outputs = apply(params, batch)
  scores = target_log_probabilities(outputs.hidden, outputs.head, batch.targets)
  return sharding.constrain(jnp.sum(scores * batch.weights, axis=1), '-')


def log_likelihood(model: Any, params: Any, texts: Sequence[np.ndarray], mask: int, *, prefix: int = 1, draws: int = 64,
                   positions: int = 2048, seed: int = 0) -> np.ndarray:
  """Estimates a lower bound of log p(tokens[prefix:] | tokens[:prefix]) of each text, in nats, [texts].

  The estimate is the mean of L/l sum_set log p(x_i | the unmasked tokens) over `draws` random sets of l of the L tokens
  (Nie et al. 2025, eq. 14; see `objectives.diffusion`), where l takes its values 1 to L evenly. A batch has about
  `positions` positions.

  Raises:
    ValueError: a text is longer than the model reads at once.
  """
  longest = max(map(len, texts), default=0)
  if longest > model.max_length:
    raise ValueError(f'a text of {longest} tokens is more than the {model.max_length} that the model reads at once')
  bounds = np.zeros(len(texts))
  for text, ids in enumerate(texts):
    n = len(ids) - prefix
    if n < 1:
      continue
    width = min(max(16, 1 << (len(ids) - 1).bit_length()), model.max_length)   # few widths, so few compilations
    rows = sharding.padded_rows(min(max(positions // width, 1), draws))
    rng = seeds.generator(seed, text)
    counts = 1 + ((np.arange(draws) + rng.random()) * (n / draws)).astype(int)
    for start in range(0, draws, rows):
      tokens, segments = np.zeros((2, rows, width), np.int32)
      tokens[:, :len(ids)], segments[:, :len(ids)] = ids, 1
      targets, weights = tokens.copy(), np.zeros((rows, width), np.float32)
      for row, count in enumerate(counts[start:start + rows]):
        places = prefix + rng.permutation(n)[:count]
        tokens[row, places], weights[row, places] = mask, n / count
      batch = Batch(tokens, targets, weights, segments=segments, bidirectional=np.ones(tokens.shape, bool))
      scores = np.asarray(_log_probabilities(model.apply, params, batch))
      bounds[text] += np.sum(scores, dtype=np.float64) / draws
  return bounds
