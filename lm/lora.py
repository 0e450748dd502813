"""Low-rank adaptation: small matrices are trained beside a model whose own stay as they are.

LoRA (Hu et al. 2021, arXiv:2106.09685): a matrix W is used as W + alpha / rank * A B, with A [in, rank], B [rank, out].
B starts at zero, A as a linear layer does (uniform within 1 / sqrt(in)), as in the authors' loralib and in PEFT. Only A
and B have gradients, a state of the optimizer, and a place in checkpoints. The gradient of W itself is made, of one
layer at a time, and dropped: this saves memory, not time.
"""
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import train
from lm.models.layers import LowRank
from lm.optim import groups
from lm.train import interfaces

MATCH = ('*attention/*', '*feed_forward/*')
_FIXED = ('router', 'shared_gate')   # never adapted, as vectors are not: what chooses experts


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A model with adapters, to be trained with `Constants('base', model, load)`; `adapt` makes such runs.

  Its own parameters are `{'adapters': tree}`, with `{'A': ..., 'B': ...}` for each matrix of the model that matches;
  `apply` reads the model's as `params['base']`. Adapters are float32. To decode, score or export, take `merged`.

  Args:
    model: whose matrices are adapted.
    rank: r, at least 1.
    alpha: adapters are scaled by alpha / rank.
    match: patterns as in `fnmatch` of paths of parameters, such as 'blocks/0/attention/query'; * matches / too. Each
      has to match a matrix. By default the matrices of attention and feed-forward, experts included.

  Raises:
    ValueError: in `init`, if a pattern matches no matrix; it names those that there are.
  """
  model: interfaces.Model
  rank: int
  alpha: float
  match: tuple[str, ...] = MATCH

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f'a rank of {self.rank} adapts nothing; take 1 or more')
    if not 0 < self.alpha < math.inf:
      raise ValueError(f'alpha={self.alpha} is not positive and finite')

  def init(self, key: jax.Array) -> Any:
    """The adapters, laid out on the mesh in use as their matrices are. Call it inside `jax.jit`."""
    found = _matrices(jax.eval_shape(self.model.init, key), self.match)
    keys = iter(jax.random.split(key, len(found)))
    tree: dict[str, Any] = {}
    for path, leaf in found.items():
      *above, name = path.split('/')
      node = tree
      for part in above:
        node = node.setdefault(part, {})
      node[name] = self._adapter(next(keys), path, leaf)
    return {'adapters': tree}

  def _adapter(self, key, path, leaf):
    leading, inputs = groups.matrix_axes(path, leaf)
    into, out = leaf.shape[:inputs], leaf.shape[inputs:]
    bound = math.prod(into[leading:]) ** -0.5
    a = jax.random.uniform(key, (*into, self.rank), minval=-bound, maxval=bound)
    b = jnp.zeros((*into[:leading], self.rank, *out))
    if leaf.sharding is None:
      return {'A': a, 'B': b}
    layout = *leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))
    return {'A': jax.sharding.reshard(a, P(*layout[:inputs], None)),
            'B': jax.sharding.reshard(b, P(*layout[:leading], None, *layout[inputs:]))}

  def apply(self, params: Any, batch: Any, *, key: jax.Array | None = None, cache: Any = None, taps: Any = ()) -> Any:
    params = self._beside(params['base'], params['adapters'])
    if not taps:   # which not every model takes
      return self.model.apply(params, batch, key=key, cache=cache)
    return self.model.apply(params, batch, key=key, cache=cache, taps=taps)

  def _beside(self, base, adapters):
    """The base with a LowRank in place of each adapted leaf."""
    if not isinstance(base, dict):
      return LowRank(base, adapters['A'], adapters['B'], self.alpha / self.rank)
    return {name: self._beside(leaf, adapters[name]) if name in adapters else leaf for name, leaf in base.items()}

  def merged(self, params: Any) -> tuple[interfaces.Model, Any]:
    """The plain model with W + alpha / rank * A B as its matrices; other constants stay among the parameters."""
    rest = {name: tree for name, tree in params.items() if name not in ('base', 'adapters')}
    return self.model, {**_merge(self._beside(params['base'], params['adapters'])), **rest}


def _is_adapted(leaf: Any) -> bool:
  return isinstance(leaf, LowRank)


@jax.jit
def _merge(tree: Any) -> Any:
  def merge(leaf):
    return leaf.merged().astype(leaf.weight.dtype) if _is_adapted(leaf) else leaf
  return jax.tree.map(merge, tree, is_leaf=_is_adapted)


def _matrices(shapes: Any, match: Sequence[str]) -> dict[str, Any]:
  """The leaves that match, by path."""
  leaves = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  leaves = {path: leaf for path, leaf in leaves.items() if leaf.ndim > 1 and not groups.is_vector(path)
            and not path.endswith(_FIXED)}
  for pattern in match or ('',):
    if not fnmatch.filter(leaves, pattern):
      raise ValueError(f'the adapters are for {pattern!r}, which no matrix of the model matches; it has '
                       + ', '.join(leaves))
  return {path: leaf for path, leaf in leaves.items() if any(fnmatch.fnmatch(path, pattern) for pattern in match)}


def adapt(run: train.Run, rank: int, alpha: float | None = None, match: Sequence[str] = MATCH) -> train.Run:
  """The run with adapters (see `Adapted`) on the parameters that it starts from; itself where the rank is 0.

  `alpha` is twice the rank where it is None. `launch` gives the parameters under them by --init, see `start_from`.
  """
  if not rank:
    return run
  model = Adapted(run.model, rank, 2. * rank if alpha is None else alpha, tuple(match))
  base = interfaces.Constants('base', run.model, run.start or _no_base)
  return dataclasses.replace(run, model=model, start=None, constants=(*run.constants, base))


def _no_base(model: Any) -> Any:
  raise ValueError('adapters are trained on the parameters of a model, and there are none; give them with --init')


def start_from(run: train.Run, start: Callable[[Any], Any] | None) -> train.Run:
  """The run from parameters that `start(model)` gives: its own, or those under its adapters.

  ValueError for adapters without parameters under them.
  """
  if not isinstance(run.model, Adapted):
    return run if start is None else dataclasses.replace(run, start=start)
  base = next(constant for constant in run.constants if constant.name == 'base')
  if start is None:
    return run if base.load is not _no_base else _no_base(base.model)
  loaded = dataclasses.replace(base, load=start)
  return dataclasses.replace(run, constants=tuple(loaded if c is base else c for c in run.constants))


def merged(model: Any, params: Any) -> tuple[Any, Any]:
  """A plain model and its parameters: of one with adapters merged, any other as it is."""
  return model.merged(params) if isinstance(model, Adapted) else (model, params)


def plain(model: Any) -> Any:
  """The model under adapters; any other as it is."""
  return model.model if isinstance(model, Adapted) else model


def begun(run: train.Run, params: Any) -> Any:
  """What the parameters of the plain model were when the run began; `params` are a result's, with constants."""
  if isinstance(run.model, Adapted):
    return params['base']
  return run.start(run.model) if run.start else jax.jit(lambda: train.init(run).params)()
