"""Masked diffusion: tokens are masked at a random rate, and predicted from those that are left, before and after them.

Masking each of L tokens with probability t, uniform in (0, 1], bounds the likelihood (Sahoo et al. 2024, MDLM; Nie et
al. 2025, LLaDA; linear schedule):

  -log p(x) <= E_t E_masks [1/t sum_masked -log p(x_i | tokens left)]
             = E_l E_sets of l [L/l sum_set -log p(x_i | tokens left)],   l uniform in 1, ..., L.

The two are equal (LLaDA's eq. 14), but E[1/t] diverges, and L/l is at most L: examples are made the second way, so that
the loss has a variance.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batch import Batch, Dialogue, Example, Form, Special
from lm.objectives.objective import Objective, cross_entropy, over_vocabulary, token_mean


def mask_some(tokens: np.ndarray, asked: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
  """Masks l of the n tokens that are asked for, l uniform in 1 to n; the column `importance` is n/l where it did."""
  places = np.flatnonzero(asked)
  hidden, importance = tokens.copy(), np.zeros(len(tokens), np.float32)
  if n := len(places):
    count = int(rng.integers(1, n + 1))
    chosen = places[rng.permutation(n)[:count]]
    hidden[chosen], importance[chosen] = special.control[0], n / count
  return Example(hidden, tokens, asked.astype(np.float32), np.ones(len(tokens), bool),
                 columns={'importance': importance})


def document(tokens: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
  """All tokens are asked for but bos, which stays, as next-token prediction is given it."""
  asked = np.ones(len(tokens), bool)
  asked[0] = tokens[0] != special.bos
  return mask_some(tokens, asked, rng, special)


def dialogue(piece: Dialogue, rng: np.random.Generator, special: Special) -> Example:
  """What is to be learned of a dialogue; the rest is never masked."""
  return mask_some(piece.tokens, piece.loss_mask, rng, special)


def masked_diffusion(denominator: Callable[[Batch], jax.Array] = token_mean, mask: str = '<|mask|>',
                     needs: type = np.ndarray) -> Objective:
  """The bound above, on the log-probability of a document, or of what is asked for in a `Dialogue`.

  `loss_sum` and the sum `nll` are estimates of the bound, in nats; `tokens`, and `weights` of a batch, count all tokens
  that may be masked, so that loss, perplexity and bits per byte are (bounds of) those of a model of next tokens. The
  metric `accuracy` is over masked tokens. All positions are seen by all others of their document.
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
