"""For each family of Hugging Face checkpoints, `transformers` computes the same, and gets the same bytes back."""
import gc
import inspect
import json

import jax
import numpy as np
import pytest
from helpers import hf_cases
from helpers.hf_rows import assert_small, forward, jit, mean_loss, random_tokens, rows

from lm.data.batch import Batch
from lm.hf import files, weights
from lm.hf.config import Config
from lm.workdir.describe import describe

CASES, described, logits_of = hf_cases.CASES, hf_cases.described, hf_cases.logits_of
transformers = hf_cases.transformers
FAST = 'LlamaForCausalLM', 'Gemma3ForCausalLM'


def families(longest):
  """Returns the parametrisation by cases: a few are fast, the others slow; those that `longest` selects are long."""
  return pytest.mark.parametrize('case', [
      pytest.param(case, id=case.name, marks=[*[pytest.mark.slow] * (case.name not in FAST),
                                              *[pytest.mark.long] * longest(case)]) for case in CASES])


every_case = families(lambda case: False)
# What does not depend on the reading of configs is shown by one case of each family, and by all in the long tests.
first_cases = families(lambda case: '-' in case.name)


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  yield hf_cases.opener(tmp_path_factory.mktemp)
  gc.collect()


@every_case
def test_logits_are_those_of_transformers(opened, case, record_property):
  """The rows are as long as the model allows: past windows, chunks, and the original context of stretched positions."""
  theirs, model, params, _ = opened(case)
  tokens = random_tokens(2, 64)
  actual, expected = forward(model, params, rows(tokens[:1], tokens[1:])), logits_of(theirs, tokens)
  assert np.std(expected) > 0.3
  assert_small(record_property, case.architecture, 'logits', actual - expected)
  labels = hf_cases.torch.tensor(tokens).long()
  with hf_cases.torch.no_grad():
    loss = theirs(labels, labels=labels).loss.item()
  assert_small(record_property, case.architecture, 'loss', mean_loss(actual, tokens) - loss, bound=1e-5)


@first_cases
def test_padded_and_packed_rows_are_as_if_alone(opened, case, record_property):
  theirs, model, params, _ = opened(case)
  a, b, c = (random_tokens(n, seed=n) for n in (33, 9, 17))   # only the first exceeds the original context
  logits = np.asarray(forward(model, params, rows([a, b], [c], pads=(0, 5))))
  for document, actual in ((a, logits[0, :33]), (b, logits[0, 33:42]), (c, logits[1, 5:22])):
    assert_small(record_property, case.architecture, 'packed', actual - logits_of(theirs, document[None])[0])


@first_cases
def test_cached_decoding_equals_the_full_forward(opened, case, record_property):
  _, model, params, _ = opened(case)
  a, b = (random_tokens(n, seed=n) for n in (40, 20))
  pads, params_ = (0, 20), model.unstack(params)
  batch = rows([a], [b], pads=pads)
  step = jit(lambda params, batch, cache: model.apply(params, batch, cache=cache))
  cache, logits = model.init_cache(2, 44), []
  for part in (slice(0, 30), *(slice(i, i + 1) for i in range(30, 40))):
    out = step(params_, jax.tree.map(lambda x, part=part: x[:, part], batch), cache)
    cache = out.cache
    logits.append(out.head(out.hidden))
  logits, expected = np.concatenate(logits, axis=1), np.asarray(forward(model, params, rows([a], [b])))
  for row, pad in enumerate(pads):
    assert_small(record_property, case.architecture, 'cached', logits[row, pad:] - expected[row, :40 - pad])


@every_case
def test_exported_files_are_the_imported_ones(opened, case, record_property, tmp_path):
  """Byte for byte; and transformers opens the export with no key missing or unexpected."""
  theirs, model, params, folder = opened(case)
  own = [family for family in weights.FAMILIES if family.architecture == case.architecture]
  weights.write(tmp_path / 'out', model, params, own)
  with files.Weights(folder) as came, files.Weights(tmp_path / 'out') as goes:
    assert set(came) == set(goes)
    for name in came:
      assert came[name].dtype == goes[name].dtype
      np.testing.assert_array_equal(came[name], goes[name], err_msg=name)
  kind = getattr(transformers, case.architecture)
  again, info = kind.from_pretrained(tmp_path / 'out', output_loading_info=True, attn_implementation='eager')
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  np.testing.assert_array_equal(logits_of(again, random_tokens(2, 64)), logits_of(theirs, random_tokens(2, 64)))
  record_property(case.architecture + '/back', 'same')
  family, values = weights.export_config(model)   # possibly another family that computes the same
  assert describe(family.model(Config(values))) == describe(model)


