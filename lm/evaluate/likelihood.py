"""How well a model predicts documents: cross-entropy and what follows from it, accuracy, calibration.

Definitions, with sums over all documents of a set, and natural logarithms:

  cross_entropy      -sum log p(token) / number of tokens, nats
  perplexity         exp(cross_entropy): of a token, so models with other tokenizers are not comparable
  word_perplexity    exp(-sum log p(token) / number of words), where words are what white space separates
  bits_per_byte      -sum log2 p(token) / number of UTF-8 bytes: comparable across tokenizers
  accuracy           share of the tokens that the model found the most likely ones
  calibration_error  sum over bins of |sum of top probabilities - number correct| / number of tokens, for 15 bins of
                     equal width of the probability of the most likely token (ECE, Guo et al. 2017, arXiv:1706.04599)
"""
import re

import numpy as np

from lm.evaluate.measures import Measure, ratio
from lm.evaluate.score import Predicted

BINS = 15        # of the probability of the most likely token
POSITIONS = 24   # bins of the number of tokens before a token: 0, 1, 2-3, 4-7, ...: up to 2^23

# Columns of the rows that `rows` returns, one row a document.
NLL, TOKENS, CORRECT, WORDS, BYTES = range(5)
_CALIBRATION = np.arange(5, 5 + 3 * BINS).reshape(3, BINS)   # tokens, sum of top probabilities, correct, of each bin
_BY_POSITION = np.arange(5 + 3 * BINS, 5 + 3 * BINS + 2 * POSITIONS).reshape(2, POSITIONS)   # loss, tokens
COLUMNS = 5 + 3 * BINS + 2 * POSITIONS


def row(text: str, predicted: Predicted, byte_count: int, before: int = 0) -> np.ndarray:
  """Returns what a document adds to the sums of a set, [COLUMNS].

  Args:
    text: the document.
    predicted: of each of its tokens.
    byte_count: of UTF-8 bytes that the predicted tokens stand for.
    before: the number of tokens of the document before the first predicted one.
  """
  result = np.zeros(COLUMNS)
  nll = -predicted.log_p.astype(np.float64)
  count = len(nll)
  result[[NLL, TOKENS, CORRECT, BYTES]] = nll.sum(), count, predicted.correct.sum(), byte_count
  result[WORDS] = len(re.split(r'\s+', text)) if count else 0   # as lm-evaluation-harness counts words
  top = np.exp(predicted.top_log_p.astype(np.float64))
  bins = np.minimum((top * BINS).astype(int), BINS - 1)
  for columns, weights in zip(_CALIBRATION, (np.ones(count), top, predicted.correct)):
    result[columns] = np.bincount(bins, weights, BINS)
  # The exponent of the power of two above.
  bins = np.minimum(np.frexp(np.arange(before, before + count))[1], POSITIONS - 1)
  for columns, weights in zip(_BY_POSITION, (nll, np.ones(count))):
    result[columns] = np.bincount(bins, weights, POSITIONS)
  return result


def measures(rows: np.ndarray, signature: str = '') -> list[Measure]:
  """Returns the metrics above of a set of documents, from the rows [documents, COLUMNS] that `row` returns."""
  def measure(name, columns, value, better):
    return Measure(name, rows[:, columns], value, better, signature)

  bits = np.stack([rows[:, NLL] / np.log(2), rows[:, BYTES]], 1)
  return [loss(rows, signature=signature),
          measure('perplexity', [NLL, TOKENS], exponential, 'lower'),
          measure('word_perplexity', [NLL, WORDS], exponential, 'lower'),
          Measure('bits_per_byte', bits, ratio, 'lower', signature),
          measure('accuracy', [CORRECT, TOKENS], ratio, 'higher'),
          measure('calibration_error', _CALIBRATION.ravel(), calibration_error, 'lower')]


def exponential(sums: np.ndarray) -> np.ndarray:
  """Returns exp of the quotient of two sums, [..., 2] -> [...]; infinite where it is beyond the largest float."""
  with np.errstate(over='ignore'):
    return np.exp(ratio(sums))


def loss(rows: np.ndarray, column: int = NLL, signature: str = '') -> Measure:
  """Returns the cross-entropy of a set of documents, of which `column` has the summed losses."""
  return Measure('cross_entropy', rows[:, [column, TOKENS]], ratio, 'lower', signature)


def calibration_error(sums: np.ndarray) -> np.ndarray:
  """Returns the expected calibration error of sums [..., 3 x BINS] of tokens, top probabilities and correct tokens."""
  tokens, top, correct = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, BINS), -2, 0)
  return ratio(np.stack([np.abs(top - correct).sum(-1), tokens.sum(-1)], -1))


def reliability(rows: np.ndarray, signature: str = '') -> list[tuple[float, Measure]]:
  """Returns (mean top probability, accuracy) of each bin of top probabilities that has tokens."""
  points = []
  for tokens, top, correct in _CALIBRATION.T:
    count = rows[:, tokens].sum()
    if count:
      points.append((rows[:, top].sum() / count,
                     Measure('accuracy', rows[:, [correct, tokens]], ratio, 'higher', signature)))
  return points


def by_position(rows: np.ndarray, signature: str = '') -> list[tuple[str, Measure]]:
  """Returns the loss of tokens with so many tokens before them, such as ('4-7', ...), for each bin that has tokens."""
  points = []
  for i, (loss, tokens) in enumerate(_BY_POSITION.T):
    if rows[:, tokens].sum():
      first, last = (1 << i) >> 1, max((1 << i) - 1, 0)
      name = str(first) if first == last else f'{first}-{last}'
      points.append((name, Measure('cross_entropy', rows[:, [loss, tokens]], ratio, 'lower', signature)))
  return points
