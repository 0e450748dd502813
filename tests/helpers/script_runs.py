"""A script whose runs are small, beside a module that it imports, and what its runs are compared by."""
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lm import launch, scripts, sharding
from lm.train import validation

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


def program(tmp_path, monkeypatch) -> Iterator[Callable]:
  """Yields a function that trains the script: `program(workdir, init, ignore, **knobs)`, see `launch.start`."""
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
