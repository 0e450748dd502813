"""A workdir knows the flags of its run; flags that may change do, and others are refused by name."""
import dataclasses
import re
import sys

import jax
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN, logged, steps_kept

from lm import launch, scripts
from lm.data.store_reader import OtherSettings
from lm.data.tokenizers.folder import Bytes
from lm.launch import resume
from lm.objectives import losses, objective
from lm.objectives.next_token import next_token
from lm.optim import schedules
from lm.studies import variants
from lm.train import budget
from lm.workdir import checkpoint, records
from lm.workdir.describe import describe

pytestmark = pytest.mark.usefixtures('compiled_once')

# It has a required flag, a path, a tuple, a warm start, and numbers that only closures hold.
SCRIPT = '''
import dataclasses, pathlib
from typing import Literal
import jax
from lm import lora
from lm import optim
from lm.optim import schedules
from lm import train
from lm.data import dataset
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.models import transformer
from lm.objectives import losses
from lm.objectives.next_token import next_token
from helpers.runs import TEXTS, Bigram

@dataclasses.dataclass(frozen=True)
class Scaled:
  factor: float
  def __call__(self, model):
    return jax.jit(lambda: jax.tree.map(lambda x: self.factor * x, model.init(jax.random.key(0))))()

def experiment(*, name: str, letters: pathlib.Path | None = None, tags: tuple[str, ...] = (), width: int = 8,
               batch: int = 8, label_smoothing: float = 0., scale: float = 0., lr: float = 0.03, cosine: bool = False,
               optimizer: Literal['adam', 'sgd'] = 'adam', steps: int | None = 4, minutes: float = 3.,
               evaluate_every: int = 2, keep: int = 9, lora_rank: int = 0, decoder: bool = False
               ) -> train.Run:
  fitted, steps = steps is None, 1000 if steps is None else steps
  documents = [text + name + (letters.read_text() if letters else '') + ''.join(tags) for text in TEXTS]
  source = Source('numbers', {'train': documents, 'validation': documents[:9]}, documents[0])
  data = dataset.Text(source, Bytes(), 16, ())
  rate = (schedules.warmup_cosine if cosine else schedules.warmup_constant)(lr, steps, 1)
  smoothed = losses.token_loss(losses.nll, losses.smoothing(label_smoothing))
  vocab = Bytes().vocab_size
  model = transformer.llama(vocab, width, 1, heads=2, max_length=16) if decoder else Bigram(width, vocab=vocab)
  run = train.Run(model, next_token(token_loss=smoothed), data,
                  {'adam': optim.adam, 'sgd': optim.sgd}[optimizer](rate), steps, batch, evaluate_every=evaluate_every,
                  save_every=2, keep=keep, start=Scaled(scale) if scale else None, minutes=minutes if fitted else None)
  return lora.adapt(run, lora_rank)
'''


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
  """Returns a function that runs a script in this process, and gives (exit code, standard output, standard error)."""
  path = tmp_path / 'small.py'
  path.write_text(SCRIPT)
  function = variants.experiment(path)
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)

  def go(*argv, workdir='run'):
    flags = f'--workdir={tmp_path / workdir}', '--mesh=fsdp:8', '--nodoctor'
    monkeypatch.setattr(sys, 'argv', ['small.py', *flags, *argv])
    code = 0
    try:
      launch.run(function)
    except SystemExit as stop:
      code = stop.code
    return code, *capsys.readouterr()
  return go


