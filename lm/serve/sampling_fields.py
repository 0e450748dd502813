"""How the tokens of an answer are drawn, as the bodies of completions and of chats say it."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from lm import generate
from lm.serve import body_fields
from lm.serve.api_errors import bad_request
from lm.serve.body_fields import Field, integer, number

MOST_TOKENS = (1 << 31) - 1   # of a body; what a model has room for is checked where its prompt is known
MOST_CHOICES = 128
MOST_LOGPROBS = 20       # alternatives of a token
MOST_SEED = (1 << 32) - 1
MOST_BREAKERS = 64       # strings that no repetition goes across

# Fields of completions and of chats.
SAMPLING: Mapping[str, Field] = {
    'temperature': number(0, 2).otherwise(1.), 'top_p': number(0, 1, above=True).otherwise(1.),
    'top_k': integer(-1, MOST_TOKENS).otherwise(0), 'min_p': number(0, 1).otherwise(0.),
    'typical_p': number(0, 1, above=True).otherwise(1.), 'eta_cutoff': number(0, 1).otherwise(0.),
    'presence_penalty': number(-2, 2).otherwise(0.), 'frequency_penalty': number(-2, 2).otherwise(0.),
    'repetition_penalty': number(0, 10, above=True).otherwise(1.), 'logit_bias': body_fields.BIASES,
    'n': integer(1, MOST_CHOICES).otherwise(1), 'seed': integer(0, MOST_SEED),
    'min_tokens': integer(0, MOST_TOKENS).otherwise(0),
    'dry_multiplier': number(0, 100).otherwise(0.), 'dry_base': number(1, 100).otherwise(1.75),
    'dry_allowed_length': integer(1, MOST_TOKENS).otherwise(2),
    'dry_sequence_breakers': body_fields.texts(MOST_BREAKERS).otherwise(('\n', ':', '"', '*')),
    'stop': body_fields.texts(16), 'stop_token_ids': body_fields.IDS.otherwise(())}
STREAMING: Mapping[str, Field] = {
    'stream': body_fields.boolean(),
    'stream_options': body_fields.nested('stream_options', {'include_usage': body_fields.boolean()})}
# Whose request it is, for the logs of a provider. This server keeps no such logs, so that it changes nothing.
LABELS: Mapping[str, Field] = {'user': body_fields.TEXT}


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
  """How an answer is written.

  Attributes:
    sampling: how its tokens are drawn.
    n: the number of answers.
    seed: of the random numbers; None for one that the server draws.
    max_tokens: the largest number of tokens of an answer; None for what the server chooses.
    stop: strings that end an answer, and are not part of it.
    logprobs: the number of alternatives of each token whose log-probabilities are answered; None for no
      log-probabilities at all.
    breakers: strings that no repetition of DRY goes across.
  """
  sampling: generate.Sampling = generate.PLAIN
  n: int = 1
  seed: int | None = None
  max_tokens: int | None = None
  stop: tuple[str, ...] = ()
  logprobs: int | None = None
  breakers: tuple[str, ...] = ()


_OF_TOKENS = ('temperature', 'top_p', 'top_k', 'min_p', 'presence_penalty', 'frequency_penalty', 'repetition_penalty',
              'logit_bias', 'min_tokens', 'typical_p', 'eta_cutoff', 'dry_multiplier', 'dry_base',
              'dry_allowed_length')


def replace(sampling: generate.Sampling, **fields: Any) -> generate.Sampling:
  """Returns a sampling with other values of some fields. Raises ApiError for values that it cannot have."""
  try:
    return dataclasses.replace(sampling, **fields)
  except ValueError as error:
    raise bad_request(str(error)[:400].replace('stop_ids', 'stop_token_ids')) from None


def read_settings(values: Mapping[str, Any], max_tokens: int | None, logprobs: int | None) -> AnswerSettings:
  """Returns the settings of the values of a body's fields. Raises ApiError where they contradict one another."""
  n, stop = values['n'], values['stop']
  sampling = replace(generate.PLAIN, **{name: values[name] for name in _OF_TOKENS}, stop_ids=values['stop_token_ids'])
  if n > 1 and sampling.greedy:
    raise bad_request(f'all n={n} answers would be equal with temperature=0; leave out one of the two', 'n')
  if max_tokens is not None and sampling.min_tokens > max_tokens:
    raise bad_request(f'min_tokens={sampling.min_tokens} is more than max_tokens={max_tokens}', 'min_tokens')
  if sampling.min_tokens and stop:
    raise bad_request(f'min_tokens={sampling.min_tokens} holds for token ids that end an answer, and not for the '
                      'strings of stop; leave out one of the two, or give stop_token_ids', 'min_tokens')
  return AnswerSettings(sampling, n, values['seed'], max_tokens, stop, logprobs,
                        values['dry_sequence_breakers'])


def read_streaming(values: Mapping[str, Any]) -> tuple[bool, bool]:
  """Returns whether an answer is streamed, and whether the stream ends with its usage."""
  options = values['stream_options']
  if options is not None and not values['stream']:
    raise bad_request('stream_options is for stream=true; leave it out', 'stream_options')
  return values['stream'], bool(options and options['include_usage'])
