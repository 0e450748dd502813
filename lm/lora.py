"""Low-rank adaptation, LoRA (Hu et al. 2021, arXiv:2106.09685): trains small matrices beside those of a model.

A matrix W of the model is used as W + alpha / rank * A B, with A [in, rank] and B [rank, out]. B starts at zero, and A
uniform within 1 / sqrt(in), as in the authors' loralib and in PEFT. W does not change: only A and B have a state of the
optimizer and are stored in checkpoints. The gradient of W is still computed, for one layer at a time, and dropped, so
that LoRA saves memory rather than time.

`with_row_adapters` puts several adapters beside one model, of which each row of a batch has its own.
"""
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import declarations, train
from lm.declarations import Role, Weight
from lm.models.low_rank_weight import LowRank, RowLowRank
from lm.models.quantized_decoder import Quantized
from lm.train import interfaces

# The roles of weights that can be adapted.
_ADAPTABLE = (Role.MATRIX, Role.EMBEDDING, Role.HEAD)


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A model with adapters. It is trained with the constants `Constants('base', model, load)`; `adapt` makes such runs.

  Its parameters are `{'adapters': tree}`, with float32 arrays `{'A': ..., 'B': ...}` for each adapted matrix. `apply`
  reads the parameters of the model itself as `params['base']`. `merge` returns a model to decode, score or export.

  Args:
    model: the model whose matrices are adapted.
    rank: the rank of the adapters, 1 or more.
    alpha: adapters are multiplied by alpha / rank.
    match: patterns of paths of parameters, such as 'blocks/0/attention/query', as in `fnmatch`, where * matches / too.
      Each has to match a matrix, an embedding or a head. None adapts all weights with the role of a matrix, including
      those of experts, but not routers.

  Raises:
    ValueError: the rank or alpha is out of range; or, in `init`, a pattern matches no weight that can be adapted.
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
    """Returns new adapters, sharded as their matrices on the mesh in use. Call it inside `jax.jit`."""
    matrices = _matrices(declarations.of(self.model), self.match)
    keys = iter(jax.random.split(key, len(matrices)))
    tree: dict[str, Any] = {}
    for path, weight in matrices.items():
      *parents, name = path.split('/')
      node = tree
      for part in parents:
        node = node.setdefault(part, {})
      node[name] = self._adapter(next(keys), weight)
    return {'adapters': tree}

  def _adapter(self, key: jax.Array, weight: Weight) -> dict[str, Any]:
    """Returns a new adapter of a weight."""
    array, (leading, inputs) = weight.array, weight.matrix_axes
    into, out = array.shape[:inputs], array.shape[inputs:]
    bound = math.prod(into[leading:]) ** -0.5
    a = jax.random.uniform(key, (*into, self.rank), minval=-bound, maxval=bound)
    b = jnp.zeros((*into[:leading], self.rank, *out))
    if array.sharding is not None:
      layout = *array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec))
      a = jax.sharding.reshard(a, P(*layout[:inputs], None))
      b = jax.sharding.reshard(b, P(*layout[:leading], None, *layout[inputs:]))
    # They have the role of the weight. The axis '-' is the rank: the outputs of A, and the inputs of B.
    first, count = weight.leading, weight.inputs
    declaration_a = Weight(weight.axes[:first + count] + '-', weight.role, first, count)
    declaration_b = Weight(f'{weight.axes[:first]}-{weight.outputs}', weight.role, first)
    return {'A': declarations.attach(a, declaration_a), 'B': declarations.attach(b, declaration_b)}

  def apply(self, params: Any, batch: Any, *, key: jax.Array | None = None, cache: Any = None, taps: Any = ()) -> Any:
    params = self._with_adapters(params['base'], params['adapters'])
    if not taps:   # not every model takes taps
      return self.model.apply(params, batch, key=key, cache=cache)
    return self.model.apply(params, batch, key=key, cache=cache, taps=taps)

  def _with_adapters(self, base: Any, adapters: Any) -> Any:
    """Returns the parameters of the model with a LowRank in place of each adapted matrix."""
    if not isinstance(base, dict):
      return LowRank(base, adapters['A'], adapters['B'], self.alpha / self.rank)
    return {name: self._with_adapters(leaf, adapters[name]) if name in adapters else leaf
            for name, leaf in base.items()}

  def merge(self, params: Any) -> tuple[interfaces.Model, Any]:
    """Returns the model without adapters, and its parameters with W + alpha / rank * A B; other constants stay."""
    others = {name: tree for name, tree in params.items() if name not in ('base', 'adapters')}
    return self.model, {**_merge(self._with_adapters(params['base'], params['adapters'])), **others}


def _is_low_rank(leaf: Any) -> bool:
  return isinstance(leaf, LowRank)


@jax.jit
def _merge(tree: Any) -> Any:
  def merge(leaf):
    return leaf.merged().astype(leaf.weight.dtype) if _is_low_rank(leaf) else leaf
  return jax.tree.map(merge, tree, is_leaf=_is_low_rank)


