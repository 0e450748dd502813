"""Text from a masked diffusion model, and a bound on the likelihood of texts (Nie et al. 2025, LLaDA).

  diffusion.generate(model, params, tokenizer, ['def '], diffusion.Denoising(steps=64), length=128)

The model is any that `objectives.diffusion.masked_diffusion` trained. Shapes: the legend in `models/transformer.py`.
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
from lm.generate.sampling import Sampling, process
from lm.objectives.objective import target_log_probabilities


def low_confidence(log_probabilities_T: jax.Array, key: jax.Array) -> jax.Array:
  """Masks again the tokens of the lowest probability: which of the drawn ones stay, by the highest of these numbers."""
  del key
  return log_probabilities_T


def random(log_probabilities_T: jax.Array, key: jax.Array) -> jax.Array:
  """Masks again at random: then the text has the distribution that the model's conditionals describe."""
  return jax.random.uniform(key, log_probabilities_T.shape)


@dataclasses.dataclass(frozen=True)
class Denoising:
  """How masks become a text: at each step all are drawn, as many as the step is due stay, the rest are masked again.

  Args:
    steps: forward passes in all; as many as there are tokens draws one at a time.
    blocks: parts that are filled from left to right, each in its share of the steps.
    remasking: `low_confidence`, or `random`, or a function of its own.
    sampling: how a token is drawn; without a repetition penalty, as tokens have no order here.
  """
  steps: int = 64
  blocks: int = 1
  remasking: Callable[[jax.Array, jax.Array], jax.Array] = low_confidence
  sampling: Sampling = Sampling()

  def __post_init__(self):
    if self.blocks < 1 or self.steps < 1 or self.steps % self.blocks:
      raise ValueError(f'steps={self.steps} are not a positive multiple of blocks={self.blocks}')
    if self.sampling.repetition_penalty != 1:
      raise ValueError(f'repetition_penalty={self.sampling.repetition_penalty}: tokens have no order here')


@functools.partial(jax.jit, static_argnames=('model', 'how', 'length', 'mask', 'vocab'))
def denoise(model: Any, params: Any, batch: Batch, stream_B: jax.Array, key: jax.Array, *, how: Denoising, length: int,
            mask: int, vocab: int) -> jax.Array:
  """The last `length` tokens of each row, which are masks in `batch`: [B, length], on every device.

  `batch` says that all tokens are read both ways; `stream_B` is the random stream of each row, uint32. Tokens from
  `vocab` on are never drawn, nor is `mask`.
  """
  size, per_block = length // how.blocks, how.steps // how.blocks

  def fill(step, n, logits, tokens, stream, key):
    """`n` more tokens of a block."""
    ids = jnp.arange(logits.shape[-1])[None]
    logits = jnp.where((ids < vocab) & (ids != mask), logits.reshape(-1, ids.size), -jnp.inf)
    processed, shape = process(logits, how.sampling), (*tokens.shape, ids.size)
    keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(jax.random.fold_in(key, n), step)))(stream)
    if how.sampling.greedy:
      drawn = jnp.argmax(processed, -1).reshape(tokens.shape)
    else:
      drawn = jax.vmap(jax.random.categorical)(keys[:, 0], processed.reshape(shape))
    found = jnp.take_along_axis(jax.nn.log_softmax(logits.reshape(shape)), drawn[..., None], axis=2)[..., 0]
    stays = jnp.where(tokens == mask, jax.vmap(how.remasking)(found, keys[:, 1]), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-stays, axis=1), axis=1)
    return jnp.where(rank < n, drawn, tokens)   # as many masks are left

  def step(i, tokens):
    at = tokens.shape[1] - length + i // per_block * size
    out = model.apply(params, batch._replace(tokens=tokens))
    logits = sharding.constrain(out.head(jax.lax.dynamic_slice_in_dim(out.hidden, at, size, 1)), 'B--')
    n = size // per_block + (i % per_block < size % per_block)
    block, local = jax.lax.dynamic_slice_in_dim(tokens, at, size, 1), fill
    if (rows := sharding.spec('B')) is not None:   # each shard draws for its own rows
      local = jax.shard_map(fill, in_specs=(P(), P(), rows, rows, rows, P()), out_specs=rows, check_vma=False)
    return jax.lax.dynamic_update_slice_in_dim(tokens, local(i, n, logits, block, stream_B, key), at, 1)

  batch, stream_B = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch), sharding.constrain(stream_B, 'B')
  return sharding.constrain(jax.lax.fori_loop(0, how.steps, step, batch.tokens)[:, -length:], '--')


