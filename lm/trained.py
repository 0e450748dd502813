"""A trained run, opened again from its workdir."""
import dataclasses
import importlib.util
import pathlib
import sys
from typing import Any

import jax

from lm import checkpoint, records, train


@dataclasses.dataclass(frozen=True)
class Trained:
  run: train.Run
  model: Any
  params: Any
  tokenizer: Any
  step: int
  workdir: pathlib.Path


def load(workdir: pathlib.Path, best: bool = False) -> Trained:
  """The newest checkpoint of a run, or the best by validation loss; on the mesh that is set.

  The run is made anew by its script, with the knobs in `workdir/run.json`. FileNotFoundError where there is no run, no
  checkpoint, or the script is gone.
  """
  found = records.read(workdir)
  if not found:
    raise FileNotFoundError(f'{workdir} holds no run (there is no run.json in it); give the --workdir of a trained one')
  accepted = [record for record in found if 'data' in record]   # not the tries that were refused
  if not accepted:
    raise FileNotFoundError(f'{workdir} holds no checkpoint yet')
  knobs = records.settle(accepted[-1]['knobs'], accepted)
  run = dataclasses.replace(_function(accepted[-1])(**knobs), seed=accepted[-1]['seed'])
  mesh = jax.sharding.get_mesh()
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, create=False) as checkpoints:
    restored = checkpoints.restore_params(train.abstract_state(run, mesh).params,
                                          checkpoints.best_step() if best else None)
  if restored is None:
    raise FileNotFoundError(f'{workdir} holds no checkpoint yet')
  params = train.with_constants(restored.state, train.load_constants(run))
  return Trained(run, run.model, params, run.data.load_tokenizer(workdir), restored.step, workdir)


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
