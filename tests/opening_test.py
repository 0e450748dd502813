"""Parameters, tokenizer, model and script of a run are opened together, or refused together."""
import dataclasses
import functools
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from absl import flags
from helpers.meshes import mesh_of
from helpers.runs import RUN, TEXTS, go, saved, steps_kept
from helpers.slow import slow

from lm import launch, load, scripts, sharding, train
from lm.data import dataset, tokenizers
from lm.data.text.source import Source
from lm.train import validation
from lm.workdir import checkpoint, describe

pytestmark = pytest.mark.usefixtures('compiled_once')


def snapshot(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def text(name, documents=TEXTS, control=2):
  """Returns data whose tokenizer is trained; another `control` gives another tokenizer."""
  return dataset.Text(Source('numbers', {'train': documents, 'validation': documents[:9]}, name),
                      functools.partial(trained_tokenizer, control), 16, ())


def trained_tokenizer(control, documents):
  return tokenizers.Bytes(tuple(f'<|{len(documents) + i}|>' for i in range(control)))


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_written(tmp_path):
  run = dataclasses.replace(RUN, data=text('a'), steps=2)
  go(tmp_path, run)
  shutil.rmtree(tmp_path / 'data')
  before = snapshot(tmp_path)
  for other, message in ((text('b', TEXTS[:-1]), 'tokenizer: .* before, .* now'), (text('b'), 'data: .* before')):
    with pytest.raises(ValueError, match=message):
      go(tmp_path, run, data=other, steps=4)
    assert snapshot(tmp_path) == before and not (tmp_path / 'data').exists()
  assert go(tmp_path, run, steps=4).step == 4   # deleted data is rebuilt if the result is the same


def test_no_message_advises_to_delete_a_tokenizer(tmp_path):
  go(tmp_path, dataclasses.replace(RUN, data=text('a'), steps=2))
  with pytest.raises(ValueError, match='made with other settings; go back to them, or choose another --workdir') as e:
    go(tmp_path, dataclasses.replace(RUN, data=text('b'), steps=2))
  assert 'delete' not in str(e.value)


def test_a_fingerprint_of_parameters_is_that_of_their_bits_on_any_mesh():
  rng = np.random.default_rng(0)
  params = {'w': rng.normal(size=(8, 4)).astype('f4'), 'b': {'c': rng.normal(size=8).astype(jax.numpy.bfloat16)}}
  expected = describe.fingerprint(params)
  for shape, columns in (('fsdp:1', None), ('fsdp:8', None), ('fsdp:4,tensor:2', 'tensor')):
    with jax.set_mesh(mesh := mesh_of(shape)):
      specs = {'w': jax.P('fsdp', columns), 'b': {'c': jax.P('fsdp')}}
      placed = jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), params, specs)
      assert describe.fingerprint(placed) == expected
  fingerprints = {expected}
  for change in (lambda w: w.__setitem__((3, 2), np.nextafter(w[3, 2], 9)), lambda w: w.__setitem__(slice(2), w[1::-1]),
                 lambda w: w.__setitem__((slice(None), slice(2)), w[:, 1::-1])):
    changed = jax.tree.map(np.copy, params)
    change(changed['w'])
    fingerprints.add(describe.fingerprint(changed))
  fingerprints.add(describe.fingerprint({'w': params['w'].T, 'b': params['b']}))
  fingerprints.add(describe.fingerprint({'v': params['w'], 'b': params['b']}))
  assert len(fingerprints) == 6


def test_a_checkpoint_tells_the_fingerprints_of_its_tokenizer_and_parameters(tmp_path):
  go(tmp_path, steps=2)
  facts = checkpoint.stored_facts(tmp_path / 'checkpoints')
  assert facts['tokenizer'] == RUN.data.tokenizer.fingerprint
  assert facts['parameters'] == describe.fingerprint(saved(tmp_path)[1].params) and steps_kept(tmp_path) == [2]