def test_a_workdir_alone_goes_on_with_the_flags_of_its_run(program, tmp_path):
  (tmp_path / 'letters.txt').write_text('xyz')
  flags = ['--name=b', '--seed=3', '--tags=d,e', f'--letters={tmp_path / "letters.txt"}', '--width=16']
  code, _, err = program()
  assert code == 2 and '--name is required (text)' in err
  assert program(*flags)[0] == 0
  code, out, err = program('--steps=6', '--lr=0.01', '--evaluate_every=3')
  size = f'{2 * 16 * Bytes().vocab_size:,}'
  assert re.search(size + r' parameters to train on 8 cpu \(fsdp:8\); 768 positions in 6 steps;', out)
  assert re.search(r'\none epoch is [\d,]+ tokens; this run reads [\d,]+ tokens, \d\S* epochs\n', out)
  assert re.search(r'held out: loss \d\S+, .*; saved in .*/run: checkpoints.*\nnext: python experiments/score.py '
                   r'--workdir=\S+/run --split=validation --script=\S+/small.py\n', out)
  assert (code, err) == (0, '') and steps_kept(tmp_path / 'run') == [2, 4, 6]
  assert re.search(r'flags that the run in .* has: --name=b --letters=\S+ --tags=d,e --width=16 --seed=3\n', out)
  assert 'with other values: --lr=0.01 (before 0.03) --steps=6 (before 4) --evaluate_every=3 (before 2)\n' in out
  assert logged(tmp_path / 'run', 'learning_rate')[6] == pytest.approx(0.01)
  record = records.read(tmp_path / 'run')[-1]
  assert record['seed'] == 3 and record['knobs']['tags'] == ['d', 'e'] and record['knobs']['lr'] == 0.01
  assert 'other values' not in program('--steps=6', '--width=16', '--seed=3', '--keep=9')[1]   # equal values are fine


@pytest.mark.slow
def test_flags_that_may_not_change_are_refused_by_name(program, tmp_path):
  assert program('--name=b')[0] == 0
  steps = steps_kept(tmp_path / 'run')
  for flag, before in (('name=c', 'b'), ('width=16', '8'), ('batch=16', '8'), ('seed=1', '0'), ('tags=z', ''),
                       ('optimizer=sgd', 'adam'), ('scale=2.0', '0.0')):
    name, _, value = flag.partition('=')
    code, _, err = program(f'--{flag}', '--steps=6', '--lr=0.02')
    assert code == 1 and f'--{name} is {before} there, not {value}. Leave it out' in err, flag
    assert '--steps' not in err and '--lr' not in err and '--new_objective' not in err
  assert steps_kept(tmp_path / 'run') == steps
  assert program('--steps=6')[0] == 0   # the refused flags are not recorded


@pytest.mark.slow
def test_minutes_beside_a_fixed_number_of_steps_are_refused_until_they_count(program, tmp_path, monkeypatch):
  monkeypatch.setattr(budget, 'fit', lambda make, minutes: make(6))
  code, _, err = program('--name=b', '--minutes=5', '--steps=4')
  assert code == 1 and '--minutes=5.0 is given, and the run has a fixed number of steps, --steps=4;' in err
  assert program('--name=b', '--steps=4')[0] == 0
  assert '--minutes=5.0 is given' in program('--minutes=5')[2] and steps_kept(tmp_path / 'run') == [2, 4]
  assert program('--minutes=5', '--steps=none')[0] == 0 and steps_kept(tmp_path / 'run') == [2, 4, 6]
  assert (record := records.read(tmp_path / 'run')[-1])['minutes'] == 5 and record['steps'] == 6
  code, out, _ = program('--minutes=10')
  assert code == 0 and steps_kept(tmp_path / 'run')[-1] == 12   # twice the time


@pytest.mark.slow
def test_a_workdir_alone_goes_on_from_what_it_was_started_from(program, tmp_path):
  scripts.trust(tmp_path / 'small.py')
  assert program('--name=b', '--lr=0.3', workdir='base')[0] == 0
  flags = '--name=b', f'--init={tmp_path}/base'
  assert program(*flags, '--steps=8', workdir='whole')[0] == program(*flags)[0] == 0
  code, out, err = program('--steps=8')
  assert (code, err) == (0, '') and f'--init={tmp_path}/base' in out
  assert logged(tmp_path / 'run') == logged(tmp_path / 'whole')
  assert logged(tmp_path / 'run')[1] < logged(tmp_path / 'base')[1] - 0.1   # the run started from the base
  code, _, err = program('--init=none', '--steps=12')
  assert code == 1 and f'--init is {tmp_path}/base there, not none. Leave it out' in err
  (tmp_path / 'base').rename(tmp_path / 'away')
  # Its checkpoints hold all parameters.
  assert program('--steps=10')[0] == 0 and steps_kept(tmp_path / 'run')[-1] == 10
  assert records.read(tmp_path / 'run')[-1]['init'] == f'{tmp_path}/base'
  code, _, err = program(f'--init={tmp_path}/other', '--steps=12')
  assert code == 1 and f'{tmp_path}/other' in err and steps_kept(tmp_path / 'run')[-1] == 10


