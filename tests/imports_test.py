"""Packages import only from packages above them, without circles, and one file imports each library."""
import ast
import graphlib
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Packages and files in order: each imports only from those before it.
ROOMS = ('seeds', 'exits', 'paths', 'signature', 'declarations', 'statistics', 'sharding', 'workdir', 'data', 'models',
         'objectives', 'optim', 'train', 'generate', 'evaluate', 'serve', 'hf', 'lora', 'scripts', 'load', 'named',
         'options', 'doctor', 'launch', 'studies')

# The files that may import a library, at the top or inside a function.
DOORS = {
    'flax': {'models/'}, 'orbax': {'workdir/storage'}, 'tensorstore': {'workdir/integrity'},
    'matplotlib': {'workdir/figures'}, 'qwix': {'models/rounding'}, 'tensorboardX': set(),
    'tensorflow_datasets': {'data/text/prepared'}, 'pyarrow': {'data/text/corpora'},
    'zstandard': {'data/text/compressed'}, 'ftfy': {'data/text/clean'}, 'jieba': {'data/text/clean'},
    'stopwordsiso': {'data/text/clean'}, 'huggingface_hub': {'hf/pretrained'},
    'tokenizers': {'data/tokenizers/huggingface'}, 'jinja2': {'data/chat/template_process'},
    'sentencepiece': {'data/tokenizers/sentencepiece', 'data/tokenizers/folder'},   # to read, to train
    'sacrebleu': {'evaluate/texts/sacre'}, 'rouge_score': {'evaluate/texts/rouge'},
    'starlette': {'evaluate/people/rating_server', 'serve/web_application', 'serve/serving'},   # the last only checks
    'uvicorn': {'evaluate/people/rating_server', 'serve/serving'},
    'prometheus_client': {'serve/server_metrics', 'serve/serving'},
    'llguidance': {'generate/grammars'}, 'lm_eval': {'evaluate/harness/'}, 'optuna': {'studies/search'},
    'scipy': {'statistics', 'studies/scaling'},
    'tensorflow': set(), 'torch': set(), 'transformers': set()}
# Libraries that are slow to import or optional are imported inside functions, so that --help answers at once.
LAZY = set(DOORS) - {'flax'}

FILES = {path.relative_to(ROOT / 'lm').with_suffix('').as_posix().removesuffix('/__init__'): path
         for path in (ROOT / 'lm').rglob('*.py') if path != ROOT / 'lm' / '__init__.py'}


def imports(nodes) -> set[str]:
  """Returns dotted names: `from a.b import c` gives a.b.c; `require('x')` and `import_module('x')` are imports too."""
  names = set()
  for node in nodes:
    match node:
      case ast.Import():
        names |= {alias.name for alias in node.names}
      case ast.ImportFrom():
        assert node.level == 0, f'relative import in line {node.lineno}'
        names |= {f'{node.module}.{alias.name}' for alias in node.names}
      case ast.Call(func=ast.Attribute(attr='require' | 'import_module') | ast.Name(id='require' | 'import_module'),
                    args=[ast.Constant(value=str(name)), *_]):
        names.add(name)
  return names


def tree(name: str) -> ast.Module:
  return ast.parse(FILES[name].read_text())


def files_used(name: str) -> set[str]:
  """Returns the files of `lm` that a file imports: 'data/batch', or 'data' for its face."""
  used = set()
  for dotted in imports(ast.walk(tree(name))):
    parts = dotted.split('.')
    if parts[0] == 'lm':
      used.add(next(path for n in range(len(parts), 1, -1) if (path := '/'.join(parts[1:n])) in FILES))
  return used - {name}


def room(name: str) -> str:
  return name.split('/')[0]


@pytest.mark.parametrize('name', sorted(FILES))
def test_a_room_imports_only_from_rooms_above_it(name):
  assert room(name) in ROOMS, f'{room(name)} has no place in the list of rooms'
  above = ROOMS[:ROOMS.index(room(name)) + 1]
  assert not {used for used in files_used(name) if room(used) not in above}


