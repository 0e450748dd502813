"""A trained run, opened again from its workdir."""
import dataclasses
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import averaging, checkpoint, lora, pretrained, records, train
from lm.data import tokenizer, turns


@dataclasses.dataclass(frozen=True)
class Trained:
  run: train.Run
  model: Any
  params: Any
  tokenizer: Any
  step: int
  workdir: pathlib.Path


def load(workdir: pathlib.Path, best: bool = False) -> Trained:
  """The newest checkpoint of a run, or the best by validation loss, as of one with patience; on the mesh that is set.

  The parameters are those to evaluate: the average, where the optimizer keeps one. Adapters are merged into their
  matrices. FileNotFoundError where there is no run, no checkpoint, or the script is gone.
  """
  run = open_run(workdir)
  mesh = jax.sharding.get_mesh()
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, create=False) as checkpoints:
    step, abstract = checkpoints.best_step() if best or run.patience else None, train.abstract_state(run, mesh)
    if averaging.averages(abstract.opt_state):
      restored = checkpoints.restore(abstract, step)
      if restored is not None:
        restored = restored._replace(state=averaging.evaluated(restored.state.opt_state, restored.state.params))
    else:
      restored = checkpoints.restore_params(abstract.params, step)
  if restored is None:
    raise FileNotFoundError(f'{workdir} holds no checkpoint yet')
  model, params = lora.merged(run.model, train.with_constants(restored.state, train.load_constants(run)))
  return Trained(run, model, params, run.data.load_tokenizer(workdir), restored.step, workdir)


def open_run(workdir: pathlib.Path) -> train.Run:
  """A run, made anew by its script, with the knobs in `workdir/run.json`; no parameters are read.

  FileNotFoundError where there is none that began to train, or the script is gone.
  """
  found = records.read(workdir)
  if not found:
    raise FileNotFoundError(f'{workdir} holds no run (there is no run.json in it); give the --workdir of a trained one')
  accepted = [record for record in found if 'data' in record]   # not the tries that were refused
  if not accepted:
    raise FileNotFoundError(f'{workdir} holds no checkpoint yet')
  knobs = records.settle(accepted[-1]['knobs'], accepted)
  run = dataclasses.replace(_function(accepted[-1])(**knobs), seed=accepted[-1]['seed'])
  if isinstance(run.model, lora.Adapted) and (init := accepted[-1].get('init')):   # else its checkpoints have it all
    run = lora.start_from(run, functools.partial(pretrained.start, pathlib.Path(init)))
  return run


class Base(NamedTuple):
  """What to fine-tune, without its parameters, which `start(model)` gives."""
  model: Any
  tokenizer: tokenizer.Tokenizer
  template: turns.Template | None   # None: it was not made to chat
  start: Callable[[Any], Any]


def base(name: str, dtype: Any = jnp.float32) -> Base:
  """What the workdir of a run holds, an imported model, a Hugging Face folder, or the hub under an id.

  FileNotFoundError where there is nothing of the kind.
  """
  folder = pathlib.Path(name).expanduser()
  if records.read(folder):
    run = open_run(folder)
    with checkpoint.Checkpoints(folder / 'checkpoints', create=False) as saved:
      step = max(saved.steps(), default=0)
    return Base(lora.plain(run.model), run.data.load_tokenizer(folder), chat_template(run.data),
                functools.partial(_params, folder, step))
  folder = pretrained.locate(name)
  model = pretrained.open_model(folder, dtype)
  tokens = pretrained.open_tokenizer(folder, model)
  return Base(model, tokens, pretrained.folder_template(folder), pretrained.start(folder, model))


def _params(workdir: pathlib.Path, step: int, model: Any) -> Any:
  """A run's parameters, without a teacher's. The step tells them apart from those of the run when it has gone on."""
  del step
  found = load(workdir).params
  return {name: found[name] for name in jax.eval_shape(model.init, jax.random.key(0))}


def chat_template(data: Any) -> turns.Template | None:
  """The template of a run's data, also where that is annotated; None where its data is no dialogues."""
  return getattr(getattr(data, 'data', data), 'template', None)


def _function(record: dict[str, Any]):
  """The experiment of a record: from the file that ran, or one of its name beside the script that runs now."""
  paths = [pathlib.Path(record['path']), pathlib.Path(sys.argv[0]).resolve().parent / record['script']]
  path = next((p for p in paths if p.is_file()), None)
  if path is None:
    raise FileNotFoundError(f'the script of the run, {record["script"]}, is neither at {paths[0]} nor at {paths[1]}; '
                            'copy it to one of them')
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module   # dataclasses and `inspect` look the module up
  spec.loader.exec_module(module)
  return getattr(module, record['function'])
