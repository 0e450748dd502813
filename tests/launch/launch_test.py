"""A function becomes a program: its flags, its help, its exit codes, and what it records."""
import dataclasses
import json
import pathlib
import re
import signal
import sys
import types
from typing import Literal

import generate
import jax
import pytest
from absl import flags
from helpers.runs import RUN, Bigram

from lm import launch, sharding, train
from lm.launch import building
from lm.launch import program as launcher
from lm.train import Result
from lm.workdir import records


def experiment(*, layers: int = 12, lr: float = 1e-3, tied: bool = True, norm: Literal['rms', 'layer'] = 'rms',
               sizes: list[int] = (1, 2), span: tuple[float, int] = (0.5, 3), clip: float | None = 1.0,
               data: pathlib.Path | None = None, name: str = 'x'):
  """An experiment.

  Args:
    layers: how many blocks
      there are.
    lr: peak learning rate.

  Returns:
    nothing: nothing.
  """


def parse(*argv, function=experiment):
  (values,), _ = launch.parse([function], ['script.py', *argv])
  return values


def test_defaults_are_the_functions():
  assert parse() == experiment.__kwdefaults__


@pytest.mark.parametrize('argument, value', [
    ('--layers=20_000', 20_000), ('--layers=1e4', 10_000), ('--lr=6e-4', 6e-4), ('--lr=3', 3.0), ('--notied', False),
    ('--tied=false', False), ('--norm=layer', 'layer'), ('--sizes=4, 5,6', [4, 5, 6]), ('--sizes=', []),
    ('--span=0.25,7', (0.25, 7)), ('--clip=none', None), ('--clip=2', 2.0), ('--data=/a/b', pathlib.Path('/a/b')),
    ('--name=none', 'none'), ('--name=a=b', 'a=b'),
])  # yapf: disable
def test_values_have_the_type_of_the_signature(argument, value):
  name = argument.partition('=')[0].removeprefix('--').removeprefix('no')
  name = name if name in experiment.__kwdefaults__ else 'no' + name
  got = parse(argument)
  assert got.pop(name) == value and type(value) is type(parse(argument)[name])
  assert got == {k: v for k, v in experiment.__kwdefaults__.items() if k != name}


@pytest.mark.parametrize('argument, parts', [
    ('--layers=1.5', ['--layers=1.5', 'whole number']), ('--layers=inf', ['--layers=inf', 'whole number']),
    ('--lr=fast', ['--lr=fast', 'number']), ('--lr=nan', ['--lr=nan', 'number']),
    ('--norm=batch', ['--norm=batch', 'rms | layer']), ('--tied=perhaps', ['--tied=perhaps', 'true | false']),
    ('--sizes=1,b', ['--sizes=1,b', 'whole number,whole number,...']),
    ('--span=1', ['--span=1', 'number,whole number']),
    ('--clip=some', ['--clip=some', 'number | none']), ('--layer=3', ['--layer', 'nearest is --layers']),
    ('--learning_rate=3', ['--learning_rate', 'nearest is --']), ('train', ["'train'", '--name=value']),
    ('--layers', ['Missing value', '--layers']),
])  # yapf: disable
def test_a_bad_flag_is_one_line_that_names_it_and_what_is_allowed(argument, parts):
  with pytest.raises(flags.Error) as error:
    parse(argument)
  assert all(part in str(error.value) for part in parts) and '\n' not in str(error.value)


@pytest.mark.parametrize('argv, texts', [
    ((), []), (('--stop=,',), [',']), (('--stop=a,b', '--stop= c', '--stop', ''), ['a,b', ' c', ''])])
def test_a_text_keeps_its_commas(argv, texts):
  def stops(*, stop: launch.Texts = ()): ...

  for function in (stops, generate.main):   # the second is a script
    assert list(parse(*argv, function=function)['stop']) == texts


def test_a_parameter_without_default_is_required():
  def required(*, path: pathlib.Path): ...

  assert parse('--path', 'a', function=required) == {'path': pathlib.Path('a')}
  with pytest.raises(flags.Error, match='--path is required .path.; --help'):
    parse(function=required)


