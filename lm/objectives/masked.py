"""Masked language modelling: L = -sum_{j in M} log p(token_j | all tokens, of which those in M are corrupted)."""
from collections.abc import Callable

import jax
import numpy as np

from lm.data.batch import Batch, Example, Form, Special
from lm.objectives.objective import Objective, TokenLoss, cross_entropy, token_mean, token_objective


def masked(rate: float = 0.15, mask: str = '<|mask|>', shares: tuple[float, float] = (0.8, 0.1),
           denominator: Callable[[Batch], jax.Array] = token_mean, token_loss: TokenLoss = cross_entropy) -> Objective:
  """Tokens are hidden, and predicted from those on both sides (Devlin et al. 2019, arXiv:1810.04805).

  M has `rate` * n random tokens of a piece with n tokens (without bos and eos), rounded, and at least one. A share
  `shares[0]` of M becomes the control token `mask` (`[MASK]` in BERT's vocabulary), a share `shares[1]` becomes random
  tokens of the vocabulary, and the remaining tokens stay. All positions are bidirectional, also in a decoder.
  """
  if not 0 < rate <= 1 or min(shares) < 0 or sum(shares) > 1:
    raise ValueError(f'rate={rate} must be above 0 and at most 1, and shares={shares} two shares of at most 1 in all')

  def example(piece: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
    tokens, weights = piece.copy(), np.zeros(len(piece), np.float32)
    candidates = np.flatnonzero((piece != special.bos) & (piece != special.eos))
    if len(candidates):
      hidden = rng.choice(candidates, max(round(rate * len(candidates)), 1), replace=False, shuffle=False)
      draw = rng.random(len(hidden))
      weights[hidden] = 1
      tokens[hidden[draw < shares[0]]] = special.control[0]
      other = hidden[(draw >= shares[0]) & (draw < sum(shares))]
      tokens[other] = rng.integers(special.vocab, size=len(other))
    return Example(tokens, piece, weights, np.ones(len(piece), bool))

  return token_objective(Form(example, in_place=True), control=(mask,), denominator=denominator, token_loss=token_loss,
                         prompt=None)
