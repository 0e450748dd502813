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

from lm import declarations, train
from lm.declarations import Role, Weight
from lm.models.layers import LowRank
from lm.train import interfaces

# What can be adapted; routers, which choose experts, and vectors stay as they are.
_ADAPTABLE = (Role.MATRIX, Role.EMBEDDING, Role.HEAD)


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
      has to match a matrix, an embedding or a head. None adapts all weights that are declared as matrices, those of
      experts included, but not those of routers.

  Raises:
    ValueError: in `init`, if a pattern matches nothing that can be adapted; it names what can.
  """
  model: interfaces.Model
  rank: int
  alpha: float
  match: tuple[str, ...] | None = None

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f'a rank of {self.rank} adapts nothing; take 1 or more')
    if not 0 < self.alpha < math.inf:
      raise ValueError(f'alpha={self.alpha} is not positive and finite')

  @property
  def max_length(self) -> float:
    return self.model.max_length

  def init(self, key: jax.Array) -> Any:
    """The adapters, laid out on the mesh in use as their matrices are. Call it inside `jax.jit`."""
    matrices = _matrices(declarations.of(self.model), self.match)
    keys = iter(jax.random.split(key, len(matrices)))
    tree: dict[str, Any] = {}
    for path, weight in matrices.items():
      *above, name = path.split('/')
      node = tree
      for part in above:
        node = node.setdefault(part, {})
      node[name] = self._adapter(next(keys), weight)
    return {'adapters': tree}

  def _adapter(self, key, weight):
    array, (leading, inputs) = weight.array, weight.matrix_axes
    into, out = array.shape[:inputs], array.shape[inputs:]
    bound = math.prod(into[leading:]) ** -0.5
    a = jax.random.uniform(key, (*into, self.rank), minval=-bound, maxval=bound)
    b = jnp.zeros((*into[:leading], self.rank, *out))
    if array.sharding is not None:
      layout = *array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec))
      a = jax.sharding.reshard(a, P(*layout[:inputs], None))
      b = jax.sharding.reshard(b, P(*layout[:leading], None, *layout[inputs:]))
    # They have the role of the weight; the axis '-' is the rank, which is the outputs of A and the inputs of B.
    first, count = weight.leading, weight.inputs
    of_a = Weight(weight.axes[:first + count] + '-', weight.role, first, count)
    of_b = Weight(f'{weight.axes[:first]}-{weight.outputs}', weight.role, first)
    return {'A': declarations.declared(a, of_a), 'B': declarations.declared(b, of_b)}

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


def _matrices(weights: Any, match: Sequence[str] | None) -> dict[str, Weight]:
  """The declarations of what is adapted, by path."""
  matrices = {jax.tree_util.keystr(path, simple=True, separator='/'): weight
              for path, weight in jax.tree_util.tree_leaves_with_path(weights)
              if weight.role in _ADAPTABLE and len(weight.axes) > 1}
  if match is None:
    hidden = {path: weight for path, weight in matrices.items() if weight.role is Role.MATRIX}
    if not hidden:
      raise ValueError('no weight of the model is declared as a matrix, so that there is nothing to adapt; choose with '
                       'match among ' + ', '.join(matrices))
    return hidden
  for pattern in match or ('',):
    if not fnmatch.filter(matrices, pattern):
      raise ValueError(f'the adapters are for {pattern!r}, which no matrix of the model matches; it has '
                       + ', '.join(matrices))
  return {path: weight for path, weight in matrices.items() if any(fnmatch.fnmatch(path, pattern) for pattern in match)}


def adapt(run: train.Run, rank: int, alpha: float | None = None, match: Sequence[str] | None = None) -> train.Run:
  """The run with adapters (see `Adapted`) on the parameters that it starts from; itself where the rank is 0.

  `alpha` is twice the rank where it is None. `launch` gives the parameters under them by --init, see `start_from`.
  """
  if not rank:
    return run
  model = Adapted(run.model, rank, 2. * rank if alpha is None else alpha, None if match is None else tuple(match))
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
