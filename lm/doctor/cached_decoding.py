"""Probes of decoding: the cache against a whole forward pass, and the sampler against the scorer and the trainer."""
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm import lora, sharding
from lm.data.batch import Batch
from lm.doctor.findings import DoesNotApply, Finding, judge
from lm.doctor.small_batch import text_tokens
from lm.doctor.subject import Subject, compiled_fast
from lm.evaluate import score
from lm.generate.engine import Engine
from lm.generate.sampling import Sampling, settings
from lm.objectives.objective import target_log_probabilities
from lm.train.interfaces import Decoder

PROMPT, WRITTEN = 7, 5   # numbers of tokens


def _decoder(subject: Subject) -> tuple[Any, Any]:
  """Returns the model without adapters, and its shaken parameters, into which adapters are merged."""
  model, params = lora.merge(subject.run.model, subject.with_constants(subject.shaken))
  if not isinstance(model, Decoder) or not (model.causal and getattr(subject.run.objective, 'prompt', None)):
    raise DoesNotApply('the model does not write text from left to right')
  if model.max_length < PROMPT + WRITTEN + 1:
    raise DoesNotApply(f'the model reads only {model.max_length} tokens at once')
  return model, params


def _limit(model: Any) -> float:
  return 2e-4 if getattr(model, 'dtype', jnp.float32) == jnp.float32 else 5e-2


def _ids(subject: Subject, count: int) -> np.ndarray:
  """Returns random tokens of text, int32 [count]."""
  return np.random.default_rng(2).choice(text_tokens(subject.special), count)


def cache_equals_forward(subject: Subject) -> Finding:
  """Whether tokens that are read one by one, with a cache, get the log-probabilities of one forward pass."""
  model, params = _decoder(subject)
  rows, time = sharding.padded_rows(1), PROMPT + WRITTEN
  ids = np.repeat(np.int32([[subject.special.bos, *_ids(subject, time)]]), rows, axis=0)
  batch = Batch(ids[:, :-1], ids[:, 1:], positions=np.broadcast_to(np.arange(time, dtype=np.int32), (rows, time)),
                segments=np.ones((rows, time), np.int32))
  if model.reads_source:
    source = model.prompt([_ids(subject, PROMPT)] * rows, rows, subject.special.bos, subject.special.eos)
    batch = batch._replace(source=source.source, source_segments=source.source_segments)

  def log_p(outputs, targets):
    return sharding.constrain(target_log_probabilities(outputs.hidden, outputs.head, targets), '--')

  @compiled_fast
  @sharding.whole_rows()
  def read(params, batch, cache=None):
    outputs = model.apply(params, batch, cache=cache)
    return log_p(outputs, batch.targets), outputs.cache

  def part(start, stop):
    cut = lambda x: x[:, start:stop]
    columns = batch._replace(**{name: cut(getattr(batch, name)) for name in ('tokens', 'targets', 'positions',
                                                                             'segments')})
    return subject.on_mesh(columns if start == 0 else columns._replace(source=None, source_segments=None))

  whole = np.asarray(read(params, subject.on_mesh(batch))[0])[0]
  cache = compiled_fast(sharding.whole_rows()(functools.partial(model.init_cache, rows, time + 1)))()
  first, cache = read(params, part(0, PROMPT), cache)
  values = [np.asarray(first)[0]]
  for place in range(PROMPT, time):
    value, cache = read(params, part(place, place + 1), cache)
    values.append(np.asarray(value)[0])
  difference = float(np.abs(np.concatenate(values) - whole).max())
  return judge(difference <= _limit(model), f'log-probabilities of {WRITTEN} tokens that are read one by one differ '
               f'from those of a whole pass by {difference:.1e} nats',
               'the cache is not what the forward pass computes')


def sampler_scorer_trainer_agree(subject: Subject) -> Finding:
  """Whether the sampler, the scorer and the loss of training give the tokens of a text the same log-probabilities."""
  model, params = _decoder(subject)
  rows, special, tokenizer = sharding.padded_rows(1), subject.special, subject.data.tokenizer
  prompt = _ids(subject, PROMPT)
  batch = model.prompt([prompt], rows, special.bos, special.eos)
  engine = Engine(model, model.unstack(params), batch.tokens.shape[1] + WRITTEN, tokenizer.vocab_size, (special.eos,))
  limit = np.where(np.arange(rows) == 0, WRITTEN, 0)
  state, first = engine.prefill(batch, settings([Sampling(temperature=0)] * rows, [0] * rows, np.arange(rows)), limit)
  _, others = engine.step(state)
  written = np.concatenate([each.rows(1)[0] for each in (first, others)])
  sampled = np.concatenate([np.asarray(each.log_probabilities_BT)[0, :int(each.count_B[0])] for each in
                            (first, others)])
  if model.reads_source:
    text, sources = np.int32([special.bos, *written]), [np.int32([*prompt, special.eos])]
  else:
    text, sources = np.int32([special.bos, *prompt, *written]), None
  scored = score.log_probabilities(model, params, [text], sources)[0][-len(written):]
  gap = float(np.abs(sampled - scored).max())
  message = f'log-probabilities of {len(written)} tokens: sampler and scorer differ by {gap:.1e} nats'
  if not gap <= _limit(model):
    return judge(False, message, 'a text is scored otherwise than it is written')
  trained = _trained_nll(subject, model, params, text, None if sources is None else sources[0], len(written))
  if trained is None:
    return judge(True, f'{message}; the loss of training is of another kind')
  gap = abs(trained + float(scored.sum())) / len(written)
  message = f'{message}, scorer and trainer by {gap:.1e}'
  return judge(gap <= _limit(model), message, 'a text is trained on otherwise than it is scored')


def _trained_nll(subject: Subject, model: Any, params: Any, text: np.ndarray, source: np.ndarray | None, count: int
                 ) -> float | None:
  """Returns the sum of -log p of the last `count` tokens by the loss of the run; None where it is no such sum."""
  goal = subject.run.objective
  if getattr(goal, 'token_loss', None) is None or subject.run.data.columns or goal.forms[0].room.ratio != 1 and not \
      model.reads_source or 'ahead' in getattr(type(model), '__annotations__', {}):
    return None
  size, rows = len(text) - 1, sharding.padded_rows(1)
  width = size + 2
  tokens, targets, positions, segments = np.zeros((4, rows, width), np.int32)
  weights = np.zeros((rows, width), np.float32)
  span = slice(2, 2 + size)   # another document precedes the text
  tokens[:, :2], segments[:, :2], positions[:, :2] = text[:1], 1, [0, 1]
  tokens[:, span], targets[:, span], positions[:, span], segments[:, span] = text[:-1], text[1:], np.arange(size), 2
  weights[0, 2 + size - count:2 + size] = 1
  batch = Batch(tokens, targets, weights, positions, segments)
  if source is not None:
    sources = np.repeat(np.int32([[source[0], *source]]), rows, axis=0)
    source_segments = np.full_like(sources, 2)
    source_segments[:, 0] = 1
    batch = batch._replace(source=sources, source_segments=source_segments)

  def nll(params, batch):
    return goal.loss(model.apply, params, batch, None)[2]['nll']
  return float(compiled_fast(sharding.whole_rows()(nll))(params, subject.on_mesh(batch)))