def generate(model: Any, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], how: Denoising = Denoising(),
             *, length: int = 128, seed: int = 0, mask: str = '<|mask|>') -> list[str]:
  """The completion of each prompt: `length` tokens that are unmasked as `how` says, up to the first that ends a text.

  A completion is a function of (seed, prompt, how many equal prompts stand before it). On a mesh, call it inside
  `jax.set_mesh`. ValueError where a prompt and `length` are more than the model reads at once, the blocks do not divide
  the length, the steps are more than it, or the tokenizer has no such mask.
  """
  if length < 1 or length % how.blocks or how.steps > length:
    raise ValueError(f'length={length} must be a multiple of blocks={how.blocks} and at least steps={how.steps}')
  if not prompts:
    return []
  texts = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(prompts)]
  if (longest := 1 + max(map(len, texts))) + length > model.max_length:
    raise ValueError(f'a prompt of {longest} tokens (with bos) and length={length} are more than the '
                     f'{model.max_length} that the model reads at once; shorten one of them')
  rows, masked = sharding.padded_rows(len(texts)), tokenizer.control_id(mask)
  tokens, segments = np.full((rows, longest + length), masked, np.int32), np.ones((rows, longest + length), np.int32)
  positions = np.zeros_like(tokens)
  for row, ids in enumerate(texts):   # padded on the left
    start = longest - len(ids) - 1
    tokens[row, start:longest], segments[row, :start] = [tokenizer.bos_id, *ids], 0
    positions[row, start:] = np.arange(longest + length - start)
  batch = Batch(tokens, positions=positions, segments=segments, bidirectional=np.ones(tokens.shape, bool))
  streams = random_streams(texts, rows, tokenizer.bos_id)
  generated = np.asarray(denoise(model, params, batch, streams, seeds.key(seed), how=how, length=length,
                                 mask=masked, vocab=tokenizer.vocab_size))
  return [_text(tokenizer, ids, row) for ids, row in zip(texts, generated)]


def _text(tokenizer: Tokenizer, prompt: np.ndarray, generated: np.ndarray) -> str:
  ends = np.flatnonzero(np.isin(generated, tokenizer.eos_ids))
  generated = generated[:ends[0]] if len(ends) else generated
  return tokenizer.decode([*prompt, *generated])[len(tokenizer.decode(prompt)):]


@functools.partial(jax.jit, static_argnames='apply')
def _log_probabilities(apply, params, batch: Batch) -> jax.Array:
  """Of the targets of each row, weighted, [B]."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  outputs = apply(params, batch)
  found = target_log_probabilities(outputs.hidden, outputs.head, batch.targets)
  return sharding.constrain(jnp.sum(found * batch.weights, axis=1), '-')


def log_likelihood(model: Any, params: Any, texts: Sequence[np.ndarray], mask: int, *, given: int = 1, draws: int = 64,
                   positions: int = 2048, seed: int = 0) -> np.ndarray:
  """A lower bound of log p(tokens[given:] | tokens[:given]) of each text, in nats, [texts]; an estimate.

  The mean, over `draws` sets of l of the L tokens, of L/l sum_set log p(x_i | tokens left) (Nie et al. 2025, eq. 14;
  see `objectives.diffusion`), where l takes its values 1 to L evenly. About so many `positions` are read at a time.
  ValueError where a text is longer than the model reads at once.
  """
  if (longest := max(map(len, texts), default=0)) > model.max_length:
    raise ValueError(f'a text of {longest} tokens is more than the {model.max_length} that the model reads at once')
  found = np.zeros(len(texts))
  for text, ids in enumerate(texts):
    if (n := len(ids) - given) < 1:
      continue
    width = min(max(16, 1 << (len(ids) - 1).bit_length()), model.max_length)   # few different ones
    rows = sharding.padded_rows(min(max(positions // width, 1), draws))
    rng = seeds.generator(seed, text)
    counts = 1 + ((np.arange(draws) + rng.random()) * (n / draws)).astype(int)
    for begin in range(0, draws, rows):
      tokens, segments = np.zeros((2, rows, width), np.int32)
      tokens[:, :len(ids)], segments[:, :len(ids)] = ids, 1
      targets, weights = tokens.copy(), np.zeros((rows, width), np.float32)
      for row, count in enumerate(counts[begin:begin + rows]):
        places = given + rng.permutation(n)[:count]
        tokens[row, places], weights[row, places] = mask, n / count
      batch = Batch(tokens, targets, weights, segments=segments, bidirectional=np.ones(tokens.shape, bool))
      found[text] += np.sum(np.asarray(_log_probabilities(model.apply, params, batch)), dtype=np.float64) / draws
  return found
