"""Scripts as modules, and small inputs of theirs."""
import argparse
import functools
import importlib
import inspect
import json

import jax
import pytest
from helpers.experiment_scripts import SCRIPTS, TINY

from lm import launch
from lm import scripts as lm_scripts
from lm.data import tokenizers
from lm.data.chat import shop_dialogues
from lm.data.text import puzzles
from lm.hf import pretrained
from lm.launch import program as launcher
from lm.models import transformer


@pytest.fixture(scope='module')
def scripts():
  """All of them imported in this process, and named as those whose runs are opened."""
  lm_scripts.trust(*SCRIPTS.values())
  return {name: importlib.import_module(name) for name in SCRIPTS}


@pytest.fixture(scope='module')
def start(scripts, tmp_path_factory):
  """Returns a folder with a small run of finetune_chat, from which preference starts."""
  folder = tmp_path_factory.mktemp('start')
  (knobs,), _ = launch.parse([scripts['finetune_chat'].experiment], ['finetune_chat.py', *TINY['finetune_chat']])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(puzzles, 'dialogues', functools.partial(puzzles.dialogues, 300))
    launcher._train(scripts['finetune_chat'].experiment, knobs, None, workdir=folder / 'runs/finetune_chat',
                    doctor=False)
  return folder


@pytest.fixture
def small(start, monkeypatch):
  """Returns small values for what the experiments would otherwise read: few puzzles, and a run to start from."""
  for module, name in (puzzles, 'dialogues'), (puzzles, 'preferences'), (shop_dialogues, 'shop'):
    monkeypatch.setattr(module, name, functools.partial(getattr(module, name), 300))
  monkeypatch.chdir(start)


@pytest.fixture
def texts(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  lines = inspect.getsource(argparse).splitlines(keepends=True)
  for i in range(0, len(lines), 20):
    (folder / f'{i}.txt').write_text(''.join(lines[i:i + 20]))
  pairs = [json.dumps({'prompt': line.strip(), 'completion': line.split()[0]}) for line in lines if line.strip()]
  (folder / 'summaries.jsonl').write_text('\n'.join(pairs))
  model = transformer.llama(264, 16, 1, heads=4, max_length=1024)   # a teacher of its own
  params = jax.jit(model.init)(jax.random.key(0))
  pretrained.write(folder / 'teacher', model, params, tokenizers.Bytes(('<|bos|>', '<|eos|>')))
  return folder
