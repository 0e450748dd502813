"""The log-probability of a reply is that of its row alone; the threshold is the best of all, tried one by one."""
import jax
import numpy as np
import pytest

from lm import models, sharding
from lm.data import tokenizers
from lm.data.batch import Batch
from lm.data.chat import conversation
from lm.evaluate import hand_over, measures


def test_the_log_probability_is_of_the_reply_and_its_end():
  tokens = tokenizers.Bytes()
  speaker = conversation.Conversation(tokens, conversation.Turns())
  model = models.llama(tokens.vocab_size, 16, 1, heads=2, max_length=32)
  questions = [[{'role': 'user', 'content': text}] for text in ('a?', 'two?')]
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    params = jax.jit(model.init)(jax.random.key(0))
    ours = hand_over.log_probabilities(model, params, speaker, questions, ['yes', 'n'])
    for question, reply, value in zip(questions, ('yes', 'n'), ours):
      before, = speaker.encode_batch([question])
      after = np.append(tokens.encode(reply), tokens.control_id('<|end|>'))
      ids = np.concatenate([before, after]).astype('i4')
      outputs = model.apply(params, Batch(ids[None, :-1], ids[None, 1:]))
      log_p = jax.nn.log_softmax(outputs.head(outputs.hidden))[0, -len(after):]
      assert value == pytest.approx(float(sum(log_p[i, token] for i, token in enumerate(after))), rel=1e-5)


def youden(log_p, to_person, limit):
  """Returns sensitivity + specificity - 1, from counts."""
  right = {True: 0, False: 0}
  for value, expected in zip(log_p, to_person):
    right[bool(expected)] += (value < limit) == expected
  return right[True] / sum(to_person) + right[False] / (len(to_person) - sum(to_person)) - 1


@pytest.mark.parametrize('seed', range(5))
def test_no_threshold_has_a_larger_j(seed):
  rng = np.random.default_rng(seed)
  log_p = np.round(rng.normal(-2, 1, 40), 1)   # some are equal
  to_person = rng.random(40) < 1 / (1 + np.exp(3 * (log_p + 2.5)))
  log_p[:3] = -np.inf
  limit = hand_over.threshold(log_p, to_person)
  best = max(youden(log_p, to_person, value) for value in np.arange(-6, 3, 0.05))
  assert youden(log_p, to_person, limit) == pytest.approx(best) and limit > -np.inf
  other = np.tile(np.flatnonzero(to_person), 20)   # many more of one kind change nothing
  assert hand_over.threshold(np.append(log_p, log_p[other]), np.append(to_person, to_person[other])) == limit


def test_precision_and_recall_are_counts():
  log_p, to_person = np.array([-np.inf, -5, -3, -2, -1, -1]), np.array([True, True, False, True, False, True])
  values = [measure.interval().value for measure in hand_over.measures(log_p, to_person, -2.5)]
  assert values == [2 / 3, 2 / 4, 2 / 3, 3 / 6]
  assert hand_over.threshold(np.array([-np.inf, -1.]), np.array([True, False])) == -1
  nothing = hand_over.measures(np.zeros(4), np.zeros(4, bool), -1.)
  assert np.isnan(measures.intervals(nothing)[0].value) and measures.intervals(nothing)[3].value == 0
