"""How tokens are drawn: the settings of a row, and the arrays of settings of all rows. `filters` applies them."""
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import seeds

GREEDY = 1e-5   # below this temperature, the most probable token is taken

# The most entries that a row's settings have room for. The arrays have these sizes for all rows, so that no setting
# compiles anew.
BIASES = 300
STOP_IDS = 16
BAD_WORDS, BAD_WORD_LENGTH = 64, 8
BREAKERS = 64

RECENT = 1024   # the number of last tokens of a text among which repetitions are looked for


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. As in vLLM, the order is: bad words, min_tokens, logit_bias, penalties (that of DRY last),
  temperature, min_p, top_k, top_p; then typical_p and eta_cutoff, as in transformers.

  Args:
    temperature: divides the logits. At 0, and below 1e-5, the most probable token is taken; other temperatures below
      0.01 count as 0.01.
    top_k: keeps the k most probable tokens, and those as probable as the last of them; 0 (or -1) keeps all.
    top_p: keeps the smallest set of tokens whose probabilities sum to at least p (Holtzman et al. 2020); 1 keeps all.
    min_p: keeps tokens of at least this share of the greatest probability (Nguyen et al. 2024); 0 keeps all.
    repetition_penalty: lowers the probability of tokens of the prompt and the output (Keskar et al. 2019); 1 does
      nothing.
    presence_penalty: is subtracted from the logit of each token of the output, as OpenAI defines it.
    frequency_penalty: is subtracted from the logit of a token once for each time that it is in the output.
    logit_bias: (id, value) pairs; the value is added to the logit of the token.
    bad_words: sequences of ids, none of which is written as a whole, also not as the continuation of a prompt.
    min_tokens: the number of tokens before which no token that ends a text is drawn.
    stop_ids: ids that end the text, and are written too, like those of the engine.
    typical_p: keeps the tokens whose information is the nearest to the entropy, the smallest set of them whose
      probabilities sum to at least p (Meister et al. 2023); 1 keeps all.
    eta_cutoff: excludes tokens of a probability below min(eta, sqrt(eta) * exp(-entropy)) (Hewitt et al. 2022); 0
      excludes none.
    dry_multiplier: of the penalty on a token that would continue a repetition in the last 1024 tokens, by the method
      DRY, "don't repeat yourself"; see `filters.penalize_repetitions`. 0 is off.
    dry_base: by which this penalty grows with each token of the repetition.
    dry_allowed_length: the length of a repetition whose continuation has the penalty `dry_multiplier`; those that are
      shorter have none.
    dry_sequence_breakers: ids that no repetition goes across.
  """
  temperature: float = 1.
  top_k: int = 0
  top_p: float = 1.
  min_p: float = 0.
  repetition_penalty: float = 1.
  presence_penalty: float = 0.
  frequency_penalty: float = 0.
  logit_bias: tuple[tuple[int, float], ...] = ()
  bad_words: tuple[tuple[int, ...], ...] = ()
  min_tokens: int = 0
  stop_ids: tuple[int, ...] = ()
  typical_p: float = 1.
  eta_cutoff: float = 0.
  dry_multiplier: float = 0.
  dry_base: float = 1.75
  dry_allowed_length: int = 2
  dry_sequence_breakers: tuple[int, ...] = ()

  def __post_init__(self):
    for name, valid, allowed in (
        ('temperature', 0 <= self.temperature < math.inf, '0 (greedy) or more'),
        ('top_k', -1 <= self.top_k < 2 ** 31 and self.top_k % 1 == 0, 'a whole number, 0 (off) or more, below 2 ** 31'),
        ('top_p', 0 < self.top_p <= 1, 'more than 0 and at most 1 (off)'),
        ('min_p', 0 <= self.min_p <= 1, 'between 0 (off) and 1'),
        ('typical_p', 0 < self.typical_p <= 1, 'more than 0 and at most 1 (off)'),
        ('eta_cutoff', 0 <= self.eta_cutoff < 1, '0 (off) or more, and less than 1'),
        ('repetition_penalty', 1e-30 <= self.repetition_penalty <= 1e30, 'from 1e-30 to 1e30; 1 is off'),
        ('presence_penalty', -2 <= self.presence_penalty <= 2, 'between -2 and 2; 0 is off'),
        ('frequency_penalty', -2 <= self.frequency_penalty <= 2, 'between -2 and 2; 0 is off'),
        ('min_tokens', 0 <= self.min_tokens < 2 ** 31 and self.min_tokens % 1 == 0,
         'a whole number, 0 (off) or more, below 2 ** 31'),
        ('logit_bias', len(self.logit_bias) <= BIASES and all(-100 <= value <= 100 for _, value in self.logit_bias),
         f'at most {BIASES} pairs (id, value from -100 to 100)'),
        ('bad_words', len(self.bad_words) <= BAD_WORDS
         and all(1 <= len(word) <= BAD_WORD_LENGTH for word in self.bad_words),
         f'at most {BAD_WORDS} sequences of 1 to {BAD_WORD_LENGTH} ids'),
        ('stop_ids', len(self.stop_ids) <= STOP_IDS, f'at most {STOP_IDS} ids'),
        ('dry_multiplier', 0 <= self.dry_multiplier < math.inf, '0 (off) or more'),
        ('dry_base', 1 <= self.dry_base < math.inf, '1 or more'),
        ('dry_allowed_length', 1 <= self.dry_allowed_length < 2 ** 31 and self.dry_allowed_length % 1 == 0,
         'a whole number, 1 or more, below 2 ** 31'),
        ('dry_sequence_breakers', len(self.dry_sequence_breakers) <= BREAKERS, f'at most {BREAKERS} ids')):
      if not valid:
        raise ValueError(f'{name}={getattr(self, name)} must be {allowed}')

  @property
  def greedy(self) -> bool:
    return self.temperature < GREEDY

  @property
  def ids(self) -> set[int]:
    """The ids that the settings name."""
    return {*(i for i, _ in self.logit_bias), *(i for word in self.bad_words for i in word), *self.stop_ids,
            *self.dry_sequence_breakers}

  def check_ids(self, vocab: int) -> None:
    """Raises ValueError if the settings name an id that is not below `vocab`, or is negative."""
    for token in self.ids:
      if not 0 <= token < vocab:
        raise ValueError(f'id {token} in logit_bias, bad_words or stop_ids is not one of 0 to {vocab - 1}')


class Settings(NamedTuple):
  """The sampling of each row, as arrays `[B, ...]`, so that rows with other settings need no new compilation.

  Ids that are -1 stand for nothing. A bad word is padded on the left. `key` has the data of a random key for each row,
  `[B, 2]`, so that its draws do not depend on the other rows.
  """
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  typical_p: jax.Array
  eta_cutoff: jax.Array
  repetition_penalty: jax.Array
  presence_penalty: jax.Array
  frequency_penalty: jax.Array
  min_tokens: jax.Array
  dry_multiplier: jax.Array
  dry_base: jax.Array
  dry_allowed_length: jax.Array
  bias_ids: jax.Array      # [B, BIASES]
  biases: jax.Array        # [B, BIASES]
  bad_words: jax.Array     # [B, BAD_WORDS, BAD_WORD_LENGTH]
  stop_ids: jax.Array      # [B, STOP_IDS]
  breakers: jax.Array      # [B, BREAKERS]
  key: jax.Array

  @property
  def greedy(self) -> jax.Array:
    return self.temperature < GREEDY


def settings(samplings: Sequence[Sampling], seeds_B: Sequence[int], streams_B: np.ndarray) -> Settings:
  """Returns the settings of rows, in NumPy. Row b draws from the random stream `streams_B[b]`, uint32, of its seed."""
  rows = len(samplings)
  dtypes = {'temperature': np.float32, 'top_k': np.int32, 'top_p': np.float32, 'min_p': np.float32,
            'typical_p': np.float32, 'eta_cutoff': np.float32, 'repetition_penalty': np.float32,
            'presence_penalty': np.float32, 'frequency_penalty': np.float32, 'min_tokens': np.int32,
            'dry_multiplier': np.float32, 'dry_base': np.float32, 'dry_allowed_length': np.int32}
  values = [np.array([getattr(sampling, name) for sampling in samplings], dtype) for name, dtype in dtypes.items()]
  bias_ids, biases = np.full((rows, BIASES), -1, np.int32), np.zeros((rows, BIASES), np.float32)
  bad_words = np.full((rows, BAD_WORDS, BAD_WORD_LENGTH), -1, np.int32)
  stop_ids, breakers = np.full((rows, STOP_IDS), -1, np.int32), np.full((rows, BREAKERS), -1, np.int32)
  for row, sampling in enumerate(samplings):
    for i, (token, value) in enumerate(sampling.logit_bias):
      bias_ids[row, i], biases[row, i] = token, value
    for i, word in enumerate(sampling.bad_words):
      bad_words[row, i, -len(word):] = word
    stop_ids[row, :len(sampling.stop_ids)] = sampling.stop_ids
    breakers[row, :len(sampling.dry_sequence_breakers)] = sampling.dry_sequence_breakers
  keys = {seed: seeds.key(seed) for seed in set(seeds_B)}
  streams = jnp.asarray(streams_B, jnp.uint32)
  key = jax.vmap(jax.random.fold_in)(jnp.stack([keys[seed] for seed in seeds_B]), streams)
  return Settings(*values, bias_ids, biases, bad_words, stop_ids, breakers, np.asarray(jax.random.key_data(key)))


# The fields of settings that depend on the tokens of the text or on their number, or that name ids, and the values of
# those that are off.
_NEED_HISTORY = {'repetition_penalty': 1, 'presence_penalty': 0, 'frequency_penalty': 0, 'min_tokens': 0,
                 'dry_multiplier': 0, 'bias_ids': -1, 'bad_words': -1, 'stop_ids': -1}


def first_that_needs_history(settings: Settings) -> str | None:
  """Returns the first of the settings, as 'name=value', without which text need not be written token by token.

  Returns None if there is none. The settings are arrays of NumPy.
  """
  for name, off in _NEED_HISTORY.items():
    values = getattr(settings, name)
    if np.any(values != off):
      return f'{name}={values[values != off][0]:g}'
  return None


def row_keys(settings: Settings, *numbers: jax.Array | int) -> jax.Array:
  """Returns the key of each row, `[B]`, after `fold_in` of each of the numbers, `[B]` or one for all rows."""
  keys = jax.random.wrap_key_data(settings.key)
  for number in numbers:
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))
  return keys
