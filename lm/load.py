"""A trained run, opened again from its workdir, with all that belongs to its parameters; and what to start from."""
import dataclasses
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import lora, scripts, signature, train
from lm.data import tokenizers
from lm.data.chat import conversation
from lm.hf import pretrained
from lm.models import Encoder, EncoderDecoder, MultiToken, Reward, Transformer
from lm.optim import averaging
from lm.workdir import checkpoint, mismatch, rebuild, records
from lm.workdir.describe import describe, differences


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A run with the parameters that are its result. `facts` are those of the checkpoint."""
  run: train.Run
  model: Any
  params: Any
  tokenizer: Any
  step: int
  workdir: pathlib.Path
  facts: Mapping[str, Any]

  def open_data(self, control: tuple[str, ...] = ()) -> Any:
    """The data of the run. ValueError, before anything is made, where it is not what the run was trained on."""
    def check(data, tokenizer):
      _compare(self.workdir, self.facts, {'data': data, 'tokenizer': tokenizer})
    return self.run.data.open(self.workdir, control=control, check=check)


def open_trained(workdir: str | pathlib.Path, best: bool = False) -> TrainedModel:
  """The result of a run: its newest checkpoint, or the best by the metric of the run; on the mesh that is set.

  The best is taken of a run with patience too. The parameters are those to evaluate: the average, where the optimizer
  keeps one. Adapters are merged into their matrices. Raises as `open_run`.
  """
  return _read(_open(pathlib.Path(workdir), best))


def open_run(workdir: pathlib.Path) -> train.Run:
  """The run of a workdir, built from what its newest checkpoint says of it; no parameters are read.

  Where the run has classes or functions of a user's script, or was written by an older version of lm, the script builds
  it, with the knobs in `workdir/run.json`.

  Raises:
    FileNotFoundError: there is no run, none that was saved, or its script is needed and was not named, see `scripts`.
    ValueError: what describes the run is not a description.
  """
  recorded = records.read(workdir)
  if not recorded:
    raise FileNotFoundError(f'{workdir} holds no run (there is no run.json in it); give the --workdir of a trained one')
  accepted = [record for record in recorded if 'data' in record]   # not the tries that were refused
  facts = checkpoint.stored_facts(workdir / 'checkpoints') if accepted else None
  if facts is None:
    raise FileNotFoundError(f'{workdir} holds no checkpoint yet')
  try:
    missing = rebuild.outside(facts.get('run'))
    run = None if missing or 'run' not in facts else train.rebuilt(facts['run'])
  except ValueError as error:
    raise ValueError(f'the run in {workdir} cannot be opened: {error}') from None
  if run is None:
    reason = (f'the run in {workdir} uses {", ".join(missing[:3])}, which is not of this package' if missing else
              f'the run in {workdir} was written by an older version of lm, which did not store a description of it')
    run = _by_script(scripts.locate(accepted[-1], workdir, reason), workdir, accepted)
  if isinstance(run.model, lora.Adapted) and accepted[-1].get('init'):   # else its checkpoints have it all
    run = start_from(run, accepted[-1]['init'], ignore_tokenizer=True)
  return run


def _by_script(script: pathlib.Path, workdir: pathlib.Path, accepted: Sequence[Mapping[str, Any]]) -> train.Run:
  """The run that a script builds. FileNotFoundError where what it reads is not there."""
  record = accepted[-1]
  with scripts.importable(script):
    make = scripts.function(script, record['function'])
    result = typing.get_type_hints(make).get('return')
    if result not in (train.Run, train.Run | train.Pending):   # nothing else may be called: see `scripts`
      raise ValueError(f'{record["function"]} of {script} does not say that it returns a run (-> train.Run); annotate '
                       f'it, unless the run.json of {workdir} is wrong')
    knobs = records.with_stored_steps(record['knobs'], accepted)
    flags = [flag.name for flag in signature.flags(make)]
    if unknown := [name for name in knobs if name not in flags]:
      raise ValueError(f'{workdir} was trained with --{unknown[0]}={knobs[unknown[0]]}, which {script} does not have '
                       '(any more); go back to the script that trained it')
    try:
      return dataclasses.replace(train.opened(signature.call(make, knobs)), seed=record['seed'])
    except FileNotFoundError as error:
      raise FileNotFoundError(f'what the run in {workdir} was made with is not there: {error}') from None


@dataclasses.dataclass(frozen=True)
class _Opened:
  """A run that is what its checkpoint was trained with, before parameters are read; `chosen` is None for the newest."""
  run: train.Run
  tokenizer: Any
  chosen: int | None
  step: int
  facts: Mapping[str, Any]
  workdir: pathlib.Path


def _open(workdir: pathlib.Path, best: bool = False) -> _Opened:
  """ValueError where the model, the tokenizer or what lies under adapters is not what the checkpoint was made with."""
  run = open_run(workdir)
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, create=False) as checkpoints:
    chosen = train.result_step(run, checkpoints, best)
    step, facts = max(checkpoints.steps(), default=0) if chosen is None else chosen, checkpoints.facts(chosen)
  if facts is None:
    raise FileNotFoundError(f'{workdir} holds no checkpoint yet')
  try:
    tokens = run.data.load_tokenizer(workdir)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'the tokenizer of the run in {workdir} is not there ({error}); copy it back, or repeat '
                            'the command that trained the run: it makes the same tokenizer of the same text') from None
  now = {'model': describe(run.model), 'tokenizer': tokens.fingerprint}
  if isinstance(run.model, lora.Adapted):
    now['constants'] = {c.name: describe(c) for c in run.constants if c.name == 'base'}
    facts = {**facts, 'constants': {'base': facts.get('constants', {}).get('base')}}
  _compare(workdir, facts, now)
  return _Opened(run, tokens, chosen, step, facts, workdir)


def _compare(workdir: pathlib.Path, facts: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  if lines := differences({name: facts[name] for name in now if name in facts},
                          {name: value for name, value in now.items() if name in facts}):
    raise mismatch.Mismatch(f'{workdir} was trained with another script, tokenizer, data or base model than it has '
                              'now; restore what it was trained with:\n  ' + '\n  '.join(lines[:6]))


def _read(opened: _Opened) -> TrainedModel:
  run, workdir, mesh = opened.run, opened.workdir, jax.sharding.get_mesh()
  abstract = train.placed(jax.eval_shape(run.model.init, jax.random.key(0)), mesh)
  place = _place_of_average(opened)
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, create=False) as checkpoints:
    if place is None:
      restored = checkpoints.restore_params(abstract, opened.chosen)
      params = restored.state
    else:
      arrays = averaging.abstract_arrays(place, abstract)
      restored = checkpoints.restore_parts({'params': abstract, 'opt_state': train.placed(arrays, mesh)},
                                           opened.chosen)
      params = averaging.from_arrays(place, restored.state['opt_state'], restored.state['params'])
  model, params = lora.merged(run.model, train.with_constants(params, train.load_constants(run)))
  return TrainedModel(run, model, params, opened.tokenizer, restored.step, workdir, opened.facts)


def _place_of_average(opened: _Opened) -> list[str] | None:
  """Where the optimizer's state has an average; ValueError where what says so is not of the kind."""
  if 'run' not in opened.facts:   # of an older version: the script built the run
    return averaging.place(jax.eval_shape(lambda: train.init(opened.run).opt_state))
  place = opened.facts['run'].get('average')
  if place is not None and not averaging.is_place(place):
    raise ValueError(f'the run in {opened.workdir} cannot be opened: it has no average of the kind {place!r:.100}')
  return place