SCRIPT = '''
import dataclasses
import pathlib
from collections.abc import Callable

import jax
import neighbour
from lm.optim import averaging
from lm import lora
from lm import optim
from lm.optim import schedules
from lm import train
from lm.data import dataset
from lm.data.tokenizers import folder as tokenizer
from lm.data.text.source import Source
from lm.objectives.next_token import next_token

def activation(x):
  """Squares what is positive."""
  return jax.nn.relu(x) ** neighbour.POWER * scale(x)

SCALE = 2.
scale = lambda x: SCALE   # of all positions

@dataclasses.dataclass(frozen=True)
class Small(neighbour.Bigram):
  activation: Callable = activation

  def apply(self, params, batch, *, key=None, cache=None):
    plain = {name: value.merged() if hasattr(value, 'merged') else value for name, value in params.items()}
    return super().apply(plain, batch, key=key)

def experiment(*, width: int = 8, lr: float = 0.03, steps: int = 4, names: int = 2, average: float = 0.,
               free: bool = False, patience: int | None = None, lora_rank: int = 0) -> train.Run:
  source = Source('numbers', {'train': neighbour.TEXTS, 'validation': neighbour.TEXTS[:9]}, 'texts')
  names = tokenizer.Bytes(tuple(f'<|{i}|>' for i in range(names)))
  rate = schedules.warmup_constant(lr, steps, 1)
  optimizer = optim.schedule_free(rate) if free else optim.adam(rate)
  run = train.Run(Small(width, vocab=264), next_token(), dataset.Text(source, names, 16, ()),
                  averaging.with_average(optimizer, average) if average else optimizer, steps, batch=8,
                  evaluate_every=1 if patience else steps, evaluate_batches=2, patience=patience, keep=5)
  return lora.adapt(run, lora_rank, match=('head',))

def tool(*, out: str) -> None:
  pathlib.Path(out).write_text('written')
'''


NEIGHBOUR = """
from helpers.runs import TEXTS, Bigram
POWER = 2
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Returns a function that trains a script `small.py`, beside a module that it imports: `program(workdir, **knobs)`.
  """
  folder = tmp_path / 'project'
  folder.mkdir()
  (folder / 'small.py').write_text(SCRIPT)
  (folder / 'neighbour.py').write_text(NEIGHBOUR)
  monkeypatch.setattr(scripts, '_trusted', [])
  monkeypatch.setattr(sys, 'argv', [str(folder / 'small.py')])
  monkeypatch.delitem(sys.modules, 'neighbour', raising=False)
  mesh = sharding.make_mesh('fsdp:2', jax.devices()[:2])

  def go(name, init=None, ignore=False, **knobs):
    function = scripts.function(folder / 'small.py', 'experiment')
    (knobs,), _ = launch.parse([function], ['small.py', *(f'--{name}={value}' for name, value in knobs.items())])
    return launch.start(function, knobs, tmp_path / name, mesh, init, init_ignore_tokenizer=ignore)[1]

  go.folder, go.mesh = folder, mesh
  with jax.set_mesh(mesh):
    yield go


def loss_of(program, opened):
  run = opened.run
  step = validation.make_step(opened.model.apply, run.objective, opened.tokenizer)
  data = opened.open_data().batches('validation', run.objective, run.batch, repeat=False)
  return validation.evaluate(step, opened.params, data, program.mesh, 2)['loss']


def same(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


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


@pytest.mark.slow
def test_init_refuses_another_tokenizer_before_anything_is_written_unless_a_flag_allows_it(program, tmp_path):
  expected = program('run').params
  with pytest.raises(ValueError, match='for another tokenizer .*--init_ignore_tokenizer'):
    program('other', tmp_path / 'run', names=3)
  assert not (tmp_path / 'other' / 'data').exists()
  result = program('meant', tmp_path / 'run', ignore=True, names=3, lr=1e-30)
  assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-20), expected, result.params))
  program('same', tmp_path / 'run')
  with pytest.raises(ValueError, match=r'run does not fit the model of this run:\n.*8.* there, .*32.* in this run'):
    program('wider', tmp_path / 'run', width=32)


@pytest.mark.parametrize('knobs', [{'average': 0.9}, *slow({'free': 'true'}, {'patience': 1, 'lr': 0.5, 'steps': 6})],
                         ids=['average', 'schedule_free', 'patience'])
def test_init_and_every_reader_give_the_result_of_a_run(program, tmp_path, knobs):
  result = program('run', **knobs)
  with checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints', create=False) as checkpoints:
    model = load.open_run(tmp_path / 'run').model
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    newest = checkpoints.restore_params(train.with_shardings(abstract, program.mesh))
    assert checkpoints.best_step() != max(checkpoints.steps()) or 'patience' not in knobs
  assert not same(newest.state, result.params)
  opened, base = load.open_trained(tmp_path / 'run'), load.open_base(str(tmp_path / 'run'))
  assert same(opened.params, result.params) and same(base.start(base.model), result.params)
  started = program('next', tmp_path / 'run', lr=1e-30, steps=2)   # the rate is so small that the parameters stay
  assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-20), started.params, result.params))


