"""Families of Hugging Face checkpoints: `transformers` computes the same, and gets the same bytes back."""
import dataclasses
import functools
import gc
import json
import warnings

import jax
import numpy as np
import pytest

from lm.data.batches import Batch
from lm.hf import files, weights

torch = pytest.importorskip('torch')
with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  transformers = pytest.importorskip('transformers')

VOCAB = 96
LLAMA = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'num_key_value_heads': 2,
         'intermediate_size': 48, 'vocab_size': VOCAB, 'max_position_embeddings': 64}


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny model of a family: the class of `transformers`, and its config."""
  name: str
  config: dict

  @property
  def architecture(self):
    return self.name.partition('-')[0]


CASES = [
    Case('GPT2LMHeadModel', {'n_embd': 32, 'n_layer': 2, 'n_head': 4, 'n_positions': 64, 'vocab_size': VOCAB}),
    Case('LlamaForCausalLM', LLAMA),
    Case('LlamaForCausalLM-3.2', LLAMA | {'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True,
                                          'head_dim': 16, 'rope_parameters': {
        'rope_type': 'llama3', 'rope_theta': 5e3, 'factor': 8., 'low_freq_factor': 1., 'high_freq_factor': 4.,
        'original_max_position_embeddings': 16}}),
    Case('LlamaForCausalLM-linear', LLAMA | {'rope_parameters': {
        'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.}}),
    Case('LlamaForCausalLM-yarn', LLAMA | {'rope_parameters': {
        'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4., 'original_max_position_embeddings': 16}}),
]
families = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
# These programs run once: optimising them takes longer.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})
forward = jit(lambda model, params, batch: (lambda out: out.head(out.hidden))(model.apply(params, batch)),
              static_argnums=0)




def torch_model(case: Case):
  """A random one, whose parameters are all away from what they start as, and whose logits are of size one."""
  torch.manual_seed(0)
  kind = getattr(transformers, case.architecture)
  model = kind(kind.config_class(**case.config)).eval().to(torch.float32)
  model.config._attn_implementation = 'eager'
  with torch.no_grad():
    for p in model.parameters():
      if p.ndim > 1:
        p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
      else:
        p.add_(0.3 * torch.randn_like(p))
  return model


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  """(torch's model, our model, parameters, folder) of a case."""
  @functools.cache
  def make(case: Case):
    folder = tmp_path_factory.mktemp(case.name)
    theirs = torch_model(case)
    theirs.save_pretrained(folder)
    model, family = weights.open_model(folder)
    with files.Weights(folder) as found:
      params = weights.load_params(model, family, found)
    return theirs, model, params, folder
  yield make
  gc.collect()


Case.__hash__ = lambda self: hash(self.name)


def logits_of(theirs, tokens, mask=None):
  with torch.no_grad():
    positions = None if mask is None else torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    return theirs(torch.tensor(tokens).long(), attention_mask=None if mask is None else torch.tensor(mask),
                  position_ids=positions, use_cache=False).logits.numpy()


@families
def test_logits_are_those_of_transformers(opened, case):
  """On rows as long as the model can place: past windows, chunks and the original context of stretched positions."""
  theirs, model, params, _ = opened(case)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 64), np.int32)
  actual, expected = forward(model, params, Batch(tokens)), logits_of(theirs, tokens)
  assert np.std(expected) > 0.3
  assert np.abs(actual - expected).max() <= 1e-4


@families
def test_padded_and_packed_rows_are_as_if_alone(opened, case):
  theirs, model, params, _ = opened(case)
  rng = np.random.default_rng(1)
  lengths = (23, 9)
  alone = [rng.integers(0, VOCAB, (1, n), np.int32) for n in lengths]
  expected = [logits_of(theirs, tokens) for tokens in alone]
  pad = np.zeros((1, 32 - sum(lengths) + 8), np.int32)
  packed = Batch(np.concatenate([*alone, pad], axis=1),
                 segments=np.repeat([1, 2, 0], [*lengths, pad.shape[1]])[None].astype(np.int32),
                 positions=np.concatenate([np.arange(n) for n in (*lengths, pad.shape[1])])[None].astype(np.int32))
  actual = np.asarray(forward(model, params, packed))
  assert np.abs(actual[:, :23] - expected[0]).max() <= 1e-4
  assert np.abs(actual[:, 23:32] - expected[1]).max() <= 1e-4