def is_run(name: str) -> bool:
  """Whether a name is the workdir of a run, and no imported model, Hugging Face folder or id on the hub."""
  return bool(records.read(pathlib.Path(name).expanduser()))


def run_or_model(workdir: pathlib.Path | None, model: str | None) -> tuple[pathlib.Path, str | None]:
  """Returns the workdir of a run, and the name of a Hugging Face model where that is meant instead.

  `model` may name the workdir of a run too. Without both, it is the workdir of the quickstart. ValueError with both.
  """
  if workdir and model:
    raise ValueError(f'--workdir={workdir} and --model={model} both name a model; give one of them')
  if model and is_run(model):
    return pathlib.Path(model).expanduser(), None
  return workdir or pathlib.Path('runs/quickstart'), model


class BaseModel(NamedTuple):
  """What to fine-tune, without its parameters, which `start(model)` gives."""
  model: Any
  tokenizer: tokenizers.Tokenizer | None   # None where none was wanted
  template: conversation.Template | None   # None: it was not made to chat
  start: Callable[[Any], Any]


def open_base(name: str, dtype: Any = None, with_tokenizer: bool = True) -> BaseModel:
  """What the workdir of a run holds, an imported model, a Hugging Face folder, or the hub under an id.

  The model computes in `dtype`; None: in that of the run, or float32. Without `with_tokenizer` the tokenizer is None,
  and a folder may lack one.

  Raises:
    FileNotFoundError: there is nothing of the kind.
    ValueError: the model has another dtype for good.
  """
  folder = pathlib.Path(name).expanduser()
  if is_run(name):
    opened = _open(folder)
    model = lora.plain(opened.run.model)
    model = model if dtype is None else model.with_dtype(dtype)
    return BaseModel(model, opened.tokenizer if with_tokenizer else None, chat_template(opened.run.data),
                     StoredResult(folder.resolve(), opened.step, opened.facts.get('parameters')))
  folder = pretrained.locate(name)
  model = pretrained.open_model(folder, jnp.float32 if dtype is None else dtype)
  tokens = pretrained.open_tokenizer(folder, model) if with_tokenizer else None
  return BaseModel(model, tokens, pretrained.folder_template(folder), pretrained.start(folder, model))


