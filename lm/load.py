"""Opens trained models and runs by the name of a workdir, and models that training starts from by any name.

`open_trained` reads the parameters of a run as well as its model and tokenizer. `open_run` reads neither parameters nor
data. `open_base` opens what may be fine-tuned: a run, an imported model, a Hugging Face folder or an id on the hub.
"""
import dataclasses
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import lora, paths, scripts, signature, train
from lm.data import tokenizers
from lm.data.chat import conversation
from lm.hf import pretrained
from lm.models import kinds
from lm.optim import averaging
from lm.workdir import checkpoint, mismatch, rebuild, records
from lm.workdir.describe import describe, differences


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """The result of a run."""
  run: train.Run
  model: Any                 # without adapters, which are merged into the parameters
  params: Any
  tokenizer: Any
  step: int                  # of the checkpoint
  workdir: pathlib.Path
  facts: Mapping[str, Any]   # what the checkpoint says of the run

  def open_data(self, control: tuple[str, ...] = ()) -> Any:
    """Opens the data of the run. Raises ValueError, before data is prepared, where it is not that of the checkpoint."""
    def check(data, tokenizer):
      _compare(self.workdir, self.facts, {'data': data, 'tokenizer': tokenizer})
    return self.run.data.open(self.workdir, control=control, check=check)


def open_trained(workdir: str | pathlib.Path, best: bool = False, check: Callable[[Any], None] = lambda model: None
                 ) -> TrainedModel:
  """Reads the result of a run onto the mesh that is set.

  It is the newest checkpoint, or the best one by the metric of the run, with `best` and for a run with patience. The
  parameters are the average, where the optimizer keeps one. `check` is called with the model before these are read, and
  may raise an error.

  Raises:
    FileNotFoundError: as in `open_run`, or the tokenizer is missing.
    ValueError: as in `open_run`, or the model, the tokenizer or the base of adapters is not that of the checkpoint.
  """
  stored = open_stored(paths.local(workdir), best)
  check(lora.base_model(stored.run.model))
  params, step = read_params(stored)
  model, params = lora.merge(stored.run.model, train.with_constants(params, train.load_constants(stored.run)))
  return TrainedModel(stored.run, model, params, stored.tokenizer, step, stored.workdir, stored.facts)


def open_run(workdir: pathlib.Path) -> train.Run:
  """Builds the run of a workdir from the description in its newest checkpoint; no parameters are read.

  A run that uses classes or functions of a user's script, or that an older version of lm wrote, is built by its script,
  with the values of flags in `workdir/run.json`.

  Raises:
    FileNotFoundError: the folder has no run or no checkpoint; or the script is needed and may not be executed, see
      `lm.scripts`.
    ValueError: the description is damaged.
  """
  recorded = records.read(workdir)
  if not recorded:
    raise FileNotFoundError(f'{workdir} holds no run (there is no run.json in it); give the --workdir of a trained one')
  accepted = [record for record in recorded if 'data' in record]   # a start that was refused has no data
  facts = checkpoint.stored_facts(workdir / 'checkpoints') if accepted else None
  if facts is None:
    raise FileNotFoundError(f'{workdir} holds no checkpoint yet')
  try:
    missing = rebuild.outside(facts.get('run'))
    run = None if missing or 'run' not in facts else train.run_from_json(facts['run'])
  except ValueError as error:
    raise ValueError(f'the run in {workdir} cannot be opened: {error}') from None
  if run is None:
    reason = (f'the run in {workdir} uses {", ".join(missing[:3])}, which is not of this package' if missing else
              f'the run in {workdir} was written by an older version of lm, which did not store a description of it')
    run = _by_script(scripts.locate(accepted[-1], workdir, reason), workdir, accepted)
  if isinstance(run.model, lora.Adapted) and accepted[-1].get('init'):   # the checkpoints hold only the adapters
    run = start_from(run, accepted[-1]['init'], ignore_tokenizer=True)
  return run


def _by_script(script: pathlib.Path, workdir: pathlib.Path, accepted: Sequence[Mapping[str, Any]]) -> train.Run:
  """Returns the run that a script builds. Raises FileNotFoundError where a file that the script reads is missing."""
  record = accepted[-1]
  with scripts.importable(script):
    experiment = scripts.function(script, record['function'])
    result = typing.get_type_hints(experiment).get('return')
    if result not in (train.Run, train.Run | train.Pending):   # no other function may be called, see `scripts`
      raise ValueError(f'{record["function"]} of {script} does not say that it returns a run (-> train.Run); annotate '
                       f'it, unless the run.json of {workdir} is wrong')
    knobs = records.with_stored_steps(record['knobs'], accepted)
    flags = [flag.name for flag in signature.flags(experiment)]
    if unknown := [name for name in knobs if name not in flags]:
      raise ValueError(f'{workdir} was trained with --{unknown[0]}={knobs[unknown[0]]}, and {script} has no such '
                       'flag; restore the script that trained it')
    try:
      return dataclasses.replace(train.build(signature.call(experiment, knobs)), seed=record['seed'])
    except FileNotFoundError as error:
      raise FileNotFoundError(f'the run in {workdir} needs a file that is missing: {error}; restore it') from None