def _matrices(weights: Any, match: Sequence[str] | None) -> dict[str, Weight]:
  """Returns the declarations of the weights to adapt, by path."""
  matrices = {jax.tree_util.keystr(path, simple=True, separator='/'): weight
              for path, weight in jax.tree_util.tree_leaves_with_path(weights)
              if weight.role in _ADAPTABLE and len(weight.axes) > 1}
  if match is None:
    hidden = {path: weight for path, weight in matrices.items() if weight.role is Role.MATRIX}
    if not hidden:
      raise ValueError('no weight of the model is declared as a matrix, so that there is nothing to adapt; choose '
                       'weights with match among ' + ', '.join(matrices))
    return hidden
  for pattern in match or ('',):
    if not fnmatch.filter(matrices, pattern):
      raise ValueError(f'the adapters are for {pattern!r}, which no matrix of the model matches; it has '
                       + ', '.join(matrices))
  return {path: weight for path, weight in matrices.items() if any(fnmatch.fnmatch(path, pattern) for pattern in match)}


def check_row_adapters(model: Any, adapted: Adapted) -> None:
  """Raises ValueError where rows of one batch cannot have adapters of their own beside this model."""
  if model.reads_source or isinstance(model, Quantized):
    raise ValueError('rows of a batch cannot have adapters of their own beside a model of class '
                     f'{type(model).__name__}; merge the adapters into a model of their own')
  for path, weight in _matrices(declarations.of(adapted.model), adapted.match).items():
    if weight.role is not Role.MATRIX or weight.leading:
      raise ValueError(f'the adapters are for {path}, a table, a head or a matrix of experts, and rows of a batch can '
                       'have their own adapters for the other matrices of layers; merge the adapters into a model of '
                       'their own')


def with_row_adapters(params: Any, adapters: Sequence[tuple[Adapted, Any]]) -> Any:
  """Returns parameters beside which each row of a batch has one of several adapters, or none (`RowLowRank`).

  Args:
    params: those of the model, before `unstack`; matrices may be of int8.
    adapters: for the numbers from 1 on, what is trained and the parameters of that, `{'adapters': tree}`.
  """
  scales = {i: adapted.alpha / adapted.rank for i, (adapted, _) in enumerate(adapters, 1)}
  return _beside(params, {i: trained['adapters'] for i, (_, trained) in enumerate(adapters, 1)}, scales)


def _beside(base: Any, trees: dict[int, Any], scales: dict[int, float]) -> Any:
  """Returns a part of the parameters with a RowLowRank in place of each matrix that adapters have, by number."""
  if not trees:
    return base
  if isinstance(base, dict):
    return {name: _beside(leaf, {i: tree[name] for i, tree in trees.items() if name in tree}, scales)
            for name, leaf in base.items()}
  first = next(iter(trees.values()))
  leading = first['A'].ndim + first['B'].ndim - jax.tree.leaves(base)[0].ndim - 2   # axes of layers
  numbers = jnp.asarray(np.repeat(list(trees), [tree['A'].shape[-1] for tree in trees.values()]), jnp.int32)
  return RowLowRank(base, jnp.concatenate([tree['A'] for tree in trees.values()], -1),
                    jnp.concatenate([scales[i] * tree['B'] for i, tree in trees.items()], leading),
                    jnp.broadcast_to(numbers, (*first['A'].shape[:leading], len(numbers))))


def adapt(run: train.Run, rank: int, alpha: float | None = None, match: Sequence[str] | None = None) -> train.Run:
  """Returns a run that trains adapters (see `Adapted`) beside the parameters that it starts from.

  It returns the run itself for a rank of 0. `alpha` is by default twice the rank. `launch` sets the parameters by the
  flag --init, see `start_from`.
  """
  if not rank:
    return run
  model = Adapted(run.model, rank, 2. * rank if alpha is None else alpha, None if match is None else tuple(match))
  base = interfaces.Constants('base', run.model, run.start or _no_base)
  return dataclasses.replace(run, model=model, start=None, constants=(*run.constants, base))


def _no_base(model: Any) -> Any:
  raise ValueError('adapters are trained on the parameters of a model, and there are none; give them with --init')


def start_from(run: train.Run, start: Callable[[Any], Any] | None) -> train.Run:
  """Returns a run that starts from the parameters `start(model)`; a run with adapters trains them beside these.

  None leaves the run as it is.

  Raises:
    ValueError: a run with adapters has no parameters beside which to train them.
  """
  if not isinstance(run.model, Adapted):
    return run if start is None else dataclasses.replace(run, start=start)
  base = next(constant for constant in run.constants if constant.name == 'base')
  if start is None:
    return run if base.load is not _no_base else _no_base(base.model)
  loaded = dataclasses.replace(base, load=start)
  constants = tuple(loaded if constant is base else constant for constant in run.constants)
  return dataclasses.replace(run, constants=constants)


def merge(model: Any, params: Any) -> tuple[Any, Any]:
  """Returns a model without adapters, and its parameters, into which adapters are merged."""
  return model.merge(params) if isinstance(model, Adapted) else (model, params)


def base_model(model: Any) -> Any:
  """Returns the model without its adapters."""
  return model.model if isinstance(model, Adapted) else model


def initial_params(run: train.Run, params: Any) -> Any:
  """Returns the parameters of the model without adapters at the start of a run; `params` are those of its result."""
  if isinstance(run.model, Adapted):
    return params['base']
  return run.start(run.model) if run.start else jax.jit(lambda: train.init(run).params)()
