"""Names of the arrays of a state, and the two parts in which they are stored."""
from typing import Any

import jax

Tree = Any
PARTS = 'params', 'state'   # folders of a checkpoint: the parameters, and all other arrays


def parts(state: Tree) -> dict[str, Tree]:
  """Returns the parts of a state, a named tuple or a dict, by folder; a part without arrays is left out.

  They are stored apart, so that one is read without the bytes of the other.
  """
  fields = dict(state._asdict() if hasattr(state, '_asdict') else state)
  trees = {'params': {'params': fields.pop('params', None)}, 'state': fields}
  return {part: tree for part, tree in trees.items() if jax.tree.leaves(tree)}


def may_hold(part: str, prefixes: tuple[str, ...]) -> bool:
  """Returns whether a part may hold arrays whose names begin with one of the prefixes."""
  return any(not prefix or prefix.startswith('params.') == (part == 'params') for prefix in prefixes)


def name(path: tuple) -> str:
  """Returns the name of the leaf at a path of JAX, such as params.layers.w."""
  return jax.tree_util.keystr(path, simple=True, separator='.')


def named(tree: Tree) -> dict[str, Any]:
  """Returns {'params.w': leaf, ...} for a tree of arrays, or for Orbax's metadata of one."""
  return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
