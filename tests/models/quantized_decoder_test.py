"""Products of factors of 8 bits: their error is that of rounding, they train, and all else stays float32."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.meshes import on

from lm import sharding
from lm.data.batch import Batch
from lm.data.text import source
from lm.models import encoder, layers, transformer
from lm.models.quantized_decoder import Quantized, exact, quantized
from lm.models.rounding import FP8, INT8, rounded
from lm.objectives.next_token import next_token
from lm.options import Computation

pytest.importorskip('qwix')
# The largest error of rounding, as a share of the number and of the largest number of its row.
ERRORS = {INT8: ((0, 0.5 / 127),) * 2, FP8: ((2 ** -4, 2 ** -10 / 448), (2 ** -3, 2 ** -17 / 57344))}


def bound(formula, a, b, errors, axes):
  """Returns the largest error of each entry of a product whose factors are rounded, and whose result is bfloat16."""
  def error(x, error, axis):
    return error[0] * abs(x) + error[1] * abs(x).max(axis, keepdims=True)
  da, db = (error(*values) for values in zip((a, b), errors, axes))
  largest = np.einsum(formula, abs(a) + da, abs(b) + db)
  return largest - np.einsum(formula, abs(a), abs(b)) + 2 ** -8 * largest


@pytest.mark.parametrize('mesh', [None, 'fsdp:2,tensor:2'])
@pytest.mark.parametrize('kind', [INT8, FP8], ids=['int8', 'fp8'])
def test_a_product_has_the_error_of_rounding_its_factors(kind, mesh):
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, dy = (jax.random.normal(key, shape).astype(jnp.bfloat16).astype(jnp.float32) for key, shape in
              zip(keys, ((4, 8, 64), (64, 32), (4, 8, 32))))
  x = x * jnp.exp2(jnp.arange(8.))[None, :, None]   # tokens of different sizes have scales of their own

  def product(x, w):
    return layers.einsum('BTD,DF->BTF', x, sharding.gather(w, 'DF'))

  with on(mesh):
    half = [sharding.constrain(a.astype(jnp.bfloat16), axes) for axes, a in (('BTD', x), ('DF', w), ('BTF', dy))]
    _, exact_dw = jax.vjp(product, *half[:2])[1](half[2])
    with rounded(kind):
      y, pull = jax.vjp(product, *half[:2])
    dx, dw = pull(half[2])
  np.testing.assert_array_equal(dw, exact_dw)   # its factors are not rounded
  x, w, dy, y, dx = (np.float64(np.float32(a)) for a in (x, w, dy, y, dx))
  forward, backward = ERRORS[kind]
  excess = abs(y - x @ w) / bound('BTD,DF->BTF', x, w, (forward, forward), (-1, 0))
  assert 0.01 < excess.max() < 1
  excess = abs(dx - dy @ w.T) / bound('BTF,DF->BTD', dy, w, (backward, forward), (-1, 1))
  assert 0.01 < excess.max() < 1


def tiny():
  return transformer.llama(32, 32, 2, 4, kv_heads=2, max_length=16)


def losses(model, steps=50):
  """Trains on sequences that count up, and returns the loss of each step."""
  optimizer, goal = optax.adamw(3e-3), next_token()
  params = jax.jit(model.init)(jax.random.key(0))

  def step(carry, key):
    tokens = (jax.random.randint(key, (8, 1), 0, 32) + jnp.arange(17)[None]) % 32
    batch = Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((8, 16)))

    def loss(params):
      total, count, _ = goal.loss(model.apply, params, batch, None)
      return total / count

    value, grads = jax.value_and_grad(loss)(carry[0])
    updates, state = optimizer.update(grads, carry[1], carry[0])
    return (optax.apply_updates(carry[0], updates), state), value

  return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), steps)
                                      )[1])()


@pytest.mark.slow
def test_training_with_rounded_factors_follows_float32():
  plain, *others = (np.asarray(losses(Computation(precision).apply(tiny())))
                    for precision in ('float32', 'int8', 'fp8'))
  assert plain[0] > 3 and plain[-1] < 0.7 * plain[0]
  for curve in others:
    np.testing.assert_allclose(curve, plain, rtol=0.03)
    assert np.any(curve != plain)


def products(jaxpr):
  """Yields the dtypes of the factors and of the result of each matrix product."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield tuple(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars))
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from products(inner)


def test_only_products_with_weights_of_blocks_are_rounded():
  model = Computation('int8').apply(tiny())
  assert isinstance(model, Quantized) and model.dtype == jnp.bfloat16
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  batch = Batch(jnp.zeros((2, 16), jnp.int32))
  dtypes = list(products(jax.make_jaxpr(lambda params: model.apply(params, batch).hidden)(params).jaxpr))
  assert dtypes.count(('int8', 'int8', 'int32')) == 7   # query, key, value, out, gate, up, down
  # The others are products of scales, and those of attention.
  assert set(dtypes) == {('int8',) * 2 + ('int32',), ('float32',) * 3, ('bfloat16',) * 2 + ('float32',)}
  logits = jax.make_jaxpr(lambda params: model.apply(params, batch).head(jnp.zeros((2, 16, 32), jnp.bfloat16)))(params)
  assert list(products(logits.jaxpr))[-1] == ('bfloat16', 'bfloat16', 'float32')
  assert exact(model) == tiny().with_dtype(jnp.bfloat16)


def test_what_cannot_be_rounded_is_refused(monkeypatch):
  with pytest.raises(ValueError, match='class Encoder cannot multiply in 8 bits'):
    Computation('int8').apply(encoder.bert(32, 32, 1, 2))
  monkeypatch.setattr(source.importlib, 'import_module', lambda name: (_ for _ in ()).throw(ImportError(name)))
  with pytest.raises(ImportError, match=r"pip install 'lm\[quantized\]'"):
    quantized(tiny(), INT8)
