"""The log of a run: records on disk, the line on the terminal, throughput, MFU, and figures."""
import importlib
import io
import json
import math
import os
import sys
import time
import types

import numpy as np
import pytest
from helpers.disks import files_of
from helpers.figures import points, saved_figures

from lm.workdir import figures as plot
from lm.workdir import tensorboard, track


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def tracker(folder, output=None, **options):
  return track.Tracker(folder, options.pop('total', 100), output=output or io.StringIO(), devices=[], **options)


def steps(folder):
  return [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]



def test_every_record_is_a_line_of_strict_json_at_once(tmp_path):
  def refuse(constant):
    raise AssertionError(constant)

  with tracker(tmp_path) as t:
    t.log(1, {'loss': 2.5, 'gradient_norm': math.inf, 'other': math.nan})
    (record,) = [json.loads(line, parse_constant=refuse)
                 for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert record['loss'] == 2.5 and record['gradient_norm'] is None and record['other'] is None


def test_steps_do_not_wait_for_the_disk_and_a_commit_does(tmp_path, monkeypatch):
  synced = []
  with tracker(tmp_path, every=0.) as t:
    monkeypatch.setattr(os, 'fsync', synced.append)
    for step in 1, 2:
      t.log(step, {'loss': 2.})
    assert tensorboard.read(tmp_path / 'tensorboard')['loss'] == [(1, 2.), (2, 2.)] and not synced
    t.commit(2)
    assert len(set(synced)) == 2


def test_a_resumed_run_has_every_step_once(tmp_path):
  with tracker(tmp_path) as t:
    for step in range(1, 8):
      t.log(step, {'loss': step})
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 8, "lo')  # killed here
  with tracker(tmp_path, step=5) as t:
    for step in range(6, 10):
      t.log(step, {'loss': step})
  assert steps(tmp_path) == list(range(1, 10))
  with tracker(tmp_path):
    assert steps(tmp_path) == []
  assert not list(tmp_path.glob('*.tmp'))


def test_lost_lines_of_the_last_step_are_restored_and_damaged_lines_are_reported(tmp_path):
  with tracker(tmp_path) as t:
    for step in range(1, 6):
      t.log(step, {'loss': step / 3, 'other': math.nan})
    t.log(5, {'validation/loss': 2.})
    records = json.loads(json.dumps(t.commit(5)))   # as a checkpoint gives them back
    assert len(records) == 2 and not t.commit(4)
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes()
  lines = before.splitlines(keepends=True)
  damage = [b'{"step": 2, "loss": "\xff"}\n', b'12\n', b'[]\n', b'{"step": 3, "loss": "high"}\n', b'{"loss": 1}\n',
            b'\0\0']
  path.write_bytes(b''.join([*lines[:2], *damage[:3], *lines[2:4], *damage[3:], lines[4][:9]]))
  assert [row['step'] for row in track.read_metrics(path)] == [1, 2, 3, 4]
  output = io.StringIO()
  with tracker(tmp_path, output, step=5, records=records):
    assert path.read_bytes() == before and output.getvalue() == f'{path}: 6 lines could not be read, and are left out\n'
  with tracker(tmp_path, output, step=5, records=records):
    assert path.read_bytes() == before and output.getvalue().count('\n') == 1   # no row is repeated


def test_a_full_disk_names_the_file_and_is_one_error(tmp_path):
  with pytest.raises(OSError, match='File too large.*metrics.jsonl') as error, files_of(4000), tracker(tmp_path) as t:
    for step in range(1000):
      t.log(step, {'loss': 1.})
  assert error.value.filename == str(tmp_path / 'metrics.jsonl')
  for every in (0., 1e9):   # flushed at each line, or when a buffer is full
    with (pytest.raises(OSError, match='File too large.*tensorboard') as error, files_of(4000),
          tracker(tmp_path, every=every) as t):
      t._jsonl.close()
      t._jsonl = io.StringIO()
      for step in range(1000):
        t.log(step, {'loss': 1.})
    assert error.value.__context__.filename is None   # the error of the write, not one while handling it
  assert not list(tmp_path.glob('*.new'))


def test_event_files_are_those_of_another_writer(tmp_path):
  """Their records have the same bytes, and their events are read by the code that TensorBoard generates."""
  proto, writer = (importlib.import_module(f'tensorboardX.{name}') for name in ('proto.event_pb2', 'record_writer'))
  values = {'loss': 1.5, 'suite/of things/high': -1e-30, 'zero': 0., 'n' * 200: 3e38}
  with tracker(tmp_path, step=2 ** 33) as t:
    for step in (0, 6, 300, 2 ** 40):
      t.log(step, {**values, 'other': math.nan})
  path, = (tmp_path / 'tensorboard').glob('events.out.tfevents.*')
  data, events = path.read_bytes(), []
  while data:   # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
    size = int.from_bytes(data[:8], 'little')
    events.append(proto.Event.FromString(data[12:12 + size]))
    data = data[size + 16:]
  other = writer.RecordWriter(str(tmp_path / 'other'))
  for event in events:
    other.write(event.SerializeToString(deterministic=True))
  other.close()
  assert (tmp_path / 'other').read_bytes() == path.read_bytes()
  expected = [(name, np.float32(value), step) for step in (0, 6, 300, 2 ** 40) for name, value in values.items()]
  assert [(v.tag, v.simple_value, e.step) for e in events for v in e.summary.value] == expected
  # TensorBoard takes no notice of the first start of a session that it reads.
  assert [e.step for e in events if e.session_log.status == 1] == [2 ** 33] * 2
  assert events[0].file_version == 'brain.Event:2' and abs(events[-1].wall_time - time.time()) < 1000
  assert tensorboard.read(tmp_path / 'tensorboard') == {
      name: [(step, np.float32(value)) for step in (0, 6, 300, 2 ** 40)] for name, value in values.items()}


def killed(t):
  """Ends a tracker as a kill does: what its buffers hold is lost."""
  for file in (t._jsonl, t._tensorboard._file):
    os.dup2(nothing := os.open(os.devnull, os.O_WRONLY), file.fileno())
    os.close(nothing)
    file.close()


@pytest.mark.parametrize('clock', [[100.] * 9, [500., 400., 300., 200., 100.]], ids=['at once', 'set back'])
def test_tensorboard_has_each_step_once_after_kills(tmp_path, monkeypatch, clock):
  """A run is killed before its first checkpoint, after it, with records in buffers, and after a late evaluation."""
  times, pids = iter(clock), iter((7, 30, 2, 9, 8))

  def train(step, last, validated=None, saved=None, records=()):
    now, pid = next(times), next(pids)
    monkeypatch.setattr(tensorboard, 'time', types.SimpleNamespace(time=lambda: now))
    monkeypatch.setattr(tensorboard.os, 'getpid', lambda: pid)
    t = tracker(tmp_path, step=step, records=records, every=1e9)
    if validated:
      t.log(validated, {'validation/loss': 10. * validated})
    for n in range(step + 1, last + 1):
      t.log(n, {'loss': float(n)})
      records = t.commit(n) if n == saved else records
    killed(t)
    return records

  train(0, 3)
  records = train(0, 6, saved=4)
  train(4, 4, validated=4, records=records)   # dies before the checkpoint has its metric
  records = train(4, 9, validated=4, records=records, saved=8)
  with tracker(tmp_path, step=8, records=records) as t:
    t.log(9, {'loss': 9.})
  expected = {'loss': [(n, float(n)) for n in range(1, 10)], 'validation/loss': [(4, 40.)]}
  assert tensorboard.read(tmp_path / 'tensorboard') == expected
  rows = [(name, (row['step'], row[name])) for row in track.read_metrics(tmp_path / 'metrics.jsonl')
          for name in row if name not in ('step', 'seconds')]
  assert {name: [row for other, row in rows if other == name] for name in expected} == expected
  assert len(rows) == 10


def test_lines_are_rare_without_a_terminal_and_in_place_on_one(tmp_path):
  def train(output):
    clock = Clock()
    with tracker(tmp_path, output, clock=clock, tokens_before=lambda step: 100 * step, every=15) as t:
      for step in range(1, 101):
        t.log(step, {'loss': 3.2141, 'learning_rate': 6e-4})
        clock.now += 1
        if step % 50 == 0:
          t.log(step, {'validation/loss': 3.5, 'validation/bits_per_byte': 1.402})
    return output.getvalue()

  lines = train(io.StringIO()).splitlines()
  assert [int(line.split()[1].split('/')[0]) for line in lines] == [1, 16, 31, 46, 50, 66, 81, 96, 100]
  # Only where a validation is new.
  assert [i for i, line in enumerate(lines) if 'val' in line or 'byte' in line] == [4, 8]
  assert lines[4] == 'step 50/100  loss 3.214  val 3.500  1.402 bits/byte  lr 6.0e-4  100 tok/s  ETA 0:50'
  assert 'ETA' not in lines[-1]
  live = train(Terminal())  # two of the 102 updates come at the same instant
  assert live.count('\n') == 2 and live.count('\r') == 101 and live.endswith('\n')


def test_a_line_shows_margin_and_accuracy_of_preferences(tmp_path):
  with tracker(tmp_path, output := io.StringIO()) as t:
    t.log(1, {'loss': 0.7, 'preference/accuracy': 0.25, 'preference/margin': -0.5})
    t.log(1, {'validation/loss': 0.6, 'validation/preference/accuracy': 0.75, 'validation/preference/margin': 1.25})
  line = output.getvalue().splitlines()[-1]
  for text in ('loss 0.700', '25% right', 'margin -0.500', 'val 0.600', 'val 75% right', 'val margin 1.250'):
    assert text in line
  assert 'bits/byte' not in line


@pytest.mark.parametrize('number, text', [
    (0.5, '0.5'), (999, '999'), (999.9, '1k'), (412_300, '412k'), (1.25e6, '1.25M'), (3e9, '3G')])
def test_large_numbers_are_abbreviated(number, text):
  assert track._short(number) == text


@pytest.mark.parametrize('seconds, text', [(0, '0:00'), (92, '1:32'), (59.7, '1:00'), (3600, '1:00:00')])
def test_durations_are_hours_minutes_and_seconds(seconds, text):
  assert track._duration(seconds) == text


def test_the_time_of_phases_adds_up(monkeypatch):
  phases, times = track.Phases(), iter([1., 3., 10., 15.])
  monkeypatch.setattr(track, 'time', types.SimpleNamespace(monotonic=lambda: next(times)))
  for _ in range(2):
    with pytest.raises(KeyError), phases('tokenise'):
      raise KeyError
  assert phases == {'tokenise': 2 + 5}


def test_smoothing_keeps_a_line_and_flattens_noise():
  line = [3.0 - 0.1 * i for i in range(50)]
  assert plot._smooth(line, 7) == pytest.approx(line)
  flat = plot._smooth([(-1.0)**i for i in range(100)], 10)
  assert max(abs(v) for v in flat[20:-20]) < 0.1 and plot._smooth([], 3) == []


def test_plot_draws_or_says_what_is_missing(tmp_path, capsys, monkeypatch):
  with tracker(tmp_path) as t:
    t.log(1, {'loss': math.nan, 'learning_rate': 1e-3})
    t.log(2, {'loss': 2.0, 'learning_rate': 5e-4})
    t.log(3, {'loss': 1.5, 'learning_rate': 2e-4, 'validation/loss': 1.8})
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, 'matplotlib.figure', None)
    plot.curve(tmp_path / 'metrics.jsonl', tmp_path / 'curve.png')
  assert 'lm[plot]' in (line := capsys.readouterr().out) and line.count('\n') == 1
  pytest.importorskip('matplotlib')
  figures = saved_figures(monkeypatch)
  plot.curve(tmp_path / 'metrics.jsonl', tmp_path / 'curve.png')
  (losses, rates), = (figure.axes for figure in figures)
  assert points(losses) == [[(2, 2.), (3, 1.5)], [(2, 2.), (3, 1.5)], [(3, 1.8)]]   # as logged, smoothed, validation
  assert [text.get_text() for text in losses.get_legend().get_texts()] == ['training', 'validation']
  assert points(rates) == [[(1, 1e-3), (2, 5e-4), (3, 2e-4)]]
  assert 'loss' in losses.get_ylabel() and (rates.get_xlabel(), rates.get_ylabel()) == ('step', 'learning rate')
  with files_of(4000), pytest.raises(OSError, match='File too large.*curve.png'):
    plot.curve(tmp_path / 'metrics.jsonl', tmp_path / 'curve.png')


