"""With a warm-up of shapes, each row is read once and in order, and a run can be resumed in any stage."""
import dataclasses

import jax
import numpy as np
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN, Data, go, logged, same, saved

from lm import train
from lm.data.batch import Batch
from lm.data.rows.stages import Schedule, Stage, Staged, cut, stages
from lm.models import transformer
from lm.objectives.next_token import next_token
from lm.objectives.objective import sequence_mean
from lm.train import loop
from lm.workdir import throughput

pytestmark = pytest.mark.usefixtures('compiled_once')

STAGES = (Stage(2, 2, 8), Stage(3, 4, 8), Stage(4, 4, 4))   # then 8 rows of 16
FIELDS = ('tokens', 'targets', 'weights', 'positions')


def rows_of(batch: Batch, length: int = 16):
  return {name: getattr(batch, name).reshape(-1, length) for name in FIELDS}


def test_a_schedule_counts_the_rows_and_tokens_of_steps_before():
  schedule = Schedule(STAGES, 8, 16)
  assert [schedule.shape(step) for step in range(6)] == [(4, 8), (4, 8), (8, 8), (16, 4), (8, 16), (8, 16)]
  assert [schedule.rows_before(step) for step in range(7)] == [0, 2, 4, 8, 12, 20, 28]
  assert schedule.tokens_before(5) == 20 * 16
  assert schedule.shapes() == [(4, 8), (8, 8), (16, 4), (8, 16)]
  assert stages([(2, 4), (5, 8)], [(3, 64)], 16, 128) == (Stage(2, 4, 64), Stage(3, 8, 64), Stage(5, 8, 128))
  assert stages([], [], 16, 128) == ()


def test_each_row_of_the_data_is_read_once_and_in_its_order():
  data = Data().batches('train', next_token(), 1)
  staged, read = Staged(Data().batches('train', next_token(), 8), Schedule(STAGES, 8, 16)), []
  steps = 0
  while sum(len(x['tokens']) for x in read) < 3 * data.rows_per_epoch:   # past the ends of epochs
    read.append(rows_of(staged(steps)))
    steps += 1
  for name in FIELDS:
    values = np.concatenate([x[name] for x in read])
    np.testing.assert_array_equal(values, np.concatenate([getattr(data(i), name) for i in range(len(values))]))
  for step in (3, 1, 4):   # batches are pure, and a host reads its own rows alone
    whole = staged(step)
    for rows in (range(1, 2), range(2, 4), range(3)):
      jax.tree.map(lambda x, y, rows=rows: np.testing.assert_array_equal(x, y[rows.start:rows.stop]),
                   staged(step, rows), whole)