@dataclasses.dataclass(frozen=True)
class StoredRun:
  """A run that agrees with its checkpoint, before parameters are read."""
  run: train.Run
  tokenizer: Any
  best_step: int | None   # where the best checkpoint is the result; None: the newest one that can be read
  step: int
  facts: Mapping[str, Any]
  workdir: pathlib.Path


def open_stored(workdir: pathlib.Path, best: bool = False) -> StoredRun:
  """Opens the run and the tokenizer of a workdir, and compares them with its checkpoint."""
  run = open_run(workdir)
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, create=False) as checkpoints:
    best_step = train.result_step(run, checkpoints, best)
    step = max(checkpoints.steps(), default=0) if best_step is None else best_step
    facts = checkpoints.facts(best_step)
  if facts is None:
    raise FileNotFoundError(f'{workdir} holds no checkpoint yet')
  try:
    tokens = run.data.load_tokenizer(workdir)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'the tokenizer of the run in {workdir} is missing ({error}); copy it back, or '
                            'repeat the command that trained the run: it trains the same tokenizer again') from None
  now = {'model': describe(run.model), 'tokenizer': tokens.fingerprint}
  if isinstance(run.model, lora.Adapted):
    now['constants'] = {c.name: describe(c) for c in run.constants if c.name == 'base'}
    facts = {**facts, 'constants': {'base': facts.get('constants', {}).get('base')}}
  _compare(workdir, facts, now)
  return StoredRun(run, tokens, best_step, step, facts, workdir)


def _compare(workdir: pathlib.Path, facts: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """Raises Mismatch, a ValueError, where the parts of a run in `now` differ from the facts of its checkpoint."""
  names = [name for name in now if name in facts]
  lines = differences({name: facts[name] for name in names}, {name: now[name] for name in names})
  if lines:
    raise mismatch.Mismatch(f'{workdir} was trained with another script, tokenizer, data or base model than it has '
                              'now; restore what it was trained with:\n  ' + '\n  '.join(lines[:6]))


def read_params(stored: StoredRun) -> tuple[Any, int]:
  """Reads the parameters that a run trains, without constants. Returns them and the step of their checkpoint."""
  run, workdir, mesh = stored.run, stored.workdir, jax.sharding.get_mesh()
  abstract = train.with_shardings(jax.eval_shape(run.model.init, jax.random.key(0)), mesh)
  path = _average_path(stored)
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, create=False) as checkpoints:
    if path is None:
      restored = checkpoints.restore_params(abstract, stored.best_step)
      return restored.state, restored.step
    arrays = averaging.abstract_arrays(path, abstract)
    restored = checkpoints.restore_parts({'params': abstract, 'opt_state': train.with_shardings(arrays, mesh)},
                                         stored.best_step)
    return averaging.from_arrays(path, restored.state['opt_state'], restored.state['params']), restored.step


def _average_path(stored: StoredRun) -> list[str] | None:
  """Returns where the state of the optimizer has an average; ValueError where the description of that is damaged."""
  if 'run' not in stored.facts:   # an older version of lm wrote the checkpoint, and the script built the run
    return averaging.average_path(jax.eval_shape(lambda: train.init(stored.run).opt_state))
  path = stored.facts['run'].get('average')
  if path is not None and not averaging.is_average_path(path):
    raise ValueError(f'the run in {stored.workdir} cannot be opened: {path!r:.100} is not the path of an average')
  return path


def is_run(name: str) -> bool:
  """Whether a name is the workdir of a run, rather than a folder of a model or an id on the hub."""
  return bool(records.read(paths.local(name)))


def run_or_model(workdir: pathlib.Path | None, model: str | None, best: bool) -> tuple[pathlib.Path, str | None]:
  """Returns the workdir of a run, and the name of the Hugging Face model to use instead, or None.

  `model` may also name the workdir of a run. Without both, the run is that of the quickstart. Raises ValueError
  for both, and for the `best` checkpoint of what is no run.
  """
  if workdir and model:
    raise ValueError(f'--workdir={workdir} and --model={model} both name a model; give one of them')
  if model and is_run(model):
    return paths.local(model), None
  if model and best:
    raise ValueError(f'--best is for the checkpoints of a run, and --model={model} is none; leave it out')
  return workdir or pathlib.Path('runs/quickstart'), model