@pytest.mark.slow
def test_adapters_are_refused_on_a_base_that_trained_on(program, tmp_path, monkeypatch):
  program('base')
  monkeypatch.chdir(tmp_path)
  result = program('adapters', pathlib.Path('base'), lora_rank=2)
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path / 'elsewhere')
  opened = load.open_trained(tmp_path / 'adapters')   # a relative --init opens from anywhere
  assert loss_of(program, opened) == pytest.approx(result.metrics['validation/loss'], rel=1e-5)
  assert same(load.open_base(str(tmp_path / 'adapters')).start(opened.model), opened.params)
  program('base', steps=5)
  for again in (lambda: load.open_trained(tmp_path / 'adapters'),
                lambda: program('adapters', tmp_path / 'base', lora_rank=2, steps=6)):
    with pytest.raises(ValueError, match='base.load.step: 4 before, 5 now'):
      again()


@pytest.mark.slow
def test_adapters_are_refused_on_a_base_that_was_trained_anew(program, tmp_path):
  program('base')
  program('adapters', tmp_path / 'base', lora_rank=2)
  shutil.rmtree(tmp_path / 'base')
  program('base', lr=0.02)
  with pytest.raises(ValueError, match='base.load.parameters: .* before, .* now'):
    load.open_trained(tmp_path / 'adapters')


def record(workdir, **changes):
  path = workdir / 'run.json'
  path.write_text(json.dumps([{**json.loads(path.read_text())[-1], **changes}]))


def test_only_the_program_and_scripts_that_are_named_are_executed(program, tmp_path, monkeypatch):
  program('run')
  workdir, mark = tmp_path / 'run', tmp_path / 'mark'
  bad = f'import pathlib; pathlib.Path({str(mark)!r}).write_text("executed")'
  for folder in (tmp_path / 'evil', workdir):
    folder.mkdir(exist_ok=True)
    (folder / 'evil.py').write_text(bad)
    record(workdir, script='evil.py', path=str(folder / 'evil.py'), function='experiment')
    (program.folder / 'evil.py').write_text(bad)   # beside the program
    with pytest.raises(FileNotFoundError, match=f'uses small:Small, which .*--script={folder}/evil.py'):
      load.open_trained(workdir)
  scripts.trust(workdir / 'evil.py')   # a script inside a workdir cannot be trusted
  with pytest.raises(FileNotFoundError, match='none may lie in the workdir'):
    load.open_trained(workdir)
  for name in ('../evil/evil.py', str(tmp_path / 'evil/evil.py'), None):
    record(workdir, script=name)
    with pytest.raises(ValueError, match='names no script'):
      load.open_trained(workdir)
  record(workdir, script='small.py', function='tool', knobs={'out': str(mark)})
  with pytest.raises(ValueError, match='tool of .*small.py does not say that it returns a run'):
    load.open_trained(workdir)
  for changes, message in (({'function': 'activation', 'knobs': {'x': 1}}, 'activation of .*small.py does not say'),
                           ({'function': 'experiment', 'knobs': {'old': 1}},
                            r'and .*small.py has no such flag')):
    record(workdir, **changes)
    with pytest.raises(ValueError, match=message):
      load.open_trained(workdir)
  record(workdir, function='pathlib')
  with pytest.raises(ValueError, match="defines no function 'pathlib'"):
    load.open_trained(workdir)
  assert not mark.exists()


def test_a_script_in_another_place_is_opened_if_it_is_named(program, tmp_path, monkeypatch):
  result = program('run')
  monkeypatch.setattr(sys, 'argv', [str(tmp_path / 'score.py')])
  (tmp_path / 'score.py').write_text('')
  with pytest.raises(FileNotFoundError, match=f'if you trust it, name it: --script={program.folder}/small.py'):
    load.open_trained(tmp_path / 'run')
  launch.parse([], ['score.py', f'--script={program.folder}/small.py'])
  assert same(load.open_trained(tmp_path / 'run').params, result.params)
  with pytest.raises(flags.Error, match='flag --script: there is no script'):
    launch.parse([], ['score.py', '--script=/no/such.py'])