@families
def test_cached_decoding_equals_the_full_forward(opened, case):
  _, model, params, _ = opened(case)
  tokens = np.random.default_rng(2).integers(0, VOCAB, (2, 40), np.int32)
  step = jit(lambda params, batch, cache: model.apply(params, batch, cache=cache))
  pads, slots, params_ = np.array([0, 5]), np.arange(40)[None], model.unstack(params)
  batch = Batch(np.stack([np.roll(row, pad) for row, pad in zip(tokens, pads)]),
                segments=(slots >= pads[:, None]).astype(np.int32),
                positions=np.maximum(slots - pads[:, None], 0).astype(np.int32))
  cache, logits = model.init_cache(2, 44), []
  for part in (slice(0, 30), *(slice(i, i + 1) for i in range(30, 40))):
    out = step(params_, jax.tree.map(lambda x: x[:, part], batch), cache)   # noqa: B023
    cache = out.cache
    logits.append(out.head(out.hidden))
  logits, expected = np.concatenate(logits, axis=1), np.asarray(forward(model, params, Batch(tokens)))
  for row, pad in enumerate(pads):
    assert np.abs(logits[row, pad:] - expected[row, :40 - pad]).max() <= 1e-4


@families
def test_what_goes_out_is_what_came_in(opened, case, tmp_path):
  """Byte for byte; and transformers opens it without a key missing or left over."""
  theirs, model, params, folder = opened(case)
  weights.write(tmp_path / 'out', model, params)
  with files.Weights(folder) as came, files.Weights(tmp_path / 'out') as goes:
    assert set(came) == set(goes)
    for name in came:
      assert came[name].dtype == goes[name].dtype
      np.testing.assert_array_equal(came[name], goes[name], err_msg=name)
  kind = getattr(transformers, case.architecture)
  again, info = kind.from_pretrained(tmp_path / 'out', output_loading_info=True, attn_implementation='eager')
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 64), np.int32)
  np.testing.assert_array_equal(logits_of(again, tokens), logits_of(theirs, tokens))


@families
def test_every_switch_of_a_config_matters_or_is_refused(opened, case, tmp_path):
  """A field set to another value changes the logits, or the shapes, or is refused by its name: none is ignored."""
  _, model, params, folder = opened(case)
  config = json.loads((folder / 'config.json').read_text())
  tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 64), np.int32)
  before = forward(model, params, Batch(tokens))
  for name, value in config.items():
    if name in ASIDE or name.endswith('_token_id'):
      continue
    (tmp_path / 'config.json').write_text(json.dumps(config | {name: other(name, value)}))
    try:
      changed, family = weights.open_model(tmp_path)
      with files.Weights(folder) as found:
        again = weights.load_params(changed, family, found)
      same = np.array_equal(forward(changed, again, Batch(tokens)), before)
    except (ValueError, FileNotFoundError):
      continue
    assert not same, f'{name}={other(name, value)!r} is ignored'


ASIDE = {'dtype', 'transformers_version', 'initializer_range', 'use_cache', 'attention_dropout', 'attn_pdrop',
         'embd_pdrop', 'resid_pdrop', 'model_type', 'pretraining_tp'} | {
             'summary_' + name for name in ('type', 'use_proj', 'activation', 'first_dropout', 'proj_to_labels')}


def other(name, value):
  match value:
    case bool():
      return not value
    case int():
      return value // 2 or 2
    case float():
      return value * 64
    case str():
      return {'silu': 'gelu', 'gelu_new': 'relu'}.get(value, 'another')
    case dict():
      return value | {key: other(key, v) for key, v in value.items() if isinstance(v, float)} or {'x': 1}
    case list():
      return [other(name, item) for item in value]
    case None:
      return 3