@pytest.mark.parametrize('curve', [[(1., 3.)], [(0.5, 3.2), (1., 3.)], []], ids=['one evaluation', 'two', 'none'])
def test_a_comparison_shows_each_arm_however_few_its_evaluations(tmp_path, curve, monkeypatch):
  pytest.importorskip('matplotlib')
  figures = []
  monkeypatch.setattr(plot, '_finish', lambda figure, png, panels: figures.append((figure, panels)))
  curves = {name: [[(x, y + seed + i) for x, y in curve] for seed in range(2)] for i, name in enumerate('ab')}
  plot.comparison(tmp_path / 'compare.png', curves, {'a': [3., 4.], 'b': [4., 5.]}, 'bits/byte', 'share')
  (_, panels), = figures
  assert len(panels) == (2 if curve else 1)
  assert not curve or (panels[0].get_xlim()[0] == 0 and 1 < panels[0].get_xlim()[1] < 1.04)   # shares of one
  for axes in panels:
    assert axes.get_lines()
    for line in axes.get_lines():
      assert len(line.get_xdata()) > 1 or line.get_marker() == 'o'


def test_a_line_has_the_metric_that_chooses_the_best_checkpoint_beside_the_usual_ones(tmp_path):
  with tracker(tmp_path, shown=['suite/books/accuracy', 'validation/loss']) as log:
    log.log(4, {'loss': 2., 'learning_rate': 1.})
    log.log(4, {'validation/loss': 3., 'suite/books/accuracy': 0.1234, 'suite/books/perplexity': 20.})
    assert 'val 3.000' in log.line(4) and 'suite/books/accuracy 0.1234' in log.line(4) and '20' not in log.line(4)
    assert log.line(4).count('3.000') == 1 and 'suite' not in log.line(5)
