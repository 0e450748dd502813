"""Outside `lm/sharding`, no code names a mesh axis: it names tensor axes, which the one table maps to mesh axes."""
import ast
import pathlib

import pytest

from lm.sharding.axes import AXES

ROOT = pathlib.Path(__file__).parents[2]
FILES = [path for folder in ('lm', 'experiments') for path in (ROOT / folder).rglob('*.py')
         if not path.is_relative_to(ROOT / 'lm' / 'sharding')]


def literals(source: str) -> list[int]:
  """Returns the lines where a string is the name of a mesh axis, unless its place shows that it names another thing.

  Such places are paths, keys of dictionaries, names of attributes and of the arguments of `jax.jit`.
  """
  lines, tree = [], ast.parse(source)
  parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and node.value in tuple(AXES):
      parent = parents[node]
      while isinstance(parent, ast.Tuple | ast.List):
        parent = parents[parent]
      if not _is_another_thing(node, parent):
        lines.append(node.lineno)
  return lines


def _is_another_thing(node, parent) -> bool:
  match parent:
    case ast.BinOp(op=ast.Div()) | ast.Dict() | ast.Compare(ops=[ast.In() | ast.NotIn()]):
      return True
    case ast.keyword(arg='static_argnames' | 'donate_argnames'):
      return True
    case ast.Subscript() | ast.Call(func=ast.Attribute(attr='get')):
      mapping = parent.value if isinstance(parent, ast.Subscript) else parent.func.value
      return not any(isinstance(n, ast.Attribute) and n.attr == 'shape' for n in ast.walk(mapping))
    case ast.Call(func=ast.Name(id='getattr')):
      return True
  return False


@pytest.mark.parametrize('code', [
    "P('fsdp', None)", "jax.P(None, ('fsdp', 'tensor'))", "jax.lax.psum(x, 'tensor')", "jax.lax.axis_index('fsdp')",
    "mesh.shape['fsdp']", "dict(mesh.shape).get('tensor', 1)", "f(axis='tensor')", "def f(axis='fsdp'): pass",
    "AXES = ('fsdp', 'tensor')", "jax.lax.pcast(x, ('tensor',), to='varying')", "axis = 'fsdp' if split else None"])
def test_the_name_of_a_mesh_axis_is_seen(code):
  assert set(literals(code)) == {1}


def test_no_code_outside_of_sharding_names_a_mesh_axis():
  assert len(FILES) > 100
  places = [f'{path.relative_to(ROOT)}:{line}' for path in FILES for line in literals(path.read_text())]
  assert not places, 'name tensor axes instead, by the functions of lm.sharding'
