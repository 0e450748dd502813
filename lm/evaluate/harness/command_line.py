"""Our models on the command line of lm-evaluation-harness; each of its values is obeyed or refused."""
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.data.text import source
from lm.evaluate.harness.adapter import client_class

# Values that the harness's command line passes where the flag is not given, or that choose what is done here anyway.
_DEFAULTS = {'batch_size': (1, '1', 'auto'), 'max_batch_size': (), 'device': ('cuda:0',)}


def register(name: str, open_client: Callable[..., Any], command: Sequence[str] = ()) -> None:
  """Makes `--model=name` of the harness's command line call `open_client` with the values of `--model_args`.

  Raises ValueError for a device in the words of the `command`, since the harness gives it a default that looks as if it
  was given; and, when the model is opened, for a batch size, a device, or a value that `open_client` does not take or
  that is not of the type that it declares.
  """
  reasons = {'batch_size': 'the number of rows follows from the length of the texts, and scores do not depend on it',
             'max_batch_size': 'the number of rows follows from the length of the texts',
             'device': 'the model is on all devices of JAX, which JAX_PLATFORMS and mesh=... of --model_args choose'}
  for word in command:
    if len(word) > 2 and '--device'.startswith(word.split('=')[0]):   # its parser takes beginnings of names
      raise ValueError(f'{word} is not needed: {reasons["device"]}; leave it out')

  def create(cls: type, values: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Any:
    del cls
    for setting, value in (settings or {}).items():
      if value not in (None, *_DEFAULTS[setting]):
        raise ValueError(f'--{setting}={value} is not needed: {reasons[setting]}; leave it out')
    parameters = inspect.signature(open_client).parameters
    if unknown := [setting for setting in values if setting not in parameters]:
      raise ValueError(f'--model_args has {unknown[0]}={values[unknown[0]]}, which is no setting of --model {name}; '
                       f'leave it out, or give one of {", ".join(parameters)}')
    for setting, value in values.items():
      kind = parameters[setting].annotation
      if not isinstance(value, kind):
        advice = 'True or False' if kind is bool else f'text in quotes, \'"{value}"\''
        raise ValueError(f'--model_args has {setting}={value}, and what is needed is '
                         f'{getattr(kind, "__name__", kind)}; give {advice}')
    return open_client(**values)
  cls = client_class({'create_from_arg_obj': classmethod(create)})
  source.require('lm_eval.api.registry', 'eval').register_model(name)(cls)
