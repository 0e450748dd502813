"""Distillation equals closed forms in float64 and finite differences, on meshes, with a teacher or predictions."""
import dataclasses
import functools
import importlib
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import on
from helpers.slow import slow

from lm import sharding, signature
from lm.data.batch import Batch, Dialogue, Form, template
from lm.data.batch import special as special_of
from lm.data.tokenizers.folder import Bytes
from lm.models import transformer
from lm.objectives import objective
from lm.objectives.distillation import JensenShannon, TopK, distil, distil_stored, forward_kl, reverse_kl
from lm.objectives.next_token import next_token

ROWS, TIME, VOCAB = 4, 8, 32
# These programs are run once or twice: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


@dataclasses.dataclass(frozen=True)
class Linear:
  """A model whose hidden states depend on the token and its place, with a head: a student or teacher of any width."""
  width: int

  max_length = 99

  def init(self, key):
    keys = jax.random.split(key)
    return {'x': jax.random.normal(keys[0], (1, TIME, self.width)),
            'w': sharding.constrain(jax.random.normal(keys[1], (VOCAB, self.width)), 'V-')}

  def apply(self, params, batch, *, key=None, cache=None):
    x = params['x'] * (1 + jnp.cos(batch.tokens.astype(jnp.float32)))[..., None]
    return transformer.Output(sharding.constrain(x, 'BTD'), transformer.Head(params['w']), None)


STUDENT, TEACHER = Linear(3), Linear(5)


def logits_of(params, tokens):
  x = np.asarray(params['x'], 'f8') * (1 + np.cos(tokens.astype('f8')))[..., None]
  return x @ np.asarray(params['w'], 'f8').T


def batch_of(columns=None):
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, VOCAB, (2, ROWS, TIME)).astype('i4')
  weights = rng.uniform(0.5, 2, (ROWS, TIME)) * (rng.uniform(size=(ROWS, TIME)) < 0.7)
  return Batch(tokens, targets, weights.astype('f4'), columns=columns)


def parameters():
  return {**STUDENT.init(jax.random.key(0)), 'teacher': TEACHER.init(jax.random.key(1))}


def softmax(logits):
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(a, b):
  return np.where(a > 0, a * (np.log(np.maximum(a, 1e-300)) - np.log(np.maximum(b, 1e-300))), 0).sum(-1)


def jensen_shannon(beta, p, q):
  m = beta * p + (1 - beta) * q
  return beta * kl(p, m) + (1 - beta) * kl(q, m)


KINDS = {'forward': (forward_kl, kl), 'reverse': (reverse_kl, lambda p, q: kl(q, p)),
         'js': (JensenShannon(0.3), functools.partial(jensen_shannon, 0.3))}


def closed_form(divergence, params, batch, temperature, hard, k=None):
  """Returns the loss of the batch, and the mean divergence of a target."""
  teacher, student = logits_of(params['teacher'], batch.tokens), logits_of(params, batch.tokens)
  p, q = softmax(teacher / temperature), softmax(student / temperature)
  nll = -np.log(np.take_along_axis(softmax(student), batch.targets[..., None], -1)[..., 0])
  if k is not None:
    best = np.argsort(-p)[..., :k]
    p, q = (np.concatenate([chosen, np.maximum(1 - chosen.sum(-1, keepdims=True), 0)], -1)
            for chosen in (np.take_along_axis(p, best, -1), np.take_along_axis(q, best, -1)))
  divergences = divergence(p, q)
  counted = batch.weights > 0
  return ((batch.weights * ((1 - hard) * temperature ** 2 * divergences + hard * nll)).sum() / batch.weights.sum(),
          divergences[counted].mean())


def loss_of(goal, params, batch):
  loss, weight, sums = goal.loss(STUDENT.apply, params, batch, None)
  return loss / weight, sums


@pytest.mark.parametrize('kind, temperature, hard', [('forward', 1., 0.), ('forward', 2.5, 0.25),
                                                     ('reverse', 2.5, 0.25), ('js', 1., 0.)])