def test_there_are_no_circles():
  graphlib.TopologicalSorter({name: files_used(name) for name in FILES}).prepare()   # CycleError names the files


def test_no_two_files_share_a_name():
  names = [pathlib.PurePath(name).name for name in FILES if FILES[name].stem != '__init__']
  assert not {name for name in names if names.count(name) > 1}


def test_the_face_of_a_package_lists_what_it_imports():
  for name, path in FILES.items():
    if path.stem == '__init__':
      listed = [ast.literal_eval(node.value) for node in tree(name).body
                if isinstance(node, ast.Assign) and node.targets[0].id == '__all__']
      assert sorted(*listed) == sorted(alias.name for node in tree(name).body if isinstance(node, ast.ImportFrom)
                                       for alias in node.names), name
      assert not {f'{name}/{listed_name}' for listed_name in sum(listed, [])} & FILES.keys(), f'{name} hides a file'


@pytest.mark.parametrize('name', sorted(FILES))
def test_each_library_is_imported_by_one_file(name):
  used = {dotted.split('.')[0] for dotted in imports(ast.walk(tree(name)))}
  for library, doors in DOORS.items():
    assert library not in used or any(name == door or name.startswith(door) and door[-1] == '/' for door in doors)
  at_the_top = imports(node for node in ast.walk(tree(name)) if getattr(node, 'col_offset', 1) == 0)
  assert not {dotted.split('.')[0] for dotted in at_the_top} & LAZY
  assert 'tests' not in used and 'experiments' not in used and 'pretrain' not in used



def test_no_experiment_imports_another():
  scripts = {path.stem: path for path in (ROOT / 'experiments').rglob('*.py')}
  shared = {'interleaved', 'served_models'}   # the clock of the benchmarks, and servers for them, are no experiments
  for path in scripts.values():
    used = {dotted.split('.')[0] for dotted in imports(ast.walk(ast.parse(path.read_text())))}
    assert not used & (scripts.keys() - shared | {'experiments', 'benchmarks'}), path.name


def code_lines(source: str) -> int:
  """Returns the number of lines that hold code, which blank lines, comments and docstrings do not."""
  lines, silent = set(), (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                          tokenize.ENDMARKER)
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type not in silent:
      lines |= set(range(token.start[0], token.end[0] + 1))
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
      lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  return len(lines)


def test_the_code_of_an_experiment_is_short():
  assert code_lines('"""Two\n\nlines."""\n\n# Why.\nx = (1,\n\n     2)   # here\n') == 2
  counts = {path.name: code_lines(path.read_text()) for path in (ROOT / 'experiments').glob('*.py')}
  assert not {name: count for name, count in counts.items() if count >= 80}


def test_train_depends_on_interfaces():
  """It imports no model, corpus, objective or optimizer; of `optim`, only what all optimizers have in common."""
  nodes = [node for name in FILES if room(name) == 'train' for node in ast.walk(tree(name))]
  used = {dotted for dotted in imports(nodes) if dotted.split('.')[:1] == ['lm']}
  assert not {dotted for dotted in used if dotted.split('.')[1] in ('models', 'generate', 'evaluate', 'hf')}
  objectives = {dotted for dotted in used if dotted.split('.')[1] == 'objectives'}
  assert objectives <= {'lm.objectives.objective.Objective'}
  optimizers = {node.attr for node in nodes
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'optim'}
  assert optimizers <= {'Optimizer', 'advance', 'bind', 'learning_rate'}


def test_the_launcher_imports_nothing_that_a_run_needs():
  """So `--help` answers at once, and a bad flag is refused before JAX is imported."""
  for name in ('launch', 'launch/program', 'launch/arguments'):
    top = imports(node for node in ast.walk(tree(name)) if getattr(node, 'col_offset', 1) == 0)
    assert not {dotted for dotted in top if dotted.startswith(('jax', 'numpy'))}
    allowed = 'lm.launch.', 'lm.exits', 'lm.paths', 'lm.signature'
    assert all(dotted.startswith(allowed) for dotted in top if dotted.startswith('lm.'))
