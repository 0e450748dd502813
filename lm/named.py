"""Models that flags name. They are opened when the run of an experiment is built, see `train.after_opening`."""
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lm import load, lora, paths
from lm.hf import pretrained
from lm.load import BaseModel
from lm.models import Encoder, EncoderDecoder, MultiToken, Reward, Transformer, kinds
from lm.models.quantized_decoder import check_weights, with_rounded_weights
from lm.objectives.objective import causal_prompt
from lm.train import interfaces

DECODER = 'a decoder, such as GPT-2 or Llama'
_EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / 'experiments'


@dataclasses.dataclass(frozen=True)
class Named:
  """A model that a flag names, without its parameters.

  Args:
    flag: the flag, such as --model.
    name: its value: the workdir of a run, a Hugging Face folder, an imported one or an id on the hub.
    accepts: returns whether a model is of the kind that the flag needs.
    kind: that kind in words, such as 'a decoder, such as GPT-2 or Llama'.
    dtype: the type of activations; None for that of the run, or float32.
    with_tokenizer: whether the tokenizer is opened too; a folder may lack one otherwise.
  """
  flag: str
  name: str
  accepts: Callable[[Any], bool]
  kind: str
  dtype: Any = None
  with_tokenizer: bool = True

  def open(self) -> BaseModel:
    """Opens the model. Raises FileNotFoundError where it does not exist, ValueError where it is of another kind."""
    flag, folder = f'{self.flag}={self.name}', pathlib.Path(self.name)
    script = _EXPERIMENTS / f'{folder.name}.py'
    if folder.parts[:-1] == ('runs',) and script.is_file() and not (folder / 'run.json').is_file():
      raise FileNotFoundError(f'{flag} is not there; make it with "python experiments/{script.name}", or give another '
                              f'{self.flag}')
    base = load.open_base(self.name, self.dtype, self.with_tokenizer)
    if not self.accepts(base.model):
      raise ValueError(f'{flag} is {kinds.in_words(base.model)}, and what is needed is {self.kind}; give another '
                       f'{self.flag}')
    return base


def decoder(flag: str, name: str, dtype: Any = None) -> Named:
  """Returns a named decoder of any class."""
  return Named(flag, name, _is_decoder, DECODER, dtype)


def encoder(flag: str, name: str) -> Named:
  """Returns a named encoder."""
  return Named(flag, name, lambda model: isinstance(model, Encoder), 'an encoder, such as BERT')


def encoder_decoder(flag: str, name: str) -> Named:
  """Returns a named encoder-decoder."""
  return Named(flag, name, lambda model: isinstance(model, EncoderDecoder), 'an encoder-decoder, such as T5')


def decoder_to_train(model: str | None, init: Any, shape: Mapping[str, Any], vocabulary: Mapping[str, Any],
                     dtype: Any) -> Named | None:
  """Returns the decoder that `--model` or else `--init` names, which may predict further tokens; None without both.

  `shape` and `vocabulary` are the explicit values of the flags of a shape and of a tokenizer.

  Raises:
    ValueError: there are such values beside `--model`, which decides on both.
  """
  if not model and not init:
    return None
  flag, name = ('--model', model) if model else ('--init', str(init))
  flags = {**shape, **vocabulary}
  if model and flags:
    other, value = next(iter(flags.items()))
    raise ValueError(f'--model={model} gives the shape and the tokenizer, and --{other}={value} is given too; leave '
                     'one of them out')
  return Named(flag, name, lambda model: isinstance(trunk(model), Transformer), DECODER, dtype, not vocabulary)


def trunk(model: Any) -> Any:
  """Returns the decoder of a model that predicts further tokens, and any other model as it is."""
  return model.trunk if isinstance(model, MultiToken) else model


def _is_decoder(model: Any) -> bool:
  return isinstance(model, interfaces.Decoder) and not isinstance(model, EncoderDecoder)


def adapters(flags: Sequence[str], model: str, own_name: str, best: bool = False) -> dict[str, load.StoredRun]:
  """Opens the runs of adapters that `--adapters=name=workdir,...` names beside `--model`, without their parameters.

  `own_name` is how clients name the model itself, and `best` the value of `--best`.

  Raises:
    FileNotFoundError: a folder holds no run.
    ValueError: a flag has another form, a name stands twice, `best` is true, or a run does not train adapters of this
      model, with its tokenizer, which rows of one batch can choose and which write after any prompt.
  """
  if flags and best:
    raise ValueError('--best may choose another checkpoint than that which --adapters were trained on; leave it out')
  stored: dict[str, load.StoredRun] = {}
  base = load.open_base(model) if flags else None
  for flag in flags:
    name, equals, workdir = flag.partition('=')
    if not name or not equals or not workdir or name in (*stored, own_name):
      raise ValueError(f'--adapters={flag} must be a name that no other model has, = and a workdir, such as '
                       'sql=runs/sql')
    run = load.open_stored(paths.local(workdir))
    adapted = run.run.model
    if not isinstance(adapted, lora.Adapted):
      raise ValueError(f'--adapters={flag}: {workdir} does not train adapters, which --lora_rank makes; serve it as '
                       '--model')
    start = next(constant.load for constant in run.run.constants if constant.name == 'base')
    parameters = getattr(start, 'parameters', None)
    if parameters is None or parameters != base.start.parameters:
      raise ValueError(f'--adapters={flag}: its adapters were trained on other parameters than those of '
                       f'--model={model}; give the model that {workdir} started from')
    if run.tokenizer.fingerprint != base.tokenizer.fingerprint or run.run.objective.prompt is not causal_prompt:
      raise ValueError(f'--adapters={flag}: {workdir} has another tokenizer than --model={model}, or does not write '
                       'after any prompt; serve it as --model')
    lora.check_row_adapters(base.model, adapted)
    stored[name] = run
  return stored


def to_serve(model: str, best: bool, weights: str, stored: Sequence[load.StoredRun] = ()) -> tuple[Any, Any, Any, Any]:
  """Returns the model of --model, its parameters, its tokenizer and its chat template, None where it has none.

  The parameters are unstacked, rounded to `weights`, and have the adapters of `stored` beside them, numbered from 1 on.
  Raises ValueError for a model that does not write after any prompt, or cannot have these weights.
  """
  workdir, folder = load.run_or_model(None, model, best)
  check = functools.partial(check_weights, dtype=weights)
  loaded = pretrained.load(folder, check=check) if folder else load.open_trained(workdir, best, check)
  prompt = causal_prompt if folder else loaded.run.objective.prompt
  decoder = loaded.model
  if isinstance(decoder, Reward) or not decoder.causal or prompt is not causal_prompt:
    raise ValueError(f'--model={model} is {kinds.in_words(decoder)} that does not write from left to right after any '
                     'prompt; give a decoder that was trained to')
  # The stacked parameters end with this function, so that there is one copy.
  template = None if decoder.reads_source else load.chat_template(loaded)
  params = with_rounded_weights(decoder, loaded.params, weights)
  layout = jax.tree.leaves(params)[0].sharding
  params = lora.with_row_adapters(params, [(each.run.model, load.read_params(each)[0]) for each in stored])
  if weights != 'float32':   # rounded weights are read by programs without a mesh, and adapters beside them too
    params = jax.device_put(params, layout)
  return decoder, decoder.unstack(params), loaded.tokenizer, template
