"""What the weights of a model are, as the modules that make them declare it: axes, inputs and role.

Weight decay, Muon, SOAP, Adafactor, adapters and muP read these declarations: none of them knows a weight by its name.
`of(model)` gives a tree of them like the parameters. While it runs, each weight of `model.init` is put into a
`_Declared`, so that its declaration goes where its array goes: through `vmap` over layers, and into any tree.
"""
import contextvars
import dataclasses
import enum
from typing import Any

import jax


class Role(enum.Enum):
  """What a weight is for.

  Attributes:
    MATRIX: multiplies activations inside a layer.
    ROUTER: a matrix that decides which experts compute, or how much they count; adapters leave it as it is.
    EMBEDDING: a table with a row for each token, position or type.
    HEAD: makes logits or scores of the last hidden states.
    VECTOR: a bias, a scale, or a few numbers of another kind; it does not decay.
    CORRECTION: of a router's choice; it does not decay, and `optim.balanced` moves it.
  """
  MATRIX = enum.auto()
  ROUTER = enum.auto()
  EMBEDDING = enum.auto()
  HEAD = enum.auto()
  VECTOR = enum.auto()
  CORRECTION = enum.auto()


@dataclasses.dataclass(frozen=True)
class Weight:
  """The declaration of a weight.

  Attributes:
    axes: a letter for each axis in one layer, see the legend in `models/transformer.py`.
    role: see `Role`.
    leading: axes before the inputs, such as experts.
    inputs: axes of the inputs; the axes after them are the outputs.
    array: shape, dtype and sharding of the parameter, with layers as first axis where they are stacked; `of` sets it.
  """
  axes: str
  role: Role
  leading: int = 0
  inputs: int = 1
  array: jax.ShapeDtypeStruct | None = None

  @property
  def outputs(self) -> str:
    """The letters of the outputs."""
    return self.axes[self.leading + self.inputs:]

  @property
  def stacked(self) -> int:
    """How many axes of layers the parameter has before those that are declared."""
    return self.array.ndim - len(self.axes)

  @property
  def matrix_axes(self) -> tuple[int, int]:
    """Where the axes of the inputs begin in the parameter, and where those of the outputs begin."""
    start = self.stacked + self.leading
    return start, start + self.inputs


def declare(axes: str, role: Role | None = None, inputs: str | None = None) -> Weight:
  """A declaration; by default, a vector where there is one axis, else a matrix of the last two axes, [in, out].

  Args:
    axes: a letter for each axis.
    role: see `Role`.
    inputs: the letters of the inputs of a matrix or a table; the axes after them are the outputs.

  Raises:
    ValueError: a matrix has one axis; `inputs` are not among the axes, or no output follows them.
  """
  if role is None:
    role = Role.VECTOR if len(axes) < 2 else Role.MATRIX
  if len(axes) < 2 or role in (Role.VECTOR, Role.CORRECTION):
    if role in (Role.MATRIX, Role.ROUTER):
      raise ValueError(f'a weight with axes {axes!r} is declared as a {role.name}, which has two axes or more; declare '
                       'it as Role.VECTOR')
    return Weight(axes, role)
  leading = len(axes) - 2 if inputs is None else axes.find(inputs)
  count = 1 if inputs is None else len(inputs)
  if leading < 0 or not 0 < count < len(axes) - leading:
    raise ValueError(f'inputs={inputs!r} are not axes of {axes!r} that outputs follow')
  return Weight(axes, role, leading, count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Declared:
  """A new parameter and its declaration."""
  value: jax.Array
  weight: Weight = dataclasses.field(metadata={'static': True})


_collecting: contextvars.ContextVar[bool] = contextvars.ContextVar('collecting', default=False)


def declared(value: jax.Array, weight: Weight) -> Any:
  """A new parameter for `of` to know it by its declaration; the value itself where `of` does not run."""
  return _Declared(value, weight) if _collecting.get() else value


def plain(params: Any) -> Any:
  """New parameters, one or a tree, as modules compute with them: without their declarations."""
  return jax.tree.map(lambda x: x.value if _is_declared(x) else x, params, is_leaf=_is_declared)


def declared_by_shape(params: Any) -> Any:
  """New parameters of one layer, where those that nothing declares, such as Flax's own, count by their axes alone."""
  return _completed(params) if _collecting.get() else params


def _completed(params: Any) -> Any:
  return jax.tree.map(lambda x: x if _is_declared(x) else _Declared(x, declare('-' * x.ndim)), params,
                      is_leaf=_is_declared)


def _is_declared(x: Any) -> bool:
  return isinstance(x, _Declared)


def of(model: Any) -> Any:
  """The declarations of a model's weights, a tree of `Weight` like its parameters. It computes nothing.

  A parameter that no module declares has the default of `declare` for its number of axes.
  """
  token = _collecting.set(True)
  try:   # a new function for each call: JAX keeps what it has traced of a function
    params = jax.eval_shape(lambda: _completed(model.init(jax.random.key(0))))
  finally:
    _collecting.reset(token)
  return jax.tree.map(lambda x: dataclasses.replace(x.weight, array=x.value), params, is_leaf=_is_declared)
