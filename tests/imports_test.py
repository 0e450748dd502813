"""The house: rooms import only from rooms above them, and each library comes in by one door. Read with `ast`."""
import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# From the ground up. A line may import from the lines before it, and within a folder from the files named before.
# 'room/*' stands for the files of a folder that are not named, which do not import one another.
ROOMS = (
    'exits', 'seeds', 'sharding', 'describe', 'parsing', 'cluster', 'atomic', 'locks', 'integrity', 'scripts',
    'arguments', 'records',
    'hf/files',
    'data/source', 'data/prepared', 'data/corpora', 'data/clean', 'data/protobuf', 'data/vocabulary',
    'data/pieces', 'data/huggingface', 'data/tokenizer', 'data/export', 'data/render', 'data/chat',
    'data/turns', 'data/stored', 'data/store', 'data/batches', 'data/augment', 'data/stages', 'data/messages',
    'data/puzzles',
    'data/stream', 'data/mixture', 'data/corpus_flags', 'data/packing', 'data/dataset', 'data/dialogues',
    'models/kernels', 'models/context', 'models/layers', 'models/stack', 'models/rotary', 'models/attention',
    'models/grouped',
    'models/transformer', 'models/*',
    'hf/fields', 'hf/config', 'hf/rope', 'hf/names', 'hf/experts', 'hf/*', 'hf/weights',
    'objectives/objective', 'objectives/span_corruption', 'objectives/*', 'groups', 'schedules', 'soap', 'optim',
    'averaging', 'checkpoint', 'track', 'plot', 'interrupt', 'pace', 'guard', 'gradient', 'sampling', 'generate',
    'speculative',
    'evaluate', 'noise', 'diffusion', 'interfaces', 'flops', 'run', 'loop', 'train', 'lora', 'annotate', 'budget',
    'plan', 'doctor', 'pretrained', 'trained', 'rewards', 'comparison', 'scaling', 'search', 'failures', 'resume',
    'outcome', 'launch', 'arms')

# Who may import what is not ours and not everyone's, at the top or inside a function.
DOORS = {
    'flax': {'models/'}, 'orbax': {'checkpoint'}, 'tensorstore': {'integrity'}, 'matplotlib': {'plot'},
    'tensorboardX': {'track'}, 'tensorflow_datasets': {'data/prepared'}, 'pyarrow': {'data/corpora'},
    'zstandard': {'data/corpora'}, 'ftfy': {'data/clean'}, 'jieba': {'data/clean'}, 'stopwordsiso': {'data/clean'},
    'huggingface_hub': {'pretrained'}, 'tokenizers': {'data/huggingface'}, 'jinja2': {'data/render'},
    'sentencepiece': {'data/pieces', 'data/tokenizer'},   # to read, to train
    'optuna': {'search'}, 'scipy': {'comparison', 'scaling'},
    'tensorflow': set(), 'torch': set(), 'transformers': set()}
# Slow to import, or optional: inside the function that needs them, so that --help answers at once.
LAZY = set(DOORS) - {'flax'}

FILES = {path.relative_to(ROOT / 'lm').with_suffix('').as_posix(): path for path in (ROOT / 'lm').rglob('*.py')}
MODULES = {name: path for name, path in FILES.items() if pathlib.PurePath(name).name != '__init__'}


def imports(nodes) -> set[str]:
  """Dotted names: `from a.b import c` gives a.b.c; `require('x')` and `import_module('x')` are imports too."""
  found = set()
  for node in nodes:
    match node:
      case ast.Import():
        found |= {alias.name for alias in node.names}
      case ast.ImportFrom():
        assert node.level == 0, f'relative import in line {node.lineno}'
        found |= {f'{node.module}.{alias.name}' for alias in node.names}
      case ast.Call(func=ast.Attribute(attr='require' | 'import_module') | ast.Name(id='require' | 'import_module'),
                    args=[ast.Constant(value=str(name)), *_]):
        found.add(name)
  return found


def tree(name: str) -> ast.Module:
  return ast.parse(FILES[name].read_text())


def rooms_used(nodes) -> set[str]:
  """Modules of `lm` among the imports: 'data/batches', ..."""
  found = set()
  for name in imports(nodes):
    parts = name.split('.')
    if parts[0] == 'lm':
      paths = ['/'.join(parts[1:n]) for n in range(len(parts), 1, -1)]
      found.add(next((path for path in paths if path in MODULES), name))
  return found


def floor(module: str) -> int:
  wildcard = f'{module.rpartition("/")[0]}/*'
  return ROOMS.index(module if module in ROOMS else wildcard)


@pytest.mark.parametrize('module', sorted(MODULES))
def test_a_room_imports_only_from_rooms_above_it(module):
  assert module in ROOMS or f'{module.rpartition("/")[0]}/*' in ROOMS, f'{module} has no place in the list of rooms'
  if module == 'launch':   # what starts a run knows nothing of what is run: only when it trains
    assert rooms_used(tree(module).body) == {'arguments', 'exits'}
  assert not {used for used in rooms_used(ast.walk(tree(module))) if floor(used) >= floor(module)}


def test_packages_import_nothing():
  assert not [name for name in FILES.keys() - MODULES if imports(ast.walk(tree(name)))]


@pytest.mark.parametrize('module', sorted(MODULES))
def test_each_library_has_one_door(module):
  used = {name.split('.')[0] for name in imports(ast.walk(tree(module)))}
  for library, doors in DOORS.items():
    assert library not in used or any(module == door or module.startswith(door) and door[-1] == '/' for door in doors)
  at_the_top = imports(node for node in ast.walk(tree(module)) if getattr(node, 'col_offset', 1) == 0)
  assert not {name.split('.')[0] for name in at_the_top} & LAZY
  assert 'tests' not in used and 'experiments' not in used and 'pretrain' not in used


def test_train_depends_on_interfaces():
  """No model, corpus, objective or optimizer: of `optim` only the reading of a learning rate."""
  nodes = [node for name in ('run', 'loop', 'train') for node in ast.walk(tree(name))]
  assert rooms_used(nodes) <= {'seeds', 'sharding', 'describe', 'data/batches', 'objectives/objective', 'optim',
                               'data/augment', 'data/stages', 'checkpoint', 'integrity', 'track', 'averaging', 'guard',
                               'gradient', 'records', 'interfaces', 'interrupt', 'pace', 'evaluate', 'flops', 'run',
                               'loop'}
  used = {node.attr for node in nodes
          if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'optim'}
  assert used <= {'learning_rate', 'advanced'}


def test_flax_is_needed_by_nothing_but_models():
  needs = {name for name in MODULES if any(used.startswith('models/') for used in rooms_used(ast.walk(tree(name))))}
  rest = {name for name in needs if not name.startswith(('models/', 'hf/'))}
  assert rest <= {'generate', 'rewards', 'speculative', 'diffusion', 'plan', 'doctor', 'pretrained', 'trained', 'lora',
                  'outcome'}