class BaseModel(NamedTuple):
  """A model that training starts from, before its parameters are read: `start(model)` returns them."""
  model: Any
  tokenizer: tokenizers.Tokenizer | None   # None where it was not opened
  template: conversation.Template | None   # of chats; None for a model that was not trained to chat
  start: Callable[[Any], Any]


def open_base(name: str, dtype: Any = None, with_tokenizer: bool = True) -> BaseModel:
  """Opens the model of a run, of an imported or Hugging Face folder, or of an id on the hub.

  Activations have the type `dtype`, by default that of the run, or float32. Without `with_tokenizer`, the tokenizer is
  None, and a folder may lack one.

  Raises:
    FileNotFoundError: nothing has that name.
    ValueError: the class of the model has a fixed dtype, and it is another one.
  """
  folder = paths.local(name)
  if is_run(name):
    stored = open_stored(folder)
    model = lora.base_model(stored.run.model)
    model = model if dtype is None else model.with_dtype(dtype)
    return BaseModel(model, stored.tokenizer if with_tokenizer else None, stored.run.data.template,
                     StoredResult(folder.resolve(), stored.step, stored.facts.get('parameters')))
  folder = pretrained.locate(name)
  model = pretrained.open_model(folder, jnp.float32 if dtype is None else dtype)
  tokens = pretrained.open_tokenizer(folder, model) if with_tokenizer else None
  return BaseModel(model, tokens, pretrained.folder_template(folder), pretrained.start(folder, model))


@dataclasses.dataclass(frozen=True)
class StoredResult:
  """Returns the parameters of a run's result when it is called, without constants such as those of a teacher.

  Raises:
    ValueError: the run has a newer checkpoint than that of `step`.
    OSError: the checkpoint cannot be read.
  """
  workdir: pathlib.Path
  step: int
  parameters: str | None   # their fingerprint, which the checkpoint has

  def __call__(self, model: Any) -> Any:
    loaded = open_trained(self.workdir)
    if loaded.step > self.step:
      raise ValueError(f'{self.workdir} has been trained from step {self.step} to {loaded.step} meanwhile; start again')
    if loaded.step < self.step:
      raise OSError(f'step {self.step} of {self.workdir} cannot be read, only step {loaded.step}; to start from that '
                    f'one, move {self.workdir}/checkpoints/{self.step} away')
    return {name: loaded.params[name] for name in jax.eval_shape(model.init, jax.random.key(0))}


def start_from(run: train.Run, init: str, ignore_tokenizer: bool = False) -> train.Run:
  """Returns a run that starts from the parameters that `init` names; a run with adapters adds them.

  The parameters are not read yet. Training refuses another tokenizer than theirs, except with `ignore_tokenizer`.
  Raises ValueError where shapes differ, and FileNotFoundError where nothing has that name.
  """
  base, model = open_base(init, with_tokenizer=not ignore_tokenizer), lora.base_model(run.model)
  have_kinds = isinstance(base.model, kinds.CLASSES) and isinstance(model, kinds.CLASSES)
  if have_kinds and kinds.in_words(base.model) != kinds.in_words(model):
    raise ValueError(f'--init={init} is {kinds.in_words(base.model)}, and this run trains {kinds.in_words(model)}; '
                     'give another --init')
  pretrained.check_shapes(init, base.model, model)
  fingerprint = None if ignore_tokenizer else base.tokenizer.fingerprint
  return dataclasses.replace(lora.start_from(run, base.start), start_tokenizer=fingerprint)


def origin_folder(run: train.Run, tokens: tokenizers.Tokenizer) -> pathlib.Path | None:
  """Returns the Hugging Face or imported folder that a run was started from, directly or through other runs.

  Returns None without such a folder, and where its tokenizer is not `tokens`.
  """
  start = next((constant.load for constant in run.constants if constant.name == 'base'), run.start)
  if isinstance(start, StoredResult):
    return origin_folder(open_run(start.workdir), tokens) if records.read(start.workdir) else None
  if not isinstance(start, pretrained.Parameters) or not start.folder.is_dir():
    return None
  return start.folder if tokenizers.load(start.folder).fingerprint == tokens.fingerprint else None


def chat_template(loaded: TrainedModel | pretrained.Pretrained) -> conversation.Template | None:
  """Returns the chat template of a model; None for a model that was not trained to chat."""
  return loaded.run.data.template if isinstance(loaded, TrainedModel) else pretrained.folder_template(loaded.folder)


def chat_tokenizer(loaded: TrainedModel | pretrained.Pretrained) -> conversation.Conversation:
  """Returns the tokenizer for a chat with a model. Raises ValueError where the model has no chat template."""
  template = chat_template(loaded)
  if template is None:
    raise ValueError('--chat: this model has no chat template; leave it out, put a chat_template.jinja into the folder '
                     'of the model, or train a model to chat with experiments/finetune_chat.py')
  return conversation.Conversation(loaded.tokenizer, template)
