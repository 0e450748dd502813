"""The flags of a function are its parameters and the fields of its groups; records and studies use the names of flags.
"""
import dataclasses
import json
import pathlib

import pytest
from absl import flags

from lm import launch, signature
from lm.launch import program as launcher
from lm.launch import resume
from lm.studies import search, variants
from lm.workdir import records


@dataclasses.dataclass(frozen=True)
class Wheels:
  """Wheels of a cart.

  Args:
    count: how many there are.
    radius: in metres.
  """
  count: int = 4
  radius: float = 0.5
  spokes: tuple[int, ...] = ()

  def __post_init__(self):
    if self.count < 1:
      raise ValueError(f'count={self.count} is not positive')


def cart(*, name: str = 'x', wheels: Wheels = Wheels(radius=0.25), load: int = 1):  # noqa: B008
  """A cart.

  Most runs set: name, count, workdir.

  Args:
    name: of the cart.
    radius: in inches.
  """
  return name, wheels, load


def parse(*argv, function=cart):
  (values,), _ = launch.parse([function], ['script.py', *argv])
  return values


def test_fields_of_a_group_are_flags_with_the_defaults_of_the_parameter():
  assert parse() == {'name': 'x', 'count': 4, 'radius': 0.25, 'spokes': (), 'load': 1}
  values = parse('--count=3', '--spokes=1,2', '--load=7')
  assert values.on_command_line == {'count', 'spokes', 'load'}
  assert signature.call(cart, values) == ('x', Wheels(3, 0.25, (1, 2)), 7)
  assert signature.call(cart, radius=1.) == ('x', Wheels(4, 1.), 1)
  with pytest.raises(flags.Error, match='unknown flag --cout; the nearest is --count'):
    parse('--cout=3')
  with pytest.raises(TypeError, match='cart has no flag wheels; the nearest is'):
    signature.call(cart, wheels=3)
  with pytest.raises(ValueError, match='count=0 is not positive'):
    signature.call(cart, count=0)


def test_two_flags_of_one_name_and_groups_without_default_are_refused():
  def twice(*, count: int = 1, wheels: Wheels = Wheels()): ...   # noqa: B008
  def pair(*, front: Wheels = Wheels(), rear: Wheels = Wheels()): ...   # noqa: B008
  def without(*, wheels: Wheels): ...
  for function, message in (twice, 'two flags of the name count'), (pair, 'two flags of the name count'), (
      without, 'the group wheels needs a default'):
    with pytest.raises(TypeError, match=message):
      signature.flags(function)


def test_help_begins_with_use_and_the_flags_that_most_runs_set_then_groups_by_title(capsys):
  with pytest.raises(SystemExit):
    launch.parse([cart, launcher._train], ['script.py', '--help'])
  text = capsys.readouterr().out
  titles = ['usage: python script.py', 'Flags that most runs set:', 'Other flags:', 'Wheels of a cart:',
            'Flags of every run:', 'Always:']
  assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
  common = text[text.index('Flags that most'):text.index('Other flags')]
  assert [line.split()[0] for line in common.splitlines() if line.startswith('  --')] == [
      '--name', '--count', '--workdir']
  assert text.count('--count ') == 1 and 'in inches. (number; default 0.25)' in text and 'in metres' not in text


def test_studies_address_fields_of_groups_by_the_names_of_flags():
  first, second = variants.arms(cart, 'a: count=2; b: radius=2 name=y', 'load=5')
  assert signature.call(cart, first.knobs) == ('x', Wheels(2, 0.25), 5)
  assert signature.call(cart, second.knobs) == ('y', Wheels(4, 2.), 5)
  space = search.space('radius=1:2:log; count=1,2', lambda name, value: variants.knobs(cart, f'{name}={value}')[name])
  assert space == {'radius': search.Range(1., 2., log=True), 'count': search.Choice(('1', '2'))}


def test_records_keep_flat_names_which_a_run_that_goes_on_takes_up(tmp_path):
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
  knobs = json.loads(json.dumps({**parse('--count=3', '--spokes=1,2'), 'gone': 1}))   # a flag that no longer exists
  records.start(tmp_path, script=pathlib.Path(__file__).name, knobs=knobs, seed=0, init=None, data='some')
  shared, = launch.parse([launcher._train], ['script.py'])[0]
  inherited = resume.inherit_flags(cart, parse('--load=2'), shared, tmp_path)
  assert signature.call(cart, inherited.knobs) == ('x', Wheels(3, 0.25, (1, 2)), 2)
  assert dict(inherited.from_workdir) == {'count': 3, 'spokes': (1, 2)}


def test_a_run_without_a_checkpoint_is_taken_up_by_its_workdir_alone(tmp_path):
  records.start(tmp_path, script=pathlib.Path(__file__).name, knobs=parse('--count=3'), seed=5, init=None, data='some')
  shared, = launch.parse([launcher._train], ['script.py'])[0]
  inherited = resume.inherit_flags(cart, parse(), shared, tmp_path)
  assert inherited.knobs['count'] == 3 and inherited.shared['seed'] == 5
  new = resume.inherit_flags(cart, parse('--load=2'), shared, tmp_path)
  assert new.knobs['count'] == parse()['count'] and new.shared['seed'] == 0
