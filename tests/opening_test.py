"""Parameters, tokenizer, model and script of a run are opened together, or refused together."""
import shutil
import sys

import pytest
from helpers.script_runs import loss_of, same

from lm import load
from lm.data import tokenizers
from lm.workdir import describe

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.mark.slow
def test_a_script_that_imports_its_neighbour_is_opened(program, tmp_path):
  result = program('run')
  sys.modules.pop('neighbour')
  opened = load.open_trained(tmp_path / 'run')
  assert same(opened.params, result.params) and str(program.folder) not in sys.path
  assert loss_of(program, opened) == pytest.approx(result.metrics['validation/loss'], rel=1e-6)


@pytest.mark.parametrize('file, before, after, named', [
    ('small.py', 'jax.nn.relu(x) **', 'jax.nn.gelu(x) **', r'model.activation.code.small.activation: .* before'),
    ('neighbour.py', 'POWER = 2', 'POWER = 3', r'model.activation.code.neighbour.POWER: 2 before, 3 now'),
    ('small.py', 'lambda x: SCALE', 'lambda x: -SCALE', r'model.activation.code.small.<lambda>: .* before'),
    ('small.py', 'SCALE = 2.', 'SCALE = 4.', r'model.activation.code.small.SCALE: 2.0 before, 4.0 now'),
    ('small.py', '= activation', '= jax.nn.gelu', r"model.activation.function: 'activation' before, absent now")])
def test_an_edited_script_is_refused_by_all_that_open_or_resume_the_run(program, tmp_path, file, before, after, named):
  program('run')
  path = program.folder / file
  text = path.read_text()
  assert text.count(before) == 1
  path.write_text(text.replace(before, after))
  for opens in (load.open_trained, lambda path: load.open_base(str(path)), lambda path: program('other', path),
                lambda path: program('run', steps=6)):
    sys.modules.pop('neighbour', None)
    with pytest.raises(ValueError, match=named):
      opens(tmp_path / 'run')


def test_comments_and_layout_of_a_script_may_be_edited(program, tmp_path):
  result = program('run')
  path = program.folder / 'small.py'
  edits = {'# of all': '# for all', 'Squares what is': 'The square of', 'POWER * scale(x)': 'POWER *  scale( x )'}
  text = path.read_text()
  for before, after in edits.items():
    assert text.count(before) == 1
    text = text.replace(before, after)
  path.write_text(text)
  assert same(load.open_trained(tmp_path / 'run').params, result.params)
  assert program('run', steps=6).step == 6


def test_a_run_without_a_description_of_its_code_is_refused_in_one_line(program, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(describe.source_code, 'is_users', lambda value: False)
    program('run')
  for opens in (load.open_trained, lambda path: program('run', steps=6)):
    with pytest.raises(ValueError, match='model: its code is not in what an older version of lm stored'):
      opens(tmp_path / 'run')


def test_parameters_are_not_paired_with_another_tokenizer(program, tmp_path):
  program('run')
  tokenizers.Bytes(('<|other|>',)).save(tmp_path / 'run' / 'data' / 'tokenizer')
  for opens in (load.open_trained, lambda path: load.open_base(str(path))):
    with pytest.raises(ValueError, match='bytes.json is not as it was written: restore'):
      opens(tmp_path / 'run')
  (tmp_path / 'run' / 'data' / 'tokenizer' / 'settings.json').unlink()   # the checkpoint knows it too
  for opens in (load.open_trained, lambda path: load.open_base(str(path))):
    with pytest.raises(ValueError, match="tokenizer: '.*' before, '.*' now"):
      opens(tmp_path / 'run')


def test_a_run_without_its_tokenizer_says_how_to_get_it_back(program, tmp_path):
  result = program('run')
  shutil.rmtree(tmp_path / 'run' / 'data')
  with pytest.raises(FileNotFoundError, match='the tokenizer of the run in .* is missing .*command that trained'):
    load.open_trained(tmp_path / 'run')
  assert not (tmp_path / 'run' / 'data').exists()
  program('run')
  assert same(load.open_trained(tmp_path / 'run').params, result.params)


def test_a_base_that_trains_on_or_is_damaged_is_noticed(program, tmp_path):
  program('run')
  program('run', steps=6)
  expected = load.open_trained(tmp_path / 'run').params
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '6' / 'state')   # the state of the optimizer, which no reader needs
  base = load.open_base(str(tmp_path / 'run'))
  assert same(load.open_trained(tmp_path / 'run').params, expected) and same(base.start(base.model), expected)
  for file in (tmp_path / 'run' / 'checkpoints' / '6' / 'params').rglob('d/*'):
    file.write_bytes(b'')
  with pytest.raises(OSError, match='step 6 of .* cannot be read, only step 4; .* move .*/checkpoints/6 away'):
    base.start(base.model)
  (tmp_path / 'run' / 'checkpoints' / '6').rename(tmp_path / '6')
  base = load.open_base(str(tmp_path / 'run'))
  assert base.start.step == 4
  program('run', steps=7)
  with pytest.raises(ValueError, match='trained from step 4 to 7 meanwhile'):
    base.start(base.model)
