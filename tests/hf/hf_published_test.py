"""Models open from the configs with which they are published; no field is unknown, and none is ignored."""
import json
import math

import jax
import pytest
from helpers.published_configs import CONFIGS, PUBLISHED

from lm.hf import weights


def opened(values, folder):
  (folder / 'config.json').write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
  return weights.open_model(folder)[0]


@pytest.mark.parametrize('name', CONFIGS)
def test_a_published_config_is_read(name, tmp_path):
  opened(CONFIGS[name][0], tmp_path)


FIRST = {next(iter(models)) for _, models in PUBLISHED.values()}   # the first model of each family; others are slow


@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow)
                                  for name, (_, count) in CONFIGS.items() if count is not None])
def test_a_published_config_gives_the_published_number_of_parameters(name, tmp_path):
  values, count = CONFIGS[name]
  model = opened(values, tmp_path)
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count


def test_every_family_is_in_the_table():
  """Multimodal families stand for their language models, where these are not published alone."""
  missing = {family.architecture for family in weights.FAMILIES} - PUBLISHED.keys()
  assert missing == {'Llama4ForCausalLM', 'RemBertForSequenceClassification'}   # no RemBERT with one label is known
  few = {family for family, (_, models) in PUBLISHED.items() if len(models) < 5}
  # These families have no further models, or scorers of pairs with no other fields.
  assert few == {'Qwen2MoeForCausalLM', 'SmolLM3ForCausalLM', 'BertForSequenceClassification',
                 'BleurtForSequenceClassification'}


@pytest.mark.parametrize('name, field, value', [
    ('SmolLM2-135M', 'rope_interleaved', True), ('SmolLM2-135M', 'is_llama_config', False),
    ('Falcon3-1B-Base', 'activation', 'gelu'), ('Qwen2.5-0.5B', 'use_mrope', True), ('gpt2-medium', 'n_special', 3),
    ('gemma-2-9b', 'sliding_window_size', 1024), ('Qwen3-Coder-30B-A3B-Instruct', 'use_qk_norm', False),
    ('Qwen3-Coder-30B-A3B-Instruct', 'shared_expert_intermediate_size', 512), ('Qwen2.5-7B', 'use_qk_norm', True),
    ('Llama-2-7b-hf', 'pretraining_tp', 0), ('bert-base-cased', 'pruned_heads', {'0': [1]}),
    ('Qwen2.5-7B', 'dual_chunk_attention_config', {'chunk_size': 262144}), ('t5-small', 'scalable_attention', True)])
def test_a_field_that_could_change_a_number_is_refused(name, field, value, tmp_path):
  with pytest.raises(ValueError, match=field):
    opened(CONFIGS[name][0] | {field: value}, tmp_path)


def test_fields_that_nothing_reads_are_noted_in_one_line(caplog, tmp_path):
  for _ in range(2):   # once, though the config is read several times
    opened(CONFIGS['SmolLM2-135M'][0], tmp_path)
  note, = (record.getMessage() for record in caplog.records if str(tmp_path) in record.getMessage())
  assert 'is_llama_config=True, rope_interleaved=False' in note and '\n' not in note
