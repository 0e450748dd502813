"""Losses, gradients and meshes for the tests of encoders and encoder-decoders."""
import functools

import jax
import numpy as np
from helpers.meshes import mesh_of

from lm import sharding
from lm.hf import files, weights
from lm.objectives.next_token import next_token

# These programs run once: optimising them would take longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})

forward = jit(lambda model, params, batch: (lambda out: out.head(out.hidden))(model.apply(params, batch)),
              static_argnums=0)


def load(folder):
  """Returns (model, params) of a Hugging Face folder."""
  model, family = weights.open_model(folder)
  with files.Weights(folder) as tensors:
    return model, weights.load_params(model, family, tensors)


def loss_and_grads(model, params, batch, key=None):
  """Returns the mean next-token loss of a batch (nats per weight) and its gradients."""
  def mean_loss(params):
    loss, weight, _ = next_token().loss(model.apply, params, batch, key)
    return loss / weight
  return jax.value_and_grad(mean_loss)(params)


def random_params(model):
  """Returns a tree of float32 arrays from NumPy, in the shapes of the model's parameters."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype('f4'),
                      jax.eval_shape(model.init, jax.random.key(0)))


def assert_same(actual, expected, tolerance=5e-6):
  """Asserts that each leaf agrees within `tolerance` of the largest absolute value of the expected leaf."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (np.abs(b).max() + 0.01)),
               actual, expected)


def gradients(theirs, model, family, folder, tmp_path):
  """Returns torch's gradients as our tree of parameters, converted by the code that reads weight files."""
  values = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
  with files.Weights(folder) as saved:
    assert values.keys() == saved.keys()
  files.write(tmp_path, {name: (g.shape, g.dtype, lambda g=g: g) for name, g in values.items()})
  with files.Weights(tmp_path) as read:
    return weights.load_params(model, family, read)


def count_residuals(model, params, batch) -> int:
  """Returns how many numbers the forward pass saves for the backward pass."""
  backward = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, batch).hidden, p)[1], params)
  return sum(x.size for x in jax.tree.leaves(backward))


def on_mesh(model, shape, batch, key=None):
  """Returns the loss and the gradients as NumPy arrays, computed on a mesh with the model's own layout of weights."""
  mesh = mesh_of(shape)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    layouts = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec), shapes)
    inputs = jax.device_put(random_params(model), layouts), sharding.shard_rows(batch, mesh)
    return jax.tree.map(np.asarray, jit(functools.partial(loss_and_grads, model))(*inputs, key))


def repeated(batch):
  """Returns the batch with its rows once more in reverse order: twice the rows, for a mesh with that many devices."""
  return jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), batch)


def exported(kind, model, params, folder, out, extra=None):
  """Writes a model that was read from `folder`, with the same bytes, and returns what a class of transformers reads."""
  weights.write(out, model, params, extra=extra)
  with files.Weights(folder) as came, files.Weights(out) as goes:
    assert set(came) == set(goes)
    for name in came:
      assert came[name].tobytes() == goes[name].tobytes()
  again, info = kind.from_pretrained(out, output_loading_info=True, attn_implementation='eager')
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  return again.eval()
