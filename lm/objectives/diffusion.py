"""Masked diffusion: tokens are masked at a random rate, and predicted from the tokens that stay on both sides.

Masking each of L tokens with probability t, uniform in (0, 1], bounds the likelihood (Sahoo et al. 2024, MDLM; Nie et
al. 2025, LLaDA; linear schedule):

  -log p(x) <= E_t E_masks [1/t sum_masked -log p(x_i | tokens left)]
             = E_l E_sets of l [L/l sum_set -log p(x_i | tokens left)],   l uniform in 1, ..., L.

The two are equal (LLaDA's eq. 14), but the variance of the first is infinite (E[1/t] diverges), while L/l is at most L.
So examples are made the second way.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batch import Batch, Dialogue, Example, Form, Special
from lm.objectives.objective import Objective, cross_entropy, over_vocabulary, token_mean


def mask_some(tokens: np.ndarray, eligible: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
  """Masks l of the n eligible tokens, with l uniform in 1 to n. The column `importance` is n/l at masked tokens."""
  places = np.flatnonzero(eligible)
  hidden, importance = tokens.copy(), np.zeros(len(tokens), np.float32)
  n = len(places)
  if n:
    count = int(rng.integers(1, n + 1))
    chosen = places[rng.permutation(n)[:count]]
    hidden[chosen], importance[chosen] = special.control[0], n / count
  return Example(hidden, tokens, eligible.astype(np.float32), np.ones(len(tokens), bool),
                 columns={'importance': importance})


def document(tokens: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
  """Masks some of all tokens but bos, which next-token prediction does not predict either."""
  eligible = np.ones(len(tokens), bool)
  eligible[0] = tokens[0] != special.bos
  return mask_some(tokens, eligible, rng, special)


def dialogue(piece: Dialogue, rng: np.random.Generator, special: Special) -> Example:
  """Masks some tokens of the answers of a dialogue, and none of the prompts."""
  return mask_some(piece.tokens, piece.loss_mask, rng, special)


def masked_diffusion(denominator: Callable[[Batch], jax.Array] = token_mean, mask: str = '<|mask|>',
                     needs: type = np.ndarray) -> Objective:
  """The bound above on the log-probability of a document, or of the answers in a `Dialogue`.

  `loss_sum` and the sum `nll` are estimates of the bound, in nats; `tokens`, and `weights` of a batch, count all tokens
  that may be masked. So loss, perplexity and bits per byte are bounds that can be compared with those of next-token
  prediction. The metric `accuracy` is over masked tokens. Each position sees all positions of its document.
  """
  def loss(apply, params, batch, key):
    outputs = apply(params, batch, key=key)
    weights = batch.weights * batch.columns['importance']
    loss_sum, sums = over_vocabulary(cross_entropy, outputs.hidden, outputs.head, (batch.targets, weights))
    tokens = jnp.sum((batch.weights > 0).astype(jnp.float32))
    return loss_sum, denominator(batch), {'nll': loss_sum, 'tokens': tokens, 'correct': sums['correct'],
                                          'accuracy': (sums['correct'], sums['tokens'])}

  form = Form(dialogue if needs is Dialogue else document, in_place=needs is not Dialogue)
  return Objective((form,), loss, needs, control=(mask,), prompt=None)   # `lm.generate.unmask` writes, in any order