def test_functions_with_the_same_flags_live_in_one_process():
  def other(*, lr: str = 'auto', get_help: int = 0): ...  # get_help is a method of FlagValues

  assert parse('--lr=5')['lr'] == 5.0
  assert parse('--lr=5', '--get_help=2', function=other) == {'lr': '5', 'get_help': 2}
  assert flags.FLAGS.is_parsed() and 'lr' not in flags.FLAGS


def test_a_function_that_cannot_be_flags_is_refused():
  def untyped(*, a=1): ...
  def dictionary(*, a: dict = None): ...
  def reserved(*, seed: int = 1): ...

  for functions in ([untyped], [dictionary], [reserved, launcher._train], [reserved, reserved]):
    with pytest.raises(TypeError):
      launch.parse(functions, ['script.py'])


def test_help_tells_every_flag_its_default_and_its_docstring(capsys):
  with pytest.raises(SystemExit) as stop:
    launch.parse([experiment, launcher._train], ['script.py', '--help'])
  text = ' '.join(capsys.readouterr().out.split())
  assert not stop.value.code
  assert '--layers how many blocks there are. (whole number; default 12)' in text
  assert '--norm (rms | layer; default rms)' in text and '--sizes (whole number,whole number,...; default 1,2)' in text
  assert '--seed' in text and 'default 0)' in text and '--mesh' in text and 'nothing: nothing' not in text
  assert '--v' not in text.split() and '--alsologtostderr' not in text


@dataclasses.dataclass(frozen=True)
class Run:
  width: int
  seed: int = 0
  model: None = None
  data = types.SimpleNamespace(kind=None)
  minutes: None = None
  start: None = None


OPENED = types.SimpleNamespace(stores={}, validation_sets=())   # data without documents
RESULT = Result(0, 0, None, OPENED, None, {}, True, {})


@pytest.fixture
def program(monkeypatch, tmp_path):
  """Returns a function that runs an experiment in this process with a stand-in for training, and gives its exit code.
  """
  calls = []
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)
  monkeypatch.setattr('lm.train.checks.check_mesh', lambda run, mesh: None)   # the stand-in of a run has no batch
  monkeypatch.setattr(train, 'train', lambda run, workdir, mesh, watch, new_objective, examine:
                      calls.append((run, workdir, mesh)) or go.result)

  def go(function, *argv, then=None, check=None):
    monkeypatch.setattr(sys, 'argv', ['script.py', f'--workdir={tmp_path / "run"}', *argv])
    try:
      launch.run(function, then, check)
    except SystemExit as stop:
      return stop.code
    return 0

  go.calls, go.workdir, go.result = calls, tmp_path / 'run', RESULT
  return go


def build(*, width: int = 4):
  if width % 2:
    raise ValueError(f'width {width} is odd')
  return Run(width)


def test_run_trains_records_and_calls_then(program):
  calls = []
  then = lambda *arguments: calls.append(arguments)
  assert program(build, '--width=8', '--seed=3', '--mesh=fsdp:4,tensor:2', then=then) == 0
  (run, workdir, mesh), = program.calls
  assert run == Run(8, seed=3) and workdir == program.workdir and mesh == sharding.make_mesh('fsdp:4,tensor:2')
  assert calls == [(run, workdir, RESULT)]
  assert program(build) == 0
  first, second = json.loads((workdir / 'run.json').read_text())
  assert first['mesh'] == {'fsdp': 4, 'tensor': 2}
  assert first['knobs'] == {'width': 8} and first['seed'] == 3
  assert first['versions']['jax'] == jax.__version__ and first['devices'] == 8 and first['script'] == 'launch_test.py'
  assert second['knobs'] == {'width': 4} and second['argv'][1].startswith('--workdir')


def test_a_bad_input_is_one_line_and_nothing_is_trained(program, capsys):
  assert program(build, '--width=3') == 1
  assert capsys.readouterr().err == 'error: width 3 is odd  (--debug shows where)\n'
  assert program(build, '--mesh=fsdp:3') == 1 and 'fsdp:3' in capsys.readouterr().err
  assert program(build, '--process_id=1') == 1 and '--num_processes' in capsys.readouterr().err
  assert program(build, '--width=3', '--debug') == 1 and 'Traceback' in capsys.readouterr().err
  assert not program.calls and not (program.workdir / 'run.json').exists()