def test_losses_are_the_closed_forms_and_gradients_their_finite_differences(kind, temperature, hard, monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: 3)
  divergence, reference = KINDS[kind]
  params, batch = parameters(), batch_of()
  goal = distil(next_token(), TEACHER.apply, divergence, temperature, hard)
  (loss, sums), grads = jit(jax.value_and_grad(lambda p: loss_of(goal, p, batch), has_aux=True))(params)
  expected, mean = closed_form(reference, params, batch, temperature, hard)
  assert loss == pytest.approx(expected, rel=2e-6)
  assert sums['divergence'][0] / sums['divergence'][1] == pytest.approx(mean, rel=2e-6)
  student = softmax(logits_of(params, batch.tokens))
  nll = -np.log(np.take_along_axis(student, batch.targets[..., None], -1)[..., 0])[batch.weights > 0].sum()
  assert sums['nll'] == pytest.approx(nll, rel=1e-5) and sums['tokens'] == (batch.weights > 0).sum()
  assert not any(np.any(g) for g in jax.tree.leaves(grads['teacher']))
  rng = np.random.default_rng(2)
  for name in 'xw':
    step = rng.normal(size=params[name].shape) * 1e-5
    either = [closed_form(reference, {**params, name: np.asarray(params[name], 'f8') + sign * step}, batch,
                          temperature, hard)[0] for sign in (1, -1)]
    assert np.sum(np.asarray(grads[name], 'f8') * step) == pytest.approx((either[0] - either[1]) / 2, rel=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(kind):
  params = STUDENT.init(jax.random.key(0))
  params = {**params, 'teacher': params}
  goal = distil(next_token(), STUDENT.apply, KINDS[kind][0], temperature=2.)
  (loss, _), grads = jit(jax.value_and_grad(lambda p: loss_of(goal, p, batch_of()), has_aux=True))(params)
  assert abs(loss) < 1e-6 and max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-6


def stored_batch(top_k, params):
  columns = jit(functools.partial(top_k, TEACHER.apply))(params['teacher'], batch_of())
  return batch_of(jax.tree.map(np.asarray, columns))


@pytest.mark.parametrize('kind, k', [('forward', 5), ('reverse', VOCAB - 1),
                                     *slow(('reverse', 1), ('js', 5), ('forward', VOCAB))])
def test_stored_predictions_give_the_divergence_of_the_best_and_the_sum_of_the_others(kind, k, monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: 3)
  divergence, reference = KINDS[kind]
  top_k, params = TopK(k, VOCAB, 2.), parameters()
  batch = stored_batch(top_k, params)
  goal = distil_stored(next_token(), top_k, divergence, hard=0.25)
  (loss, sums), grads = jit(jax.value_and_grad(lambda p: loss_of(goal, p, batch), has_aux=True))(params)
  # At k = VOCAB - 1, the others are a single token.
  expected, mean = closed_form(reference, params, batch, 2., 0.25, k if k < VOCAB - 1 else None)
  assert loss == pytest.approx(expected, rel=1e-5)
  assert sums['divergence'][0] / sums['divergence'][1] == pytest.approx(mean, rel=1e-5)
  whole = distil(next_token(), TEACHER.apply, divergence, 2., hard=0.25)
  (full, _), full_grads = jit(jax.value_and_grad(lambda p: loss_of(whole, p, batch), has_aux=True))(params)
  if k < VOCAB - 1:
    assert loss < full   # the sum of the others hides part of the divergence
  else:
    assert loss == pytest.approx(float(full), rel=1e-5)
    for name in 'xw':
      np.testing.assert_allclose(grads[name], full_grads[name], atol=1e-5 * np.abs(full_grads[name]).max())


@pytest.mark.parametrize('remainder', [1e-9, 1e-4])
def test_gradients_are_finite_where_the_best_have_nearly_all_mass(remainder):
  """All mass of teacher and student but `remainder` is on the k best tokens."""
  top_k = TopK(2, 4)
  logits = np.log([0.5, 0.5 - remainder, remainder / 2, remainder / 2]).astype('f4')[None, None]
  columns = {'teacher_ids': np.array([[[0, 1]]], 'i4'),
             'teacher_log_probs': np.log([[[0.6, 0.4 - remainder, remainder]]]).astype('f4')}
  apply = lambda params, batch, key: transformer.Output(params, transformer.Head(jnp.eye(4)), None)
  batch = Batch(*np.zeros((2, 1, 1), 'i4'), np.ones((1, 1), 'f4'), columns=columns)
  for divergence, _ in KINDS.values():
    goal = distil_stored(next_token(), top_k, divergence)
    loss = lambda x, goal=goal: goal.loss(apply, x, batch, None)[0]
    value, grad = jax.value_and_grad(loss)(jnp.asarray(logits))
    assert 0 < value < 0.1 and np.abs(grad).max() < 0.3   # neither is nan


@pytest.mark.parametrize('shape', ['fsdp:2,tensor:4', *slow('fsdp:4')])
def test_a_split_vocabulary_changes_nothing(shape, monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: 3)
  top_k = TopK(3, VOCAB, 2.)

  def compute():
    # The mesh needs as many rows as it has devices.
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), batch_of())
    params = jit(parameters)()
    mesh = jax.sharding.get_mesh()
    batch = batch if mesh.empty else sharding.shard_rows(batch, mesh)

    def both(params, batch):
      columns = top_k(TEACHER.apply, params['teacher'], batch)
      stored = batch._replace(columns=columns)
      goals = [distil(next_token(), TEACHER.apply, JensenShannon(), 2.),
               distil_stored(next_token(), top_k, reverse_kl)]
      return columns, [jax.value_and_grad(functools.partial(loss_of, goal), has_aux=True)(params, stored)
                       for goal in goals]
    return jax.tree.map(np.asarray, jit(both)(params, batch))

  expected = compute()
  with on(shape):
    actual = compute()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def sizes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (np.prod(v.aval.shape) for v in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from sizes(inner)


def test_no_program_holds_all_logits_at_once(monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: 2)
  batch, top_k = batch_of(), TopK(3, VOCAB)
  stored = batch_of({name: np.zeros((ROWS, TIME, *shape), dtype) for name, (dtype, shape) in top_k.columns.items()})
  for goal in (distil(next_token(), TEACHER.apply), distil_stored(next_token(), top_k)):
    grad = jax.value_and_grad(lambda p, goal=goal: loss_of(goal, p, stored), has_aux=True)
    assert max(sizes(jax.make_jaxpr(grad)(parameters()).jaxpr)) == ROWS * 2 * VOCAB
  program = jax.make_jaxpr(functools.partial(top_k, TEACHER.apply))(parameters()['teacher'], batch)
  assert max(sizes(program.jaxpr)) == ROWS * 2 * VOCAB


def test_forms_needs_and_control_are_those_of_the_objective():
  def answers(dialogue, rng, special):
    return next_token().forms[0].example(dialogue.tokens, rng, special)._replace(
        weights=dialogue.loss_mask[1:].astype(np.float32))
  taught = objective.token_objective(Form(answers), needs=Dialogue, control=('<|mask|>',))
  goal = distil(taught, TEACHER.apply)
  assert (goal.forms, goal.needs, goal.control) == (taught.forms, Dialogue, ('<|mask|>',))
  row = template(goal, special_of(Bytes(('<|mask|>',)), goal.control), TIME)
  assert row.tokens.shape == (1, TIME)


TOKENIZER = Bytes()


@pytest.mark.parametrize('stored', [0, 4])
@pytest.mark.parametrize('kind', KINDS)
def test_the_experiment_minimises_the_divergence_that_its_flags_name(kind, stored, monkeypatch):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'experiments')
  distill = importlib.import_module('distill')
  base = types.SimpleNamespace(model=TAUGHT, start=None, tokenizer=TOKENIZER)
  pending = signature.call(distill.experiment, kind=kind, beta=0.3, temperature=1.5, stored_top_k=stored)
  goal = pending.build(base=base, like=None).objective
  params = parameters()
  columns = jax.jit(functools.partial(TopK(stored, VOCAB, 1.5), TEACHER.apply))(
      params['teacher'], batch_of()) if stored else None
  loss, _ = jax.jit(functools.partial(loss_of, goal))(params, batch_of(columns))
  expected, _ = closed_form(KINDS[kind][1], params, batch_of(), 1.5, 0., stored or None)
  assert float(loss) == pytest.approx(expected, rel=1e-4)


class Taught(Linear):
  """A teacher from whose vocabulary the student is made."""
  vocab = VOCAB


TAUGHT = Taught(TEACHER.width)
