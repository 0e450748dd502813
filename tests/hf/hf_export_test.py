"""A written config gives every field back, also to older releases of transformers."""
import copy
import json

import pytest
from helpers import hf_cases
from helpers.config_values import other

from lm.hf import weights
from lm.hf.config import Config
from lm.workdir.describe import describe

huggingface_hub = pytest.importorskip('huggingface_hub')
described, transformers = hf_cases.described, hf_cases.transformers
REFUSALS = (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError,
            huggingface_hub.errors.StrictDataclassError)
# Defaults of some families.
DEFAULTS = [1e-12, 1e-6, 1e-5, 1e-2, 0.25, 1., 1e4, 5e5, 1e6, True, False, 'silu', 'gelu', 'gelu_new', None]


def family_of(case):
  return weights.family_of({'architectures': [case.architecture]})


def filled(architecture, values):
  """Returns a config with all fields that its class has."""
  kind = getattr(transformers, architecture).config_class
  return json.loads(kind(**copy.deepcopy(values)).to_json_string()) | {'architectures': [architecture]}


def changes(case):
  """Yields the config of a case with one field changed at a time, to a default of another family or to a value of no
  family.
  """
  values, defaults = filled(case.architecture, case.config), filled(case.architecture, {})
  for name, value in values.items():
    if isinstance(value, dict) and isinstance(defaults.get(name), dict):
      for inner in {**value, 'partial_rotary_factor': None}:
        for new in (defaults[name].get(inner), other(value.get(inner)), *DEFAULTS):
          if not isinstance(new, dict):
            yield {**values, name: {**value, inner: new}}
    for new in (defaults.get(name), other(value), *DEFAULTS):
      if isinstance(new, type(value)) or None in (new, value):
        yield {**values, name: new}


@pytest.mark.parametrize('case', hf_cases.CASES, ids=lambda case: case.name)
def test_every_field_comes_back(case):
  family, models = family_of(case), []
  for values in changes(case):
    try:
      filled(case.architecture, values)
      model = family.model(Config(values))
    except REFUSALS:   # the value is refused by ours or by theirs
      continue
    if model in models:
      continue
    models.append(model)
    written_by, written = weights.export_config(model, [family, *weights.FAMILIES])
    sparse = any(hasattr(block.feed_forward, 'router') for block in model.layers)
    assert written_by is family or not sparse and 'Moe' in case.architecture   # Qwen 3 with no experts is Qwen 3
    expected = describe(model)
    assert described(written) == expected
    assert described(filled(written_by.architecture, written)) == expected, 'transformers reads another model'
  assert len(models) > 5


@pytest.mark.parametrize('case', [case for case in hf_cases.CASES if not case.name.startswith('GPT2')],
                         ids=lambda case: case.name)
def test_the_positions_are_written_under_older_names_too(case):
  """Older readers do not look for `rope_parameters`, and use defaults for what they do not find."""
  family = family_of(case)
  written = family.config(family.model(Config(filled(case.architecture, case.config))))
  assert written.keys() >= {'rope_parameters', 'rope_scaling'}
  older = {name: value for name, value in written.items() if name != 'rope_parameters'}
  named = {'architectures': [case.architecture]}
  if case.architecture != 'Olmo3ForCausalLM':   # older files of Olmo 3 have a single theta
    assert described(older | named) == described(written | named)
  wrong = {'rope_type': 'linear', 'factor': 3.}
  with pytest.raises(ValueError, match='rope_scaling'):
    described(written | named | {'rope_scaling': wrong})