def test_a_row_that_is_cut_keeps_its_positions_and_counts_its_documents_anew():
  batch = Data().batches('train', next_token(sequence_mean), 8)(0)
  short = cut(batch, 4)
  assert short.tokens.shape == (32, 4)
  for row in range(32):
    old, new = batch.segments[row // 4, row % 4 * 4:row % 4 * 4 + 4], short.segments[row]
    np.testing.assert_array_equal(old > 0, new > 0)
    np.testing.assert_array_equal(np.diff(old[old > 0]), np.diff(new[new > 0]))
    assert not new.any() or new[new > 0].min() == 1
  assert sequence_mean(short) == sum(len(set(row[row > 0])) for row in short.segments)


@pytest.mark.slow
def test_a_short_row_gives_the_loss_of_its_part_alone():
  """Attention crosses no cut: the model on short rows equals the model on windows that see only themselves."""
  model = transformer.llama(260, 8, 1, 2, max_length=16, hidden=8)
  batch = Data().batches('train', next_token(), 2)(0)
  params = model.init(jax.random.key(0))
  windows = batch._replace(segments=batch.segments * 100 + np.arange(16)[None] // 4)
  expected = model.apply(params, windows).hidden.reshape(8, 4, 8)
  np.testing.assert_allclose(model.apply(params, cut(batch, 4)).hidden, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Returns the workdir of a run with stages that was not interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  assert go(workdir, stages=STAGES).finished
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize('last_step, mesh', [(3, 'fsdp:4'), (2, 'fsdp:2')])
def test_resumed_across_stages_is_uninterrupted(whole, stopped, last_step, mesh, capsys):
  workdir = stopped(last_step, stages=STAGES, mesh=mesh)
  capsys.readouterr()
  assert go(workdir, stages=STAGES).finished
  out = capsys.readouterr().out
  announced = [line for line in out.splitlines() if 'from here on' in line]
  shapes = {2: '8 x 8', 3: '16 x 4', 4: '8 x 16'}
  assert announced == [f'step {step}: batches of {shape} from here on, compiling'
                       for step, shape in shapes.items() if step >= last_step]
  (step, state), (_, expected) = saved(workdir), saved(whole)
  assert step == 6
  if mesh == 'fsdp:2':
    assert same(state, expected) and logged(workdir) == logged(whole)
  np.testing.assert_allclose([*logged(workdir).values()], [*logged(whole).values()], rtol=1e-5)


def test_a_program_is_compiled_once_for_a_shape(tmp_path, monkeypatch):
  steps, original = [], loop.make_step
  monkeypatch.setattr(loop, 'make_step', lambda run: steps.append(original(run)) or steps[-1])
  go(tmp_path, stages=(Stage(2, 4, 8), Stage(4, 8, 16), Stage(5, 4, 8)))
  assert steps[-1]._cache_size() == 2


def test_throughput_counts_the_tokens_that_were_read():
  now = [0.]
  schedule = Schedule(STAGES, 8, 16)
  speed = throughput.Throughput(schedule.tokens_before, 10, clock=lambda: now[0])
  for step in range(1, 7):
    now[0] = float(schedule.tokens_before(step))   # one token per second
    speed.update(step)
  assert speed.tokens_per_second == pytest.approx(1) and speed.eta == pytest.approx(4 * 8 * 16)


@pytest.mark.parametrize('changes, named', [
    ({'stages': (Stage(2, 8, 5),)}, 'rows of 16 positions cannot be cut into rows of 5'),
    ({'stages': (Stage(2, 3, 16),)}, 'batch=3 is not a multiple of 2'),
    ({'stages': (Stage(2, 0, 16),)}, 'a stage of 0 rows'), ({'stages': (Stage(7, 8, 8),)}, 'step 7, beyond the 6'),
    ({'stages': (Stage(3, 8, 8), Stage(2, 8, 4))}, 'stages end at steps 3, 2'),
    ({'model': transformer.llama(260, 8, 1, 2, max_length=8)}, '16 positions .* --length=8 or less')])
def test_stages_that_do_not_fit_are_refused_before_anything_is_compiled(tmp_path, monkeypatch, changes, named):
  monkeypatch.setattr('lm.train.start._restore', None)
  with pytest.raises(ValueError, match=named):
    go(tmp_path, **{'stages': STAGES, **changes})
  assert not (tmp_path / 'checkpoints').exists()


def test_every_shape_is_traced_before_training():
  mesh, traced = mesh_of('fsdp:1'), []

  @dataclasses.dataclass(frozen=True)
  class Spy(type(RUN.model)):
    def apply(self, params, batch, **options):
      traced.append(batch.tokens.shape)
      return super().apply(params, batch, **options)

  with jax.set_mesh(mesh):
    train.check(dataclasses.replace(RUN, model=Spy(), stages=STAGES), mesh)
  assert set(traced) == {(4, 8), (8, 8), (16, 4), (8, 16)}


def test_stages_are_part_of_the_identity_of_a_run(whole):
  facts = train.identity(dataclasses.replace(RUN, stages=STAGES), 'data', 'tokenizer')
  assert facts != train.identity(RUN, 'data', 'tokenizer') and 'stages' not in train.identity(RUN, 'data', 'tokenizer')