@dataclasses.dataclass(frozen=True)
class StoredResult:
  """Gives the parameters of a run's result, without a teacher's; the fields say which they are."""
  workdir: pathlib.Path
  step: int
  parameters: str | None   # their fingerprint in the checkpoint

  def __call__(self, model: Any) -> Any:
    loaded = open_trained(self.workdir)
    if loaded.step > self.step:
      raise ValueError(f'{self.workdir} has gone on from step {self.step} to {loaded.step} meanwhile; start again')
    if loaded.step < self.step:
      raise OSError(f'step {self.step} of {self.workdir} cannot be read, only step {loaded.step}; to start from that '
                    f'one, move {self.workdir}/checkpoints/{self.step} away')
    return {name: loaded.params[name] for name in jax.eval_shape(model.init, jax.random.key(0))}


KINDS = Reward, EncoderDecoder, Encoder, Transformer, MultiToken


def kind(model: Any) -> str:
  """What a model is, in words."""
  words = dict(zip(KINDS, ('a reward model', 'an encoder-decoder', 'an encoder', 'a decoder', 'a decoder')))
  return next((name for cls, name in words.items() if isinstance(model, cls)), f'of class {type(model).__name__}')


def start_from(run: train.Run, init: str, ignore_tokenizer: bool = False) -> train.Run:
  """The run from the result of a run's workdir, or from a Hugging Face or imported folder; adapters lie on it.

  Parameters are not read yet. FileNotFoundError where there is nothing of the kind, ValueError where the shapes differ,
  naming the first ones. Training refuses another tokenizer than theirs, but with `ignore_tokenizer`.
  """
  given, model = open_base(init, with_tokenizer=not ignore_tokenizer), lora.plain(run.model)
  of_lm = isinstance(given.model, KINDS) and isinstance(model, KINDS)
  if of_lm and kind(given.model) != kind(model):
    raise ValueError(f'--init={init} is {kind(given.model)}, and this run trains {kind(model)}; give another --init')
  pretrained.check_shapes(init, given.model, model)
  of_tokenizer = None if ignore_tokenizer else given.tokenizer.fingerprint
  return dataclasses.replace(lora.start_from(run, given.start), start_tokenizer=of_tokenizer)


def origin_folder(run: train.Run, tokens: tokenizers.Tokenizer) -> pathlib.Path | None:
  """The Hugging Face or imported folder that a run was started from, be it by way of other runs; None where there is
  none any more, or its tokenizer is not `tokens`."""
  start = next((c.load for c in run.constants if c.name == 'base'), run.start)
  if isinstance(start, StoredResult):
    return origin_folder(open_run(start.workdir), tokens) if records.read(start.workdir) else None
  if not isinstance(start, pretrained.Parameters) or not start.folder.is_dir():
    return None
  return start.folder if tokenizers.load(start.folder).fingerprint == tokens.fingerprint else None


def chat_template(data: Any) -> conversation.Template | None:
  """The template of a run's data, also where that is annotated; None where its data is no dialogues."""
  return data.template


def chat_tokenizer(loaded: TrainedModel | pretrained.Pretrained) -> conversation.Conversation:
  """Returns the tokenizer for a chat with a run or a folder; ValueError where it has no chat template."""
  template = (chat_template(loaded.run.data) if isinstance(loaded, TrainedModel) else
           pretrained.folder_template(loaded.folder))
  if template is None:
    raise ValueError('--chat: this model has no chat template; leave it out, or take one that was made to chat')
  return conversation.Conversation(loaded.tokenizer, template)
