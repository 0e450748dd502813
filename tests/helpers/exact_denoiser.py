"""A model of masked diffusion that knows the exact distribution of texts of three tokens."""
import jax
import jax.numpy as jnp
import numpy as np

from lm.models import transformer

BOS, MASK, VOCAB, LENGTH = 3, 4, 3, 3
JOINT = np.random.default_rng(0).dirichlet(np.full(VOCAB ** LENGTH, 0.3)).reshape((VOCAB,) * LENGTH).astype('f4')


class Exact(transformer.LanguageModel):
  """Gives p(token i | unmasked tokens) of the joint distribution, its only parameter, after bos."""
  vocab: int = 8
  max_length: int = 16

  def apply(self, params, batch, *, key=None, cache=None):
    def row(tokens):
      start = jnp.argmax(tokens == BOS) + 1
      block = jax.lax.dynamic_slice(tokens, (start,), (LENGTH,))
      agrees = (block[:, None] == MASK) | (block[:, None] == jnp.arange(VOCAB)[None])
      others = jnp.where(jnp.eye(LENGTH, dtype=bool)[..., None], True, agrees[None])
      tables = jnp.einsum('abc,na,nb,nc->nabc', params, *jnp.moveaxis(others.astype('f4'), 1, 0))
      p = jnp.stack([tables[i].sum(tuple({0, 1, 2} - {i})) for i in range(LENGTH)])
      return jax.lax.dynamic_update_slice(jnp.ones((len(tokens), VOCAB)), p, (start, 0))
    p = jax.vmap(row)(batch.tokens)
    logits = jnp.log(jnp.pad(p / p.sum(-1, keepdims=True), ((0, 0), (0, 0), (0, 8 - VOCAB))))
    return transformer.Output(jnp.maximum(logits, -1e9), jax.tree_util.Partial(lambda hidden: hidden), None)


def placed(model, tree):
  """Returns the parameters, laid out on the current mesh as a run lays them out."""
  return jax.tree.map(lambda value, like: jax.device_put(value, jax.sharding.NamedSharding(
      jax.sharding.get_mesh(), like.sharding.spec)), tree, jax.eval_shape(model.init, jax.random.key(0)))
