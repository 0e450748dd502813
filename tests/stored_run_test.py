"""A run is opened from what is stored with it, and no script is executed unless it is named."""
import json
import pathlib
import shutil
import sys

import jax
import pytest
from helpers.meshes import mesh_of

from lm import generate, launch, load, named, scripts, sharding, train
from lm.hf import pretrained
from lm.train import validation
from lm.workdir import checkpoint, rebuild

pytestmark = pytest.mark.usefixtures('compiled_once')

SCRIPT = '''
import jax
from lm import data, lora, models, optim, train
from lm.data import tokenizers
from lm.data.text.source import Source
from lm.models import layers
from lm.objectives import losses, objective
from lm.objectives.next_token import next_token
from lm.optim import averaging, schedules

TEXTS = [f'number {i} and number {2 * i}' for i in range(40)]

def trained(documents):
  return tokenizers.Bytes(('<|first|>',))

def own(x):
  return jax.nn.relu(x)

def experiment(*, steps: int = 2, lora_rank: int = 0, users: bool = False) -> train.Run:
  source = Source('numbers', {'train': TEXTS, 'validation': TEXTS[:9]}, 'a')
  model = models.llama(tokenizers.Bytes(('<|first|>',)).vocab_size, 16, 1, 2, max_length=16)
  loss = losses.token_loss(losses.nll, losses.z_loss(1e-2))
  rate = schedules.warmup_constant(0.03, steps, 1)
  if users:
    block, = model.layers
    feed_forward = layers.FeedForward(16, own, gated=False)
    model = model.clone(blocks=(models.stack.Stack((block.clone(feed_forward=feed_forward),), 1),))
  run = train.Run(model, next_token(objective.sequence_mean, loss), data.Text(source, trained, 16, ()),
                  averaging.with_average(optim.adam(rate), 0.5), steps, batch=8)
  return lora.adapt(run, lora_rank)
'''


@pytest.fixture(scope='module')
def mesh():
  with jax.set_mesh(mesh := sharding.make_mesh('fsdp:2', jax.devices()[:2])):
    yield mesh


def train_script(folder, workdir, mesh, init=None, **knobs):
  """Trains a run by the script, in this folder."""
  (folder / 'small.py').write_text(SCRIPT)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scripts, '_trusted', [])
    function = scripts.function(folder / 'small.py', 'experiment')
    launch.start(function, {'steps': 2, **knobs}, workdir, mesh, init)
    del sys.modules['small']


@pytest.fixture
def untrusted(tmp_path, monkeypatch):
  """No script is trusted, and the program is another one."""
  monkeypatch.setattr(scripts, '_trusted', [])
  monkeypatch.setattr(sys, 'argv', [str(tmp_path / 'score.py')])


@pytest.fixture
def trains(tmp_path, untrusted, mesh):
  """Returns a function `trains(workdir, **knobs)`, which trains a run by a script in a folder of its own."""
  (tmp_path / 'project').mkdir()

  def go(name, init=None, **knobs):
    train_script(tmp_path / 'project', tmp_path / name, mesh, init, **knobs)
    return tmp_path / name
  return go


@pytest.fixture(scope='module')
def trained_once(tmp_path_factory, mesh):
  folder = tmp_path_factory.mktemp('project')
  train_script(folder, folder / 'run', mesh)
  return folder / 'run'


@pytest.fixture
def workdir(tmp_path, untrusted, trained_once):
  """Returns a copy of the workdir of a run that was trained by a script elsewhere."""
  return shutil.copytree(trained_once, tmp_path / 'run')


def results(workdir):
  """Returns what a reader makes of a run: a text, the metrics of the held-out split, and the parameters."""
  opened = load.open_trained(workdir)
  text = generate.generate(opened.model, opened.params, opened.tokenizer, ['number'], max_tokens=6, seed=3,
                           mark=opened.run.objective.prompt)
  step = validation.make_step(opened.model.apply, opened.run.objective, opened.tokenizer)
  held_out = opened.open_data().batches('validation', opened.run.objective, 8, repeat=False)
  return text, validation.evaluate(step, opened.params, held_out, jax.sharding.get_mesh()), opened.params


def same(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))


@pytest.mark.slow
def test_a_moved_run_without_its_script_generates_and_scores_the_same(trains, tmp_path, monkeypatch):
  workdir = trains('run')
  with monkeypatch.context() as patch:   # restores the function of the script
    patch.setattr(scripts, '_trusted', [tmp_path / 'project' / 'small.py'])
    patch.setattr(train, 'run_from_json', lambda tree: None)
    before = results(workdir)
  del sys.modules['small']
  moved = tmp_path / 'other' / 'place'
  moved.parent.mkdir()
  workdir.rename(moved)
  shutil.rmtree(tmp_path / 'project')
  after = results(moved)
  assert before[:2] == after[:2] and same(before[2], after[2]) and 'small' not in sys.modules
  opened = load.open_trained(moved)
  pretrained.write(tmp_path / 'hf', opened.model, opened.params, opened.tokenizer)
  base = load.open_base(str(moved))
  assert same(base.start(base.model), opened.params)
  with pytest.raises(ValueError, match='does not describe its optimizer; to train, build it by its script'):
    opened.run.optimizer.init(opened.params)


