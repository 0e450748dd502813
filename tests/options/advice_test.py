"""A message that advises a flag names one that the script has."""
import ast
import gzip
import importlib
import pathlib
import re
import tempfile

import pytest
import tfds_builder

from lm import signature
from lm.data.text import compressed, corpora
from lm.launch import program as launcher

ROOT = pathlib.Path(__file__).parents[2]
HARNESS = {'device', 'gen_kwargs', 'model_args', 'use_cache'}   # flags of lm-evaluation-harness, which harness.py has
ALWAYS = {'debug', 'help', 'helpfull', 'script'}
GIT = {'abbrev', 'always', 'dirty', 'exclude'}   # flags of git


def strings(path: pathlib.Path) -> list[str]:
  """Returns the strings of a file without docstrings; of an f-string, its literal parts."""
  tree = ast.parse(path.read_text())
  documented = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and isinstance(node.body[0], ast.Expr)}
  parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
  texts = [''.join(part.value for part in node.values if isinstance(part, ast.Constant))
           for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
  texts += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and id(node) not in documented | parts]
  return texts


def advised(path: pathlib.Path) -> set[str]:
  """Returns the flags in the strings of a file, without those of commands for other scripts."""
  texts = [text for text in strings(path) if not re.search(r'\b[a-z_]+\.py --', text)]
  return {name for text in texts for name in re.findall(r'(?<![\w-])--([a-z][a-z_]*)', text)}


def flags_of(path: pathlib.Path) -> set[str]:
  """Returns the flags of a script, also in their negated form with `no` before the name."""
  module, text = importlib.import_module(path.stem), path.read_text()
  functions = [getattr(module, name) for name in re.search(r'launch\.(?:run|tool)\((\w+)', text).groups()]
  # Studies take the flags of experiments as knobs.
  functions += [module.experiment] if hasattr(module, 'experiment') else []
  functions += [launcher._train] if 'launch.run(' in text else []
  names = {flag.name for function in functions for flag in signature.flags(function)}
  return names | {'no' + name for name in names} | ALWAYS


# harness.py has the flags of lm-evaluation-harness.
SCRIPTS = {path.stem: flags_of(path) for path in sorted((ROOT / 'experiments').glob('*.py')) if path.stem != 'harness'}


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_advises_flags_of_its_own(name):
  assert advised(ROOT / 'experiments' / f'{name}.py') <= SCRIPTS[name]


@pytest.mark.parametrize('path', sorted((ROOT / 'lm').rglob('*.py')), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_that_a_module_advises_is_one_of_a_script(path):
  flags = {flag for flag in advised(path) if not flag.startswith('xla_')}   # flags of XLA
  assert flags - GIT - HARNESS - {'flag', 'name'} <= set().union(*SCRIPTS.values())


@pytest.mark.parametrize('name', ['pretrain', 'distill', 'tfds_builder'])
def test_scripts_that_read_a_corpus_have_the_flags_that_its_messages_advise(name):
  for module in ('data/text/corpora', 'data/text/source', 'options/corpus'):
    assert advised(ROOT / 'lm' / f'{module}.py') <= SCRIPTS[name]
  assert {'text', 'jsonl', 'parquet', 'key'} | advised(ROOT / 'lm/workdir/parsing.py') <= SCRIPTS[name]


@pytest.mark.parametrize('module', ['workdir/parsing', 'options/corpus', *(f'data/{name}' for name in (
    'text/corpora', 'text/compressed', 'text/source', 'store', 'store_reader', 'text/prepared', 'chat/dialogues'))])
def test_a_flag_is_advised_as_a_flag_is_written(module):
  """It is not written as a Python argument, such as encoding_errors='replace'."""
  names = '|'.join(sorted(set().union(*SCRIPTS.values())))
  for text in strings(ROOT / 'lm' / f'{module}.py'):
    assert not re.search(rf"(?<![\w-])({names})='", text), text


@pytest.mark.parametrize('name', ['finetune_chat', 'preference', 'score'])
def test_scripts_that_read_records_have_the_flags_of_their_files(name):
  assert {'encoding_errors', 'decompressed_limit'} <= SCRIPTS[name]


@pytest.mark.parametrize('suffix', ['gz', 'zst'])
def test_what_a_compressed_file_unpacks_to_has_a_limit(tmp_path, suffix, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  line, path = b'{"text": "' + b'a' * 100_000 + b'"}\n', tmp_path / f'bomb.jsonl.{suffix}'
  compress = gzip.compress if suffix == 'gz' else pytest.importorskip('zstandard').ZstdCompressor().compress
  path.write_bytes(compress(20 * line))
  size = 20 * len(line) / compressed.GIB
  assert len(corpora.jsonl(str(path), validation=0., decompressed_limit=size).splits['train']) == 20
  with pytest.raises(ValueError, match=rf'{path} unpacks to more than .* GiB; .* --decompressed_limit'):
    len(corpora.jsonl(str(path), validation=0., decompressed_limit=0.99 * size).splits['train'])
  # Only the first file was unpacked.
  assert sum(file.stat().st_size for file in tmp_path.rglob('bomb.jsonl')) <= 20 * len(line)


def test_a_data_set_is_built_from_files_of_one_kind(tmp_path):
  for flags in ({}, {'text': 'a', 'jsonl': 'b'}, {'text': 'a', 'tfds': 'b'}):
    with pytest.raises(ValueError, match='give one of --text, --jsonl and --parquet'):
      signature.call(tfds_builder.build, flags, data_dir=tmp_path)
