"""Rewards of answers, by a reward model: one number an answer, of which only differences mean something."""
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch, Pair
from lm.data.chat import conversation, messages
from lm.models.reward import Reward


class RewardPairs(NamedTuple):
  """Rewards of the chosen and the rejected answers of pairs, [n]; and which records were left out, as too long."""
  chosen: np.ndarray
  rejected: np.ndarray
  too_long: np.ndarray   # their indices

  @property
  def accuracy(self) -> float:
    """The share of the pairs in which the chosen answer has the higher reward."""
    return float(np.mean(self.chosen > self.rejected))

  @property
  def margin(self) -> float:
    """The mean difference of the rewards, chosen less rejected."""
    return float(np.mean(self.chosen - self.rejected, dtype=np.float64))


class Judge:
  """A reward model with the tokenizer and the template that it was trained with.

  Raises ValueError where the model is no reward model, or was trained on no dialogues. Works on the mesh that is set.
  """

  def __init__(self, model: Any, params: Any, tokenizer: Any, template: conversation.Template | None):
    if not isinstance(model, Reward):
      raise ValueError('this is no reward model; make one with "python experiments/preference.py --method=reward"')
    if template is None:
      raise ValueError('the reward model has no template by which a prompt and an answer are written')
    self.model, self.params, self.tokenizer, self.template = model, params, tokenizer, template

  def answers(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """The reward of each answer to the prompt beside it, float32 [n]; an empty prompt is none."""
    return self.conversations([[*([{'role': 'user', 'content': prompt}] if prompt else []),
                                {'role': 'assistant', 'content': answer}]
                               for prompt, answer in zip(prompts, answers, strict=True)])

  def pairs(self, records: Sequence[str], keys: messages.Keys) -> RewardPairs:
    """The rewards of the two answers of each record of JSON, see `messages`, that the model can read."""
    pairs = [[self._encode([*prompt, *answer]) for answer in answers]
             for prompt, answers, _ in (messages.read(record, Pair, keys) for record in records)]
    is_long = np.array([max(map(len, pair)) > self.model.max_length for pair in pairs], bool)
    values = rewards(self.model, self.params, [text for pair, long in zip(pairs, is_long) if not long for text in pair])
    return RewardPairs(values[::2], values[1::2], np.flatnonzero(is_long))

  def conversations(self, conversations: Sequence[messages.Messages]) -> np.ndarray:
    """The reward of each conversation, float32 [n]."""
    return rewards(self.model, self.params, [self._encode(conversation) for conversation in conversations])

  def _encode(self, conversation: messages.Messages) -> np.ndarray:
    return self.template.encode(self.tokenizer, conversation)[0]


@functools.partial(jax.jit, static_argnums=0)
def _rewards(apply, params, tokens_BT: jax.Array, last_B: jax.Array) -> jax.Array:
  scores = apply(params, Batch(sharding.constrain(tokens_BT, 'BT'))).scores
  is_last = jnp.arange(scores.shape[1])[None] == sharding.constrain(last_B, 'B')[:, None]
  return sharding.constrain(jnp.sum(jnp.where(is_last, scores, 0), axis=1), '-')


def rewards(model: Reward, params: Any, texts: Sequence[np.ndarray], positions: int = 4096) -> np.ndarray:
  """The reward of each text, int32 [T] with all control tokens: the score at its last token, float32 [n].

  Texts of about the same length are batched, about so many `positions` at a time. ValueError where a text is empty, or
  longer than the model's context.
  """
  lengths = np.array([len(text) for text in texts], int)
  if len(texts) and not 0 < lengths.min() <= lengths.max() <= model.max_length:
    raise ValueError(f'texts of {lengths.min()} to {lengths.max()} tokens: the reward model reads 1 to '
                     f'{model.max_length} tokens at once; shorten the prompt or the answer')
  result, order = np.zeros(len(texts), np.float32), np.argsort(-lengths, kind='stable')
  start = 0
  while start < len(texts):
    width = min(max(16, 1 << int(lengths[order[start]] - 1).bit_length()), model.max_length)
    rows = sharding.padded_rows(max(positions // width, 1))
    chosen = order[start:start + rows]
    tokens, last = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, i in enumerate(chosen):
      tokens[row, :lengths[i]], last[row] = texts[i], lengths[i] - 1
    result[chosen] = np.asarray(_rewards(model.apply, params, tokens, last))[:len(chosen)]
    start += rows
  return result
