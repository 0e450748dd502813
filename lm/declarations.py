"""Declarations of the weights of a model: axes, inputs and role. The modules that create the weights declare them.

Weight decay, Muon, SOAP, Adafactor, adapters and muP read these declarations, and no names of weights. `of(model)`
returns the declarations of a model as a tree with the structure of its parameters. While it runs, each new weight of
`model.init` is wrapped together with its declaration, so that the two stay together through `vmap` over layers and in
any tree.
"""
import contextvars
import dataclasses
import enum
from typing import Any

import jax


class Role(enum.Enum):
  """The purpose of a weight.

  Attributes:
    MATRIX: multiplies activations inside a layer.
    ROUTER: a matrix that chooses experts, or weights them; adapters do not change it.
    EMBEDDING: a table with a row for each token, position or type.
    HEAD: maps the last hidden states to logits or scores.
    VECTOR: a bias, a scale, or a few other numbers; it does not decay.
    CORRECTION: is added to the scores by which a router chooses experts. It does not decay, and
      `optim.with_router_balance` updates it.
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
    role: its purpose.
    leading: the number of axes before the inputs, such as one for experts.
    inputs: the number of axes of the inputs; the axes after them are the outputs.
    array: the shape, dtype and sharding of the parameter, whose first axis is layers where they are stacked; `of` sets
      it.
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
    """The number of axes of layers before the declared axes."""
    return self.array.ndim - len(self.axes)

  @property
  def matrix_axes(self) -> tuple[int, int]:
    """The first axis of the inputs and the first axis of the outputs in the parameter."""
    start = self.stacked + self.leading
    return start, start + self.inputs


def declare(axes: str, role: Role | None = None, inputs: str | None = None) -> Weight:
  """Returns a declaration. The default is a vector for one axis, and a matrix [in, out] of the last two axes for more.

  Args:
    axes: a letter for each axis.
    role: the purpose of the weight.
    inputs: the letters of the inputs of a matrix or a table; the axes after them are the outputs.

  Raises:
    ValueError: a matrix has only one axis; `inputs` are not among the axes, or no output follows them.
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
    raise ValueError(f'inputs={inputs!r} are not axes of {axes!r} that outputs follow; name some axes before the last')
  return Weight(axes, role, leading, count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Declared:
  """A new parameter and its declaration."""
  value: jax.Array
  weight: Weight = dataclasses.field(metadata={'static': True})


_collecting: contextvars.ContextVar[bool] = contextvars.ContextVar('collecting', default=False)


def collects() -> bool:
  """Whether new parameters have their declarations, because `of` runs."""
  return _collecting.get()


def attach(value: jax.Array, weight: Weight) -> Any:
  """Returns a new parameter with its declaration while `of` runs, and the parameter alone otherwise."""
  return _Declared(value, weight) if _collecting.get() else value


def detach(params: Any) -> Any:
  """Returns new parameters, one or a tree, without their declarations, so that modules can compute with them."""
  return jax.tree.map(lambda x: x.value if _is_declared(x) else x, params, is_leaf=_is_declared)


def attach_defaults(params: Any) -> Any:
  """Returns the new parameters of one layer; those without a declaration, such as Flax's own, get the default."""
  return _complete(params) if _collecting.get() else params


def _complete(params: Any) -> Any:
  return jax.tree.map(lambda x: x if _is_declared(x) else _Declared(x, declare('-' * x.ndim)), params,
                      is_leaf=_is_declared)


def _is_declared(x: Any) -> bool:
  return isinstance(x, _Declared)


def of(model: Any) -> Any:
  """Returns the declarations of a model's weights as a tree of `Weight`, without computing anything.

  A parameter that no module declares has the default of `declare` for its number of axes.
  """
  token = _collecting.set(True)
  try:   # JAX caches the traces of a function, so each call traces a new one
    params = jax.eval_shape(lambda: _complete(model.init(jax.random.key(0))))
  finally:
    _collecting.reset(token)
  return jax.tree.map(lambda x: dataclasses.replace(x.weight, array=x.value), params, is_leaf=_is_declared)