@pytest.mark.slow
def test_adapters_are_opened_without_a_script(trains, tmp_path):
  workdir = trains('adapters', trains('base'), lora_rank=2)
  shutil.rmtree(tmp_path / 'project')
  assert same(results(workdir)[2], load.open_trained(workdir).params)
  assert load.origin_folder(load.open_run(workdir), load.open_trained(workdir).tokenizer) is None
  base = str(tmp_path / 'base')
  stored = named.adapters([f'own={workdir}'], base, 'base')['own']
  assert stored.run.model.rank == 2
  with jax.set_mesh(mesh_of('fsdp:1')):
    params = named.to_serve(base, False, 'int8', [stored])[1]
  # Programs without a mesh read them.
  assert {type(leaf.sharding) for leaf in jax.tree.leaves(params)} == {jax.sharding.SingleDeviceSharding}
  for flags, model, words in (
      ([f'own={workdir}'], workdir, 'trained on other parameters than those of'),
      ([f'own={base}'], base, 'does not train adapters'), (['own'], base, 'own must be a name that no other model has'),
      ([f'own={workdir}'] * 2, base, 'no other model'), ([f'base={workdir}'], base, 'no other model')):
    with pytest.raises(ValueError, match=words):
      named.adapters(flags, str(model), 'base')


def test_a_run_without_its_tokens_says_how_to_get_them_back(workdir):
  shutil.rmtree(workdir / 'data' / 'tokens')
  opened = load.open_trained(workdir)
  with pytest.raises(FileNotFoundError, match='tokens does not hold the tokens of numbers; copy them back'):
    opened.open_data()
  assert not (workdir / 'data' / 'tokens').exists()


@pytest.mark.slow
def test_a_function_of_a_script_is_named_and_needs_the_script(trains, tmp_path):
  workdir = trains('run', users=True)
  with pytest.raises(FileNotFoundError, match='uses small:own, which is not of this package. Its script, .*'
                                              f'--script={tmp_path}/project/small.py') as error:
    load.open_trained(workdir)
  assert '\n' not in str(error.value) and 'small' not in sys.modules
  scripts.trust(tmp_path / 'project' / 'small.py')
  load.open_trained(workdir)
  sys.modules.pop('small')
  (tmp_path / 'project' / 'small.py').write_text(SCRIPT.replace('relu(x)', 'relu(x) ** 2'))
  with pytest.raises(ValueError, match='feed_forward.activation.code.small.own: .* before, .* now'):
    load.open_trained(workdir)


def rewritten(workdir, change):
  """Returns the workdir with other facts in its checkpoint, whose checksums are right."""
  with checkpoint.Checkpoints(workdir / 'checkpoints', create=False) as checkpoints:
    step, facts = max(checkpoints.steps()), checkpoints.facts()
    state = checkpoints.restore_parts({'params': train.with_shardings(jax.eval_shape(
        load.open_run(workdir).model.init, jax.random.key(0)), jax.sharding.get_mesh())}).state
  shutil.rmtree(workdir / 'checkpoints')
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    checkpoints.save(step, state, change(facts))


def nested(depth):
  tree = 1
  for _ in range(depth):
    tree = {'tuple': [tree]}
  return tree


@pytest.mark.parametrize('model, message', [
    ({'class': 'subprocess:Popen', 'fields': {'args': ['touch', 'mark']}}, 'subprocess:Popen is not a class or func'),
    ({'partial': {'function': 'os:system'}, 'args': {'tuple': ['touch mark']}, 'keywords': {'dict': []}},
     'os:system is not a class or function'),
    ({'function': 'evil:run'}, 'evil:run is not a class or function'), (7, 'is not of a model, an objective and data'),
    ({'outside': 'evil:Model'}, 'uses evil:Model, which is not of this package'),
    (nested(120), 'nested deeper than the 100 levels'), ({'tuple': [0] * 200_000}, 'more than 100,000 values'),
    (None, 'written by an older version of lm, which did not store a description')],
    ids=['class', 'function', 'module', 'number', 'outside', 'deep', 'large', 'none'])
def test_a_hostile_workdir_runs_nothing_and_ends_in_one_line(workdir, tmp_path, monkeypatch, model, message):
  (tmp_path / 'project').mkdir()
  evil = f'import pathlib; pathlib.Path({str(tmp_path / "mark")!r}).write_text("executed")'
  for folder in (workdir, tmp_path, tmp_path / 'project'):   # in the workdir, beside the program, elsewhere
    (folder / 'evil.py').write_text(evil)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  rewritten(workdir, lambda facts: {name: {**fact, 'model': model} if name == 'run' else fact
                                    for name, fact in facts.items() if model or name != 'run'})
  record, = json.loads((workdir / 'run.json').read_text())
  changed = {**record, 'script': 'evil.py', 'path': str(tmp_path / 'project' / 'evil.py')}
  (workdir / 'run.json').write_text(json.dumps([changed]))
  for opens in (load.open_trained, lambda path: load.open_base(str(path))):
    with pytest.raises((ValueError, OSError), match=message) as error:
      opens(workdir)
    assert '\n' not in str(error.value) and len(str(error.value)) < 700
  assert not (tmp_path / 'mark').exists() and not pathlib.Path('mark').exists() and 'evil' not in sys.modules


def test_records_that_are_nested_too_deep_end_in_one_line(workdir):
  (workdir / 'run.json').write_text('[' * 100_000)
  with pytest.raises(ValueError, match='run.json is damaged'):
    load.open_trained(workdir)


def test_a_stored_run_is_rebuilt_completely(workdir):
  facts = checkpoint.stored_facts(workdir / 'checkpoints')
  assert rebuild.outside(facts['run']) == []
  run = train.run_from_json(facts['run'])
  assert rebuild.stored(run.model) == facts['run']['model'] and facts['run']['average'] == ['Averaged']