@pytest.mark.slow
def test_a_text_that_outgrows_the_original_context_in_a_cache_goes_on_as_in_transformers(opened):
  """Later tokens use the other factors, and the keys in the cache stay as they are."""
  theirs, model, params, _ = opened(next(case for case in CASES if case.name == 'Phi3ForCausalLM'))
  tokens, cache, step = random_tokens(1, 30), model.init_cache(1, 32), jit(model.apply)
  # The argument is called `cache` from version 5.24 on, and `past_key_values` before.
  name = 'cache' if 'cache' in inspect.signature(theirs.forward).parameters else 'past_key_values'
  options = {'use_cache': True, name: transformers.DynamicCache(config=theirs.config)}
  for part in (slice(0, 20), *(slice(i, i + 1) for i in range(20, 30))):
    out = step(params, Batch(tokens[:, part]), cache=cache)
    with hf_cases.torch.no_grad():
      expected = theirs(hf_cases.torch.tensor(tokens[:, part]).long(), **options).logits.numpy()
    cache = out.cache
    assert np.abs(out.head(out.hidden) - expected).max() <= 1e-4
  whole = np.asarray(forward(model, params, rows([tokens[0]], [])))[0, 20:30]
  assert np.abs(out.head(out.hidden)[0, -1] - whole[-1]).max() > 1e-3   # a text read at once gives other logits


VISION = {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 16,
          'image_size': 28, 'patch_size': 14}
WITH_IMAGES = {
    'Gemma3': {'text_config': hf_cases.GEMMA3, 'vision_config': VISION | {'vision_use_head': False},
               'mm_tokens_per_image': 4},
    'Llama4': {'text_config': hf_cases.LLAMA4 | {'interleave_moe_layer_step': 2}, 'vision_config': VISION | {
        'vision_output_dim': 16, 'projector_input_dim': 16, 'projector_output_dim': 16}}}


@pytest.mark.parametrize('kind', WITH_IMAGES)
def test_of_multimodal_models_the_language_model_is_read(kind, tmp_path):
  """It is written as a language model. A folder may leave out sizes that are the defaults of the class."""
  config = getattr(transformers, kind + 'Config')(
      **WITH_IMAGES[kind], image_token_index=95, boi_token_index=93, eoi_token_index=94)
  theirs = hf_cases.torch_model(hf_cases.Case(kind + 'ForConditionalGeneration', config))
  theirs.save_pretrained(tmp_path / 'in')
  model, family = weights.open_model(tmp_path / 'in')
  with files.Weights(tmp_path / 'in') as stored:
    params = weights.load_params(model, family, stored)
  tokens = random_tokens(2, 64) % 90
  # The full Llama 4 model without images fails in transformers 5.24.
  expected = logits_of(theirs.language_model if kind == 'Llama4' else theirs, tokens)
  assert np.abs(forward(model, params, rows(tokens[:1], tokens[1:])) - expected).max() <= 1e-4
  weights.write(tmp_path / 'out', model, params)
  alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager')
  assert type(alone) is getattr(transformers, kind + 'ForCausalLM')
  np.testing.assert_array_equal(logits_of(alone, tokens), expected)


def test_a_multimodal_config_may_leave_out_the_defaults_of_its_class():
  for kind in WITH_IMAGES:
    text = json.loads(getattr(transformers, kind + 'TextConfig')().to_json_string())
    named = {'architectures': [kind + 'ForConditionalGeneration']}
    assert described(named | {'text_config': {}}) == described(named | {'text_config': text})


@pytest.mark.slow
def test_layers_of_deepseek_that_predict_further_tokens_are_left_out(opened, tmp_path):
  """The files of V3 and R1 have them. A further layer is refused, and so are experts of unequal shapes."""
  _, model, params, folder = opened(next(case for case in CASES if case.name == 'DeepseekV3ForCausalLM'))
  further = 'model.layers.61.'

  def load(name, change):
    with files.Weights(folder) as stored:
      tensors = {key: (w.shape, w.dtype, lambda w=w: w) for key, w in change(dict(stored)).items()}
      files.write(tmp_path / name, tensors)
    model, family = weights.open_model(folder)
    with files.Weights(tmp_path / name) as stored:
      return weights.load_params(model, family, stored)

  own = load('further', lambda stored: stored | {
      further + name.removeprefix('model.layers.2.'): w for name, w in stored.items() if '.2.' in name} | {
          further + name: stored['model.norm.weight'] for name in (
              'enorm.weight', 'hnorm.weight', 'shared_head.norm.weight', 'eh_proj.weight', 'embed_tokens.weight')})
  assert jax.tree.all(jax.tree.map(np.array_equal, own, params))
  expert = 'model.layers.2.mlp.experts.5.up_proj.weight'
  for name, change, message in (
      ('more', lambda stored: stored | {further.replace('61', '3') + 'mlp.gate.weight': stored[expert]}, 'not weights'),
      ('missing', lambda stored: {key: w for key, w in stored.items() if key != expert}, f'{expert} is missing'),
      ('odd', lambda stored: stored | {expert: stored[expert][1:]}, r'\(11, 32\) make .* where the config gives')):
    with pytest.raises(ValueError, match=message):
      load(name, change)
