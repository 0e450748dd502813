"""Multi-token prediction: each position also predicts tokens further ahead."""
import dataclasses
import math

import jax
import jax.numpy as jnp

from lm import sharding
from lm.data.batch import Batch
from lm.objectives.objective import Objective, cross_entropy, over_vocabulary


def shifted(batch: Batch, depth: int) -> tuple[jax.Array, jax.Array]:
  """Returns the targets and weights `depth` positions further ahead; the weight is 0 where that is another segment."""
  targets, weights, segments = jax.tree.map(   # whole rows, because targets cross the borders of their parts
      lambda x: sharding.constrain(x, 'B-'), (batch.targets, batch.weights, batch.segments))

  def ahead(x):
    return jnp.pad(x[:, depth:], ((0, 0), (0, min(depth, x.shape[1]))))

  weights = ahead(weights)
  if segments is not None:
    weights = jnp.where(segments == ahead(segments), weights, 0)
  return ahead(targets), weights


def multi_token(objective: Objective, weight: float = 0.3) -> Objective:
  """The loss of `objective` and that of D depths (DeepSeek-AI 2024, DeepSeek-V3, eq. 24 and 25).

    L = L_0 + weight/D sum_k L_k,   L_k = -1/W sum_i w_{i+k} log p_k(target_{i+k} | tokens up to i + k),

  W is the denominator of `objective`, such as `next_token()`, whose targets must be the tokens that follow. The last k
  positions of a segment have no target at depth k, but still count in W, as in eq. 24. If the `token_loss` of
  `objective` is not -log p, the depths use it too. DeepSeek-V3 had a weight of 0.3, and 0.1 in the last third; with
  weight = D all losses count alike (Gloeckle et al. 2024).

  The model's outputs have the hidden states of each depth, `ahead` (see `lm.models.prediction_heads`). `nll` and
  `correct` are those of `objective`; depth k adds the metrics `depth_k/nll` and `depth_k/accuracy`.
  """
  if not 0 <= weight < math.inf:
    raise ValueError(f'further tokens of weight={weight}: it must be at least 0, and finite')
  token_loss = objective.token_loss or cross_entropy

  def loss(apply, params, batch, key):
    outputs = apply(params, batch, key=key)
    loss_sum, weight_sum, sums = objective.loss(lambda *args, **kwargs: outputs, params, batch, key)
    for depth, hidden in enumerate(outputs.ahead, 1):
      depth_loss, depth_sums = over_vocabulary(token_loss, hidden, outputs.head, shifted(batch, depth))
      loss_sum = loss_sum + weight / len(outputs.ahead) * depth_loss
      sums = sums | {f'depth_{depth}/nll': (depth_sums['nll'], depth_sums['tokens']),
                     f'depth_{depth}/accuracy': (depth_sums['correct'], depth_sums['tokens'])}
    return loss_sum, weight_sum, sums

  return dataclasses.replace(objective, loss=loss, denominator=None)