@pytest.mark.long
@pytest.mark.slow
def test_a_workdir_alone_goes_on_with_adapters(program, tmp_path):
  scripts.trust(tmp_path / 'small.py')
  sizes = '--name=b', '--decoder', '--steps=2'
  assert program(*sizes, workdir='base')[0] == 0
  assert program(*sizes, f'--init={tmp_path}/base', '--lora_rank=2')[0] == 0
  code, out, err = program('--steps=4')
  assert (code, err) == (0, '') and steps_kept(tmp_path / 'run') == [2, 4]
  assert list(logged(tmp_path / 'run')) == [1, 2, 3, 4]
  assert f'--init={tmp_path}/base' in out and '--lora_rank=2' in out and 'going on from step 2' in out
  code, _, err = program('--lora_rank=0')
  assert code == 1 and '--lora_rank is 2 there, not 0. Leave it out' in err
  (tmp_path / 'base').rename(tmp_path / 'away')
  code, _, err = program('--steps=6')
  assert code == 1 and 'what lies under its adapters' in err and 'put it back' in err


@pytest.mark.slow
def test_another_objective_needs_a_flag_and_begins_a_new_best(program, tmp_path):
  assert program('--name=b', '--lr=0.3', '--keep=1')[0] == 0   # some losses are low
  code, _, err = program('--label_smoothing=0.5', '--steps=8')
  assert code == 1 and '--label_smoothing is 0.0 there, not 0.5. Leave it out' in err and '--new_objective' in err
  assert program('--label_smoothing=0.5', '--steps=8', '--new_objective')[0] == 0
  losses_of = logged(tmp_path / 'run', 'validation/loss')
  assert min(losses_of, key=losses_of.get) in (2, 4)   # the lowest losses are from before the smoothing
  with checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints', create=False) as checkpoints:
    assert checkpoints.best_step() == min((6, 8), key=losses_of.get)
  assert program('--steps=10')[0] == 0   # the new objective is recorded


@pytest.mark.slow
def test_the_jump_of_the_learning_rate_of_a_longer_cosine_is_reported(program, tmp_path):
  assert 'jumps' not in program('--name=b', '--cosine', '--steps=8')[1]
  out = program('--steps=16')[1]
  rates = logged(tmp_path / 'run', 'learning_rate')
  jump = re.search(r'the learning rate jumps from (\S+) to (\S+) at step 9: its schedule was made for 8 steps, and is '
                   'now for 16', out)
  assert [float(value) for value in jump.groups()] == pytest.approx([rates[8], rates[9]], rel=0.01)
  assert 'jumps' not in program('--steps=16')[1]


def test_an_objective_is_described_with_the_numbers_that_its_functions_hold():
  def described(smoothing=0.1, z_loss=1e-4, **changes):
    parts = losses.smoothing(smoothing), losses.z_loss(z_loss)
    return describe(next_token(token_loss=losses.token_loss(losses.nll, *parts), **changes), inside=True)
  assert described() == described()
  others = [described(smoothing=0.2), described(z_loss=1e-3), described(denominator=objective.sequence_mean)]
  assert described() not in others and others[0] != others[1] != others[2]
  schedule = schedules.warmup_constant(1., 9, 2)
  assert describe(schedule) == describe(schedules.warmup_constant(2., 9, 2))   # without `inside`, only the name


def test_stored_data_of_other_settings_is_refused_by_the_flag_that_changed(tmp_path):
  flags = resume.ProgramFlags({}, {}, {}, {'length': (16, 8), 'lr': (0.1, 0.2)})

  def build(length=8, lr=0.2):
    return dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, length=length))

  with jax.set_mesh(mesh_of('fsdp:1')), pytest.raises(ValueError, match='--length is 16 there, not 8. Leave it out'), \
       resume.name_changed_flags(flags, tmp_path, build):
    raise OtherSettings('data was made with other settings')
