"""Rewards of answers by a reward model: one number for each answer. Only differences of rewards have a meaning."""
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch, Pair
from lm.data.chat import conversation, messages
from lm.data.text.source import Documents
from lm.evaluate.text_scores import Loaded, report_left_out
from lm.models.reward import Reward


class RewardPairs(NamedTuple):
  """Rewards of the chosen and of the rejected answers of pairs, each [n], and the records that were too long."""
  chosen: np.ndarray
  rejected: np.ndarray
  too_long: np.ndarray   # indices of the records that were skipped

  @property
  def accuracy(self) -> float:
    """The share of the pairs in which the chosen answer has the higher reward."""
    return float(np.mean(self.chosen > self.rejected))

  @property
  def margin(self) -> float:
    """The mean of the chosen answer's reward minus that of the rejected one."""
    return float(np.mean(self.chosen - self.rejected, dtype=np.float64))


class Judge:
  """A reward model with the tokenizer and the template that it was trained with. It computes on the current mesh.

  Raises ValueError if the model is no reward model, or has no template because it was not trained on dialogues.
  """

  def __init__(self, model: Any, params: Any, tokenizer: Any, template: conversation.Template | None):
    if not isinstance(model, Reward):
      raise ValueError('this is no reward model; make one with "python experiments/preference.py --method=reward"')
    if template is None:
      raise ValueError('the reward model has no template for prompts and answers; train one on dialogues')
    self.model, self.params, self.tokenizer, self.template = model, params, tokenizer, template

  def answers(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Returns the reward of each answer to its prompt, float32 [n]. An empty prompt stands for no prompt."""
    return rewards(self.model, self.params, self.encode_answers(prompts, answers))

  def encode_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> list[np.ndarray]:
    """Returns the tokens of each answer after its prompt, int32 [T] each. An empty prompt stands for no prompt."""
    return [self._encode([*([{'role': 'user', 'content': prompt}] if prompt else []),
                          {'role': 'assistant', 'content': answer}])
            for prompt, answer in zip(prompts, answers, strict=True)]

  def pairs(self, records: Sequence[str], keys: messages.Keys) -> RewardPairs:
    """Returns the rewards of the two answers in each JSON record (see `messages`) that fits the model's context."""
    pairs = [[self._encode([*prompt, *answer]) for answer in answers]
             for prompt, answers, _ in (messages.read(record, Pair, keys) for record in records)]
    is_long = np.array([max(map(len, pair)) > self.model.max_length for pair in pairs], bool)
    values = rewards(self.model, self.params, [text for pair, long in zip(pairs, is_long) if not long for text in pair])
    return RewardPairs(values[::2], values[1::2], np.flatnonzero(is_long))

  def conversations(self, conversations: Sequence[messages.Messages]) -> np.ndarray:
    """Returns the reward of each conversation, float32 [n]."""
    return rewards(self.model, self.params, [self._encode(conversation) for conversation in conversations])

  def _encode(self, conversation: messages.Messages) -> np.ndarray:
    return self.template.encode(self.tokenizer, conversation)[0]


@functools.partial(jax.jit, static_argnums=0)
@sharding.whole_rows()
def _rewards(apply, params, tokens_BT: jax.Array, last_B: jax.Array) -> jax.Array:
  """Returns the score of each row at the index `last_B` of its last token, [B], on every device."""
  scores = apply(params, Batch(sharding.constrain(tokens_BT, 'BT'))).scores
  is_last = jnp.arange(scores.shape[1])[None] == sharding.constrain(last_B, 'B')[:, None]
  return sharding.constrain(jnp.sum(jnp.where(is_last, scores, 0), axis=1), '-')


def rewards(model: Reward, params: Any, texts: Sequence[np.ndarray], positions: int = 4096) -> np.ndarray:
  """Returns the reward of each text, float32 [n]: the score at its last token.

  A text is int32 [T] with all control tokens. Texts of similar length form batches of about `positions` positions.
  Raises ValueError if a text is empty, or longer than the model's context.
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
    batch = order[start:start + rows]
    tokens, last = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, i in enumerate(batch):
      tokens[row, :lengths[i]], last[row] = texts[i], lengths[i] - 1
    result[batch] = np.asarray(_rewards(model.apply, params, tokens, last))[:len(batch)]
    start += rows
  return result


def show_rewards(loaded: Loaded, template: conversation.Template | None, records: Documents | None,
                 texts: Sequence[str], sources: Sequence[str] | None, bos: bool | None, allow_left_out: bool) -> None:
  """Prints the reward of each text, as an answer to its source, or of both answers of each pair."""
  if bos is not None:
    raise ValueError(f'--{"" if bos else "no"}bos: how a text begins for a reward model is a part of its template; '
                     'leave it out')
  judge = Judge(loaded.model, loaded.params, loaded.tokenizer, template)
  if records is None:
    _show_answers(judge, texts, [''] * len(texts) if sources is None else sources, allow_left_out)
    return
  scored_pairs = judge.pairs(list(records), loaded.run.data.keys)
  reads = f'the {loaded.model.max_length:,} tokens that the model reads at once'
  advice = 'shorten their prompts or answers, or train a reward model with a longer context'
  report_left_out('pairs', records, scored_pairs.too_long, f'longer than {reads}', advice, allow_left_out)
  if not len(scored_pairs.chosen):
    raise ValueError(f'none of {len(records):,} pairs fits {reads}; shorten their prompts or answers')
  print('  chosen  rejected')
  for chosen, rejected in zip(scored_pairs.chosen, scored_pairs.rejected):
    print(f'{chosen:8.4f}  {rejected:8.4f}{"" if chosen > rejected else "  wrong"}')
  print(f'\n{len(scored_pairs.chosen):,} pairs: {scored_pairs.accuracy:.1%} right, margin {scored_pairs.margin:.4f}')


def _show_answers(judge: Judge, texts: Sequence[str], prompts: Sequence[str], allow_left_out: bool) -> None:
  """Prints the reward of each text. Of a file of texts, those that are too long for the model are left out."""
  encoded = judge.encode_answers(prompts, texts)
  places = range(len(texts))
  if isinstance(texts, Documents):
    limit = judge.model.max_length
    too_long = [i for i in places if len(encoded[i]) > limit]
    report_left_out('texts', texts, too_long, f'longer than the {limit:,} tokens that the model reads at once',
                    'shorten them, or train a reward model with a longer context', allow_left_out)
    places = sorted({*places} - {*too_long})
    if not places:
      raise ValueError(f'none of {len(texts):,} texts fits the {limit:,} tokens that the model reads; shorten them')
  print('  reward  text')
  for begin in range(0, len(places), 256):
    part = places[begin:begin + 256]
    for i, value in zip(part, rewards(judge.model, judge.params, [encoded[i] for i in part])):
      print(f'{value:8.4f}  {texts[i][:100]!r}')
