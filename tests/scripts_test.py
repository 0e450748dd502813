"""Scripts of runs are executed where they are the program, or are named, and in no other case."""
import json
import sys

import pytest
from absl import flags
from helpers.script_runs import same

from lm import launch, load, scripts

pytestmark = pytest.mark.usefixtures('compiled_once')


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