def test_what_a_report_needs_is_checked_before_anything_is_opened(program, capsys):
  def check():
    raise ImportError("a package is needed: pip install 'lm[eval]'")

  def never(*, width: int = 4):
    pytest.fail('a run was built')

  assert program(never, then=print, check=check) == 1 and not program.calls and not program.workdir.exists()
  assert capsys.readouterr().err.startswith("error: a package is needed: pip install 'lm[eval]'")


@pytest.mark.parametrize('bug', [lambda: {}['key'], lambda: jax.numpy.concatenate([])])
def test_a_bug_keeps_its_traceback(program, capsys, bug):
  def broken(*, width: int = 1):
    bug()

  assert program(broken) == 1
  assert 'Traceback' in (text := capsys.readouterr().err) and 'in broken' in text


@pytest.mark.parametrize('width, line', [
    (8, 'mesh fsdp:8: weights are split over all devices, which needs the least memory; --mesh gives another\n'),
    (4, 'mesh replica:2,fsdp:4: weights are split over 4 devices; over more: .*; --mesh gives another\n')])
def test_the_mesh_that_is_chosen_is_printed_once_with_its_reason(monkeypatch, capsys, width, line):
  run = dataclasses.replace(RUN, model=Bigram(width))
  mesh = building.choose_mesh(lambda: run)
  assert mesh.size == 8 and re.fullmatch(line, capsys.readouterr().out)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  assert building.choose_mesh(lambda: run) == mesh and capsys.readouterr().out == ''


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_run_that_a_signal_stopped_ends_with_its_code_and_is_not_reported(program, capsys, number, code):
  calls = []
  program.result = RESULT._replace(finished=False, signal=number)
  assert program(build, then=lambda *arguments: calls.append(arguments)) == code
  assert not calls and capsys.readouterr().err == '' and (program.workdir / 'run.json').exists()


def test_data_is_verified_on_demand_before_anything_is_trained(program, capsys):
  def damaged(workdir):
    raise ValueError(f'{workdir.name} is damaged')

  def experiment(*, bad: bool = False):
    verify = damaged if bad else lambda workdir: ['validation']
    return type('Run', (Run,), {'data': types.SimpleNamespace(kind=None, verify=verify)})(4)

  assert program(experiment, '--bad') == 0 and len(program.calls) == 1
  assert program(experiment, '--bad', '--verify') == 1 and len(program.calls) == 1
  assert capsys.readouterr().err.startswith('error: run is damaged')
  assert program(experiment, '--bad=false', '--verify') == 0
  assert 'not verified, since it has no checksums: validation' in capsys.readouterr().out


def test_an_interrupt_is_quiet(program, capsys):
  def interrupted(*, width: int = 1):
    raise KeyboardInterrupt

  assert program(interrupted) == 130 and capsys.readouterr().err == ''


def test_the_workdir_of_another_script_is_refused(program, capsys):
  program.workdir.mkdir()
  records.start(program.workdir, script='other.py')
  assert program(build) == 1 and not program.calls
  assert 'other.py' in (text := capsys.readouterr().err) and 'launch_test.py' in text and text.count('\n') == 1


@pytest.mark.parametrize('argv, expected', [
    ([], None), (['--bos'], True), (['--nobos'], False), (['--bos=none'], None)])
def test_a_switch_may_be_none(argv, expected):
  def main(*, bos: bool | None = None):
    del bos
  assert launch.parse([main], ['', *argv])[0] == [{'bos': expected}]


def test_an_optional_text_may_be_empty_only_if_its_type_says_so():
  def main(*, name: str | None = None, prompt: str = 'a', between: launch.AnyText | None = None):
    del name, prompt, between
  assert launch.parse([main], ['', '--prompt=', '--between='])[0] == [{'name': None, 'prompt': '', 'between': ''}]
  assert launch.parse([main], ['', '--name=none', '--between=none'])[0][0]['between'] is None
  with pytest.raises(flags.Error, match=r'--name=: expected text \| none; it is empty, perhaps an unset'):
    launch.parse([main], ['', '--name='])
