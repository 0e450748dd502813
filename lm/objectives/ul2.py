"""UL2: a mixture of denoisers, each announced by a mode token in front of the source."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from lm.data.batch import Batch
from lm.data.tokenizers.base import sentinels
from lm.objectives.objective import Objective, TokenLoss, cross_entropy, token_mean, token_objective
from lm.objectives.span_corruption import DECODER, Layout, Noise, form, random_spans

R, S, X = range(3)   # regular, sequential, extreme
MODES = ('<|R|>', '<|S|>', '<|X|>')


class Denoiser(NamedTuple):
  """A mode, and what is hidden."""
  mode: int
  noise: Noise


def sequential(density: float) -> Noise:
  """Hides the last 1 to 2 * density * n of n tokens (uniform) as one span: a prefix is continued."""
  highest = min(2 * density, 1.)

  def mask(tokens: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(tokens) >= tokens - rng.integers(1, max(min(int(highest * tokens), tokens - 1), 1) + 1)

  # At least one token is hidden, even of a short piece, and the sentinel stands in source and targets.
  return Noise(mask, lambda tokens: 1, (1., 0.), (highest, 2 - highest), (1., 2.))


# Table 1 of the paper: mean span and share of what is hidden.
DENOISERS = (Denoiser(R, random_spans(0.15, 3)), Denoiser(R, random_spans(0.15, 8)), Denoiser(S, sequential(0.25)),
             Denoiser(X, random_spans(0.5, 3)), Denoiser(X, random_spans(0.5, 8)), Denoiser(X, random_spans(0.15, 64)),
             Denoiser(X, random_spans(0.5, 64)))


def ul2(denoisers: tuple[Denoiser, ...] = DENOISERS, layout: Layout = DECODER,
        modes: tuple[str, str, str] = MODES, sentinels: tuple[str, ...] = sentinels(32),
        denominator: Callable[[Batch], jax.Array] = token_mean, token_loss: TokenLoss = cross_entropy) -> Objective:
  """UL2 (Tay et al. 2022, arXiv:2205.05131): rows take turns in the denoisers. To weigh one more, list it twice.

  Args:
    layout: as in `span_corruption`, for an encoder-decoder or a decoder alone.
    modes: names of control tokens, for R, S and X; in UL2's own, `[NLU]`, `[S2S]` and `[NLG]`.
    sentinels: as in `span_corruption`. Spans of 3 tokens, half of the text, need one for six tokens.
  """
  forms = [form(noise, layout, len(sentinels), len(sentinels) + mode) for mode, noise in denoisers]
  return token_objective(*forms, control=(*sentinels, *modes), denominator=denominator, token_loss=token_loss,
                         prompt=layout.prompt)
