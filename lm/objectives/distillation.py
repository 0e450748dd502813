"""Distillation: a student learns a teacher's distributions over the vocabulary (Hinton et al. 2015, arXiv:1503.02531).

  L = sum w [(1 - hard) T^2 D(p_T, q_T) - hard log q(target)] / sum w

p_T and q_T are softmax(logits / T) of the teacher and of the student, T the temperature. T^2 keeps the gradient as
large as it is at T = 1; TRL's GKDTrainer has no such factor. The teacher reads what the student reads. `distil` is
distillation with an online teacher, whose parameters are `train.Constants('teacher', model, load)`. `distil_stored`
uses its top-k predictions, which `annotate.Annotated(data, teacher, top_k.columns, top_k)` computes once and stores.

A divergence is a function of log p and log q, each [..., V], that returns terms [..., V]; their sum over V is D.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.objectives.objective import Objective, by_position, over_vocabulary, targets_of

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def forward_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """KL(p || q) = sum p (log p - log q): the student covers all that the teacher finds likely."""
  return jnp.exp(teacher) * (teacher - student)


def reverse_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """KL(q || p) = sum q (log q - log p): the student avoids what the teacher finds unlikely (Gu et al. 2024)."""
  return jnp.exp(student) * (student - teacher)


@dataclasses.dataclass(frozen=True)
class JensenShannon:
  """beta KL(p || m) + (1 - beta) KL(q || m), where m = beta p + (1 - beta) q (Agarwal et al. 2024, arXiv:2306.13649).

  TRL's `generalized_jsd_loss` is the same for 0 < beta < 1. There, 0 means `forward_kl` and 1 means `reverse_kl`. The
  limits of this divergence are 0; those of this divergence over beta, and over 1 - beta, are the two.
  """
  beta: float = 0.5

  def __post_init__(self):
    if not 0 < self.beta < 1:
      raise ValueError(f'beta={self.beta} is not between 0 and 1; for 0 and 1 in TRL use forward_kl and reverse_kl')

  def __call__(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
    middle = jnp.logaddexp(teacher + np.log(self.beta), student + np.log1p(-self.beta))
    return self.beta * jnp.exp(teacher) * (teacher - middle) + (1 - self.beta) * jnp.exp(student) * (student - middle)


def distil(objective: Objective, teacher: Callable[..., Any], divergence: Divergence = forward_kl,
           temperature: float = 1., hard: float = 0.) -> Objective:
  """Returns an objective with the examples of `objective`, learned from an online teacher.

  Logits of both models are computed one chunk of positions at a time (see `over_vocabulary`). The teacher is not
  differentiated. The metric `divergence` is D(p_T, q_T) in nats a target.

  Args:
    objective: one whose loss consists of its targets alone (see `targets_of`).
    teacher: `apply` of the teacher's model, whose parameters are `params['teacher']`.
    temperature: T, above 0.
    hard: weight of its `token_loss` on the targets themselves, from 0 to below 1.

  Raises:
    ValueError: if the loss of `objective` has other terms; and, when the loss is traced, if the teacher and the student
      have different numbers of logits.
  """
  token_loss, denominator = targets_of(objective)
  mix = _mix(divergence, temperature, hard, token_loss)

  def with_teacher(logits, targets, weights, hidden, head):
    terms = divergence(_log_softmax(head(hidden), temperature), _log_softmax(logits, temperature))
    return mix(logits, targets, weights, jnp.sum(terms, axis=-1))

  def loss(apply, params, batch, key):
    teacher_outputs = teacher(params['teacher'], batch)   # `over_vocabulary` does not differentiate its args
    outputs = apply(params, batch, key=key)
    _check_sizes(*(sharding.vocabulary_of(out.head, out.hidden) for out in (teacher_outputs, outputs)))
    loss_sum, sums = over_vocabulary(with_teacher, outputs.hidden, outputs.head,
                                     (batch.targets, batch.weights, teacher_outputs.hidden), (teacher_outputs.head,))
    return loss_sum, denominator(batch), sums

  return dataclasses.replace(objective, loss=loss, token_loss=token_loss, denominator=None)


@dataclasses.dataclass(frozen=True)
class TopK:
  """The top-k predictions of a teacher: the k likeliest tokens, their log p_T, and log p_T of all others together.

  They take 8 k + 4 bytes a position. `vocab` is the size of the teacher's vocabulary. `annotate.Annotated` is given
  `columns` and the object itself, which computes them.
  """
  k: int
  vocab: int
  temperature: float = 1.

  def __post_init__(self):
    if not 0 < self.k <= self.vocab:
      raise ValueError(f'k={self.k} is not from 1 to the {self.vocab} tokens of the teacher')
    _check_temperature(self.temperature)

  @property
  def columns(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {'teacher_ids': (np.int32, (self.k,)), 'teacher_log_probs': (np.float32, (self.k + 1,))}

  def __call__(self, apply: Callable[..., Any], params: Any, batch: Batch) -> dict[str, jax.Array]:
    def top_k(logits):   # each device needs the whole vocabulary
      log_probs = _log_softmax(logits, self.temperature)
      values, ids = jax.lax.top_k(sharding.constrain(log_probs, 'BT-'), self.k)
      others = jnp.where(_spread(ids, values, logits.shape[-1]) > -jnp.inf, -jnp.inf, log_probs)
      # It is a sum, because 1 minus the mass of the k would be a rounding error where the others have little mass.
      tail = jnp.maximum(jax.nn.logsumexp(others, axis=-1, keepdims=True), np.log(np.finfo(np.float32).tiny))
      return {'teacher_ids': ids, 'teacher_log_probs': jnp.concatenate([values, tail], axis=-1)}
    outputs = apply(params, batch)
    return by_position(top_k, outputs.hidden, outputs.head)


def distil_stored(objective: Objective, stored: TopK, divergence: Divergence = forward_kl, hard: float = 0.
                  ) -> Objective:
  """Returns an objective with the examples of `objective`, learned from stored top-k predictions of a teacher.

  They are the columns `teacher_ids` and `teacher_log_probs` of the data. D is between distributions over k + 1
  outcomes: the k tokens, and "any other". So the student learns how much mass lies outside of the k, but not how it is
  distributed; `hard` adds that. This D is at most the D over the vocabulary. (Renormalising the k probabilities would
  teach that all other tokens are impossible; see Anshumann et al. 2025, arXiv:2503.16870.) Other arguments are as in
  `distil`; the temperature is the one of the stored predictions.

  Raises:
    ValueError: when the loss is traced, if the data has no such columns, or the student has another number of logits.
  """
  token_loss, denominator = targets_of(objective)
  mix = _mix(divergence, stored.temperature, hard, token_loss)

  def with_stored(logits, targets, weights, ids, log_probs):
    student, teacher = _log_softmax(logits, stored.temperature), _spread(ids, log_probs[..., :-1], logits.shape[-1])
    is_stored = teacher > -jnp.inf
    terms = jnp.sum(jnp.where(is_stored, divergence(jnp.where(is_stored, teacher, 0), student), 0), axis=-1)
    if stored.k < stored.vocab:
      terms = terms + divergence(log_probs[..., -1], jax.nn.logsumexp(jnp.where(is_stored, -1e30, student), axis=-1))
    return mix(logits, targets, weights, terms)

  def loss(apply, params, batch, key):
    missing = [name for name in stored.columns if name not in (batch.columns or {})]
    if missing:
      raise ValueError(f'the data has no columns {" and ".join(missing)}; annotate it: annotate.Annotated')
    outputs = apply(params, batch, key=key)
    _check_sizes(stored.vocab, sharding.vocabulary_of(outputs.head, outputs.hidden))
    args = batch.targets, batch.weights, *(batch.columns[name] for name in stored.columns)
    loss_sum, sums = over_vocabulary(with_stored, outputs.hidden, outputs.head, args)
    return loss_sum, denominator(batch), sums

  return dataclasses.replace(objective, loss=loss, token_loss=token_loss, denominator=None)


def check_tokenizers(teacher: Any, student: Any) -> None:
  """Raises ValueError if an id may stand for different texts in the two tokenizers."""
  if teacher.fingerprint != student.fingerprint:
    raise ValueError(f'the teacher has a tokenizer of {teacher.vocab_size} tokens, fingerprint {teacher.fingerprint}, '
                     f'the student one of {student.vocab_size} tokens, fingerprint {student.fingerprint}; a teacher '
                     'can only teach its own tokens; read the data with its tokenizer')


def _check_sizes(teacher: int, student: int) -> None:
  if teacher != student:
    raise ValueError(f'the teacher has logits for {teacher} tokens, the student for {student}; give the student the '
                     'vocabulary of the teacher')


def _check_temperature(temperature: float) -> None:
  if not 0 < temperature < float('inf'):
    raise ValueError(f'temperature={temperature} is not positive and finite')


def _log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
  return jax.nn.log_softmax(logits if temperature == 1 else logits / temperature)


def _mix(divergence, temperature, hard, token_loss) -> Callable[..., tuple[jax.Array, Any]]:
  _check_temperature(temperature)
  if not 0 <= hard < 1:
    raise ValueError(f'hard={hard} is not from 0 to below 1; with 1 nothing would be learned from the teacher')

  def mix(logits, targets, weights, divergence_BT):
    """Returns the loss of a chunk and its sums, given the divergence at each position."""
    loss, sums = token_loss(logits, targets, weights)
    soft = (1 - hard) * temperature ** 2 * jnp.sum(divergence_BT * weights)
    counted = (weights > 0).astype(jnp.float32)
    pair = jnp.sum(divergence_BT * counted), jnp.sum(counted)
    return soft + hard * loss if hard else soft, {**sums, 'divergence': pair}
  return mix


def _spread(ids_BTk: jax.Array, values_BTk: jax.Array, vocab: int) -> jax.Array:
  """Returns the values at their ids and -inf elsewhere, [B, T, V]. Each shard of V fills its own part."""
  def local(ids, values, first, size):
    ids = ids - first
    ids = jnp.where((ids >= 0) & (ids < size), ids, size)
    rows, times = (jnp.arange(n).reshape([-1 if i == axis else 1 for i in range(3)])
                   for axis, n in enumerate(ids.shape[:2]))
    return jnp.full((*ids.shape[:2], size), -jnp.inf).at[rows, times, ids].set(values, mode='drop')

  if sharding.spec('V') is None:
    return local(ids_BTk, values_BTk, 0, vocab)
  size, rows = vocab // sharding.parts('V'), sharding.spec('BT-')
  return jax.shard_map(lambda *args: local(*args, sharding.part_index('V') * size, size), in_specs=(rows, rows),
                       out_specs=sharding.spec('BTV'))(ids_BTk, values_BTk)
