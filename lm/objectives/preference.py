"""Learning from preferences: DPO, IPO, ORPO, SimPO and KTO, and reward models.

y_w is the chosen answer of a pair and y_l the rejected one. log p(y|x) is the sum over the tokens of y, including the
token that ends it. Both answers are segments of one row, so a step needs one forward pass. The log-probabilities of a
reference model, log p_ref, are stored with the data, by
`annotate.Annotated(data, model, preference.COLUMNS, preference.reference)`.

A pair loss is a function `(Pairs) -> (loss, reward_w, reward_l)`, each [B, P]; `preference` turns it into an objective,
its mean over pairs. Metrics: `preference/accuracy`, how often the reward of y_w is above that of y_l;
`preference/margin`, by how much; `preference/chosen` and `preference/rejected`, the rewards; nll, tokens and correct
are of the chosen answers.

Shapes: B rows, T positions, P = ceil(T / 2), the pairs that a row may hold.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch, Dialogue, Example, Form, Pair, Rated, Room, Special
from lm.objectives.objective import Objective, Sums, target_log_probabilities, target_scores

# What `reference` stores of each position, for `annotate.Annotated`.
COLUMNS = {'reference': (np.float32, ())}


def reference(apply: Callable, params: Any, batch: Batch) -> dict[str, jax.Array]:
  """Returns log p_ref of each target, [B, T], in nats."""
  outputs = apply(params, batch)
  return {'reference': target_log_probabilities(outputs.hidden, outputs.head, batch.targets)}


class Pairs(NamedTuple):
  """The log p(y|x), log p_ref(y|x) and number of tokens of y of each pair, [B, P]; log p_ref is None if not stored."""
  chosen: jax.Array
  rejected: jax.Array
  chosen_tokens: jax.Array
  rejected_tokens: jax.Array
  chosen_reference: jax.Array | None = None
  rejected_reference: jax.Array | None = None

  @property
  def ratios(self) -> tuple[jax.Array, jax.Array]:
    """The log p(y|x) / p_ref(y|x) of y_w and y_l. Raises ValueError if there is no log p_ref."""
    _require(self.chosen_reference)
    return self.chosen - self.chosen_reference, self.rejected - self.rejected_reference

  @property
  def means(self) -> tuple[jax.Array, jax.Array]:
    """The log p(y|x) / |y| of y_w and y_l."""
    return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


PairLoss = Callable[[Pairs], tuple[jax.Array, jax.Array, jax.Array]]


def dpo(beta: float = 0.1, smoothing: float = 0.) -> PairLoss:
  """-log sigmoid(h), h = beta (log p/p_ref(y_w) - log p/p_ref(y_l)) (Rafailov et al. 2023, arXiv:2305.18290).

  `smoothing` is the assumed share of pairs with swapped answers: conservative DPO (Mitchell 2023),
  -(1 - smoothing) log sigmoid(h) - smoothing log sigmoid(-h).
  """
  def pair_loss(pairs):
    chosen, rejected = (beta * ratio for ratio in pairs.ratios)
    h = chosen - rejected
    return -(1 - smoothing) * jax.nn.log_sigmoid(h) - smoothing * jax.nn.log_sigmoid(-h), chosen, rejected
  return pair_loss


def robust_dpo(beta: float = 0.1, smoothing: float = 0.1) -> PairLoss:
  """DPO without the bias of pairs with swapped answers (Chowdhury et al. 2024, arXiv:2403.00409).

  (-(1 - smoothing) log sigmoid(h) + smoothing log sigmoid(-h)) / (1 - 2 smoothing), with h as in `dpo`.
  """
  def pair_loss(pairs):
    chosen, rejected = (beta * ratio for ratio in pairs.ratios)
    right, wrong = jax.nn.log_sigmoid(chosen - rejected), jax.nn.log_sigmoid(rejected - chosen)
    return (smoothing * wrong - (1 - smoothing) * right) / (1 - 2 * smoothing), chosen, rejected
  return pair_loss


def ipo(beta: float = 0.1) -> PairLoss:
  """(log p/p_ref(y_w) / |y_w| - log p/p_ref(y_l) / |y_l| - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036).

  beta is their tau. Their formula has sums over tokens. Here, as in TRL on the authors' advice, log-ratios are means.
  """
  def pair_loss(pairs):
    ratios = pairs.ratios
    chosen, rejected = ratios[0] / pairs.chosen_tokens, ratios[1] / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)) ** 2, beta * ratios[0], beta * ratios[1]
  return pair_loss


def orpo(beta: float = 0.1) -> PairLoss:
  """-m_w - beta log sigmoid(log odds(m_w) - log odds(m_l)); no reference (Hong et al. 2024, arXiv:2403.07691).

  m = log p(y|x) / |y|, and log odds(m) = m - log(1 - e^m). beta is their lambda. TRL's first term also has the tokens
  of prompts; here, as in the paper, it is the loss of supervised fine-tuning.
  """
  def pair_loss(pairs):
    chosen, rejected = pairs.means
    h = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - beta * jax.nn.log_sigmoid(h), beta * chosen, beta * rejected
  return pair_loss


def _log_odds(mean: jax.Array) -> jax.Array:
  mean = jnp.minimum(mean, -1e-6)   # the odds of p = 1 are infinite
  return mean - jnp.log(-jnp.expm1(mean))


def simpo(beta: float = 2., gamma: float = 1.) -> PairLoss:
  """-log sigmoid(beta (m_w - m_l) - gamma), m = log p(y|x) / |y|; no reference (Meng et al. 2024, arXiv:2405.14734)."""
  def pair_loss(pairs):
    chosen, rejected = (beta * mean for mean in pairs.means)
    return -jax.nn.log_sigmoid(chosen - rejected - gamma), chosen, rejected
  return pair_loss


def example(pair: Pair, rng: np.random.Generator, special: Special) -> Example:
  """Returns both dialogues as segments, with next-token targets. Chosen answers have weight 1, rejected ones -1."""
  del rng, special
  return _segments(pair.chosen, pair.rejected)


def preference(pair_loss: PairLoss) -> Objective:
  """Returns the objective of the mean of a pair loss over pairs, such as `preference(dpo(beta=0.1))`."""
  def loss(apply, params, batch, key):
    sums, exists, counts = _answers(apply, params, batch, key)
    chosen, rejected = ({name: x[..., side] for name, x in sums.items()} for side in (0, 1))
    losses, *rewards = pair_loss(Pairs(chosen['policy'], rejected['policy'], chosen['tokens'], rejected['tokens'],
                                       chosen.get('reference'), rejected.get('reference')))
    return jnp.sum(losses * exists), jnp.sum(exists), {**counts, **_metrics(*rewards, exists)}

  return Objective((Form(example),), loss, Pair)


def rated_example(rated: Rated, rng: np.random.Generator, special: Special) -> Example:
  """Returns the dialogue and the mismatched one as segments. Answers have weight 1 in the first, -1 in the second."""
  del rng, special
  pair = _segments(rated.dialogue, rated.mismatched)
  return pair._replace(columns={'good': np.where(pair.weights > 0, np.float32(rated.good), np.float32(0))})


def kto(beta: float = 0.1, desirable: float = 1., undesirable: float = 1.) -> Objective:
  """KTO: learns from single answers that are rated good or bad (Ethayarajh et al. 2024, arXiv:2402.01306).

  The loss is the mean of desirable (1 - sigmoid(beta (r - z))) for good answers and undesirable
  (1 - sigmoid(beta (z - r))) for bad ones, where r = log p/p_ref(y|x). z, which has no gradient, estimates the distance
  of p from p_ref: max(0, the mean of log p/p_ref(y'|x)) over answers y' to other prompts, in the rows that are computed
  together (with `accumulate`, a part of the batch).

  Metrics: `preference/accuracy`, how often r is on the right side of z; `preference/kl`, z; `preference/chosen` and
  `preference/rejected`, beta r of good and of bad answers.
  """
  def loss(apply, params, batch, key):
    sums, exists, counts = _answers(apply, params, batch, key)
    _require(sums.get('reference'))
    ratio, mismatched = jnp.moveaxis(sums['policy'] - sums['reference'], -1, 0)
    kl = jnp.sum(mismatched * exists) / jnp.maximum(jnp.sum(exists), 1)
    kl = jnp.maximum(jax.lax.stop_gradient(kl), 0)
    good = sums['good'][..., 0] / sums['tokens'][..., 0]   # 1 or 0
    side = 2 * good - 1
    losses = (1 - jax.nn.sigmoid(beta * side * (ratio - kl))) * (good * desirable + (1 - good) * undesirable)
    total = lambda x, mask: (jnp.sum(x * mask), jnp.sum(mask))
    metrics = {'preference/accuracy': total(side * (ratio - kl) > 0, exists), 'preference/kl': total(kl, exists),
               'preference/chosen': total(beta * ratio, exists * good),
               'preference/rejected': total(beta * ratio, exists * (1 - good))}
    return jnp.sum(losses * exists), jnp.sum(exists), {**counts, **metrics}

  return Objective((Form(rated_example),), loss, Rated)


def reward_example(pair: Pair, rng: np.random.Generator, special: Special) -> Example:
  """Returns both dialogues as segments. The last token has weight 1 in the chosen one, -1 in the rejected one."""
  del rng
  tokens = np.concatenate([pair.chosen.tokens, pair.rejected.tokens])
  weights, first = np.zeros(len(tokens), np.float32), len(pair.chosen.tokens)
  weights[first - 1], weights[-1] = 1, -1
  return Example(tokens, np.full(len(tokens), special.eos, np.int32), weights,
                 segments=np.where(np.arange(len(tokens)) < first, 1, 2).astype(np.int32))


def reward(centering: float = 0.) -> Objective:
  """The objective of `models.reward.Reward`: the mean of -log sigmoid(r_w - r_l) (Bradley and Terry 1952).

  r is the score at the last token. `centering` adds centering (r_w + r_l)^2, which keeps rewards near 0 (Eisenstein et
  al. 2023, arXiv:2312.09244). Metrics as of `preference`; nll is this loss, its tokens are pairs.
  """
  def loss(apply, params, batch, key):
    scores = apply(params, batch, key=key).scores
    ends = segment_sums({'score': scores * jnp.abs(batch.weights), 'ends': jnp.abs(batch.weights)}, batch.segments)
    exists = ends['ends'][..., 0]
    chosen, rejected = jnp.moveaxis(ends['score'], -1, 0)
    nll = -jax.nn.log_sigmoid(chosen - rejected)
    metrics = _metrics(chosen, rejected, exists)
    right, pairs = metrics['preference/accuracy']
    counts = {'nll': jnp.sum(nll * exists), 'tokens': pairs, 'correct': right}
    return jnp.sum((nll + centering * (chosen + rejected) ** 2) * exists), pairs, {**counts, **metrics}

  # Two more positions, because the last tokens of both dialogues are inputs here and only targets elsewhere.
  return Objective((Form(reward_example, Room(extra=2)),), loss, Pair)


def segment_sums(values: dict[str, jax.Array], segments_BT: jax.Array) -> dict[str, jax.Array]:
  """Returns sums over segments, in pairs: [B, T] -> [B, P, 2]. Segments 1 and 2 of a row are at [0], 3 and 4 at [1].

  Each shard sums its own rows, which are whole.
  """
  time = segments_BT.shape[1]
  count = 2 * -(-time // 2)

  def row(values, segments):
    return jax.ops.segment_sum(values, segments, count + 1)[1:].reshape(-1, 2)

  def local(values, segments):
    return jax.tree.map(lambda x: jax.vmap(row)(x, segments), values)

  rows = sharding.spec('B')
  if rows is not None:
    local = jax.shard_map(local, in_specs=rows, out_specs=rows, check_vma=False)
  return local(*jax.tree.map(lambda x: sharding.constrain(x, 'B-'), (values, segments_BT)))


def _segments(first: Dialogue, second: Dialogue) -> Example:
  """Returns two dialogues as segments 1 and 2, with next-token targets and weights 1 and -1 of their answers."""
  def join(part):
    return np.concatenate([part(first), part(second)])

  sizes = len(first.tokens) - 1, len(second.tokens) - 1
  return Example(join(lambda x: x.tokens[:-1]), join(lambda x: x.tokens[1:]),
                 np.repeat(np.float32([1, -1]), sizes) * join(lambda x: x.loss_mask[1:]),
                 segments=np.repeat(np.int32([1, 2]), sizes))


def _answers(apply: Callable, params: Any, batch: Batch, key: jax.Array | None
             ) -> tuple[dict[str, jax.Array], jax.Array, Sums]:
  """Returns sums over the answers of each pair, which pairs exist, and counts.

  The sums are [B, P, 2]: log p as 'policy', tokens, and each column of the batch. Which pairs exist is [B, P]; the
  counts are nll, tokens and correct of the chosen answers. Pairs that do not exist have the sums of one token with
  log p = -1, so that nothing becomes infinite.
  """
  outputs = apply(params, batch, key=key)
  scores, best = target_scores(outputs.hidden, outputs.head, batch.targets)
  counted = jnp.abs(batch.weights)
  sums = segment_sums({'tokens': counted, 'policy': scores * counted,
                       **{name: x * counted for name, x in (batch.columns or {}).items()}}, batch.segments)
  exists = jnp.min(sums['tokens'], axis=-1) > 0
  empty = {name: {'policy': -1, 'reference': -1, 'tokens': 1}.get(name, 0) for name in sums}
  sums = {name: jnp.where(exists[..., None], x, empty[name]) for name, x in sums.items()}
  first = (batch.weights > 0).astype(jnp.float32)
  counts = {'nll': -jnp.sum(scores * first), 'tokens': jnp.sum(first), 'correct': jnp.sum(best * first)}
  return sums, exists.astype(jnp.float32), counts


def _metrics(chosen: jax.Array, rejected: jax.Array, exists: jax.Array) -> Sums:
  def total(x):
    return jnp.sum(x * exists), jnp.sum(exists)

  return {'preference/accuracy': total(chosen > rejected), 'preference/margin': total(chosen - rejected),
          'preference/chosen': total(chosen), 'preference/rejected': total(rejected)}


def _require(reference_sums: jax.Array | None) -> None:
  if reference_sums is None:
    raise ValueError('the loss compares with a reference model, but the data has no log-probabilities of one; use '
                     'annotate.Annotated(data, train.Constants(...), preference.COLUMNS, preference.reference)')
