"""Hands answers over to a person whose log-probability is below a threshold, and measures how well that works."""
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.chat import conversation
from lm.data.chat.messages import Messages
from lm.evaluate import score
from lm.evaluate.measures import Measure, mean, ratio


def log_probabilities(model: Any, params: Any, speaker: conversation.Conversation, questions: Sequence[Messages],
                      replies: Sequence[str]) -> np.ndarray:
  """Returns log p(reply and its end | question) in nats, [replies], on the current mesh."""
  encoded = [speaker.template.encode(speaker.tokenizer, [*question, {'role': 'assistant', 'content': reply}],
                                     first=len(question)) for question, reply in zip(questions, replies, strict=True)]
  log_p = score.log_probabilities(model, params, [ids for ids, _ in encoded])
  return np.array([values[is_reply[1:]].sum() for values, (_, is_reply) in zip(log_p, encoded)])


def threshold(log_p: np.ndarray, to_person: np.ndarray) -> float:
  """Returns the threshold with the largest Youden's J; answers with a log-probability below it are handed over.

  `to_person` says which answers should be handed over. Youden's J is the share of these that are handed over, less the
  share of the others that are. So it does not depend on how many there are of each, while the threshold with the best
  F1 hands everything over if most answers should be. `log_p` is -inf for an answer that is the sentence of handing
  over, which is below any threshold. Of several best thresholds, the lowest one is returned.
  """
  candidates = np.unique([*log_p, np.inf])
  candidates = candidates[candidates > -np.inf]
  handed_over = log_p < candidates[:, None]
  recall, false_alarms = ((handed_over & which).sum(1) / max(which.sum(), 1) for which in (to_person, ~to_person))
  return float(candidates[np.argmax(recall - false_alarms)])


def measures(log_p: np.ndarray, to_person: np.ndarray, limit: float) -> list[Measure]:
  """Returns measures of handing over the answers whose log-probability is below the limit.

  `precision` is the share of the answers handed over that should be, and `recall` the share of those that should be
  handed over that are. `errors_kept` is the share of the answers kept that should have been handed over.
  """
  below, to_person = np.asarray(log_p) < limit, np.asarray(to_person, bool)
  both = below & to_person
  return [Measure('precision', np.stack([both, below], 1), ratio, 'higher'),
          Measure('recall', np.stack([both, to_person], 1), ratio, 'higher'),
          Measure('errors_kept', np.stack([~below & to_person, ~below], 1), ratio, 'lower'),
          mean('handed_over', below, '')]
