"""The gradients of the mean next-token loss by every tensor of a file equal those of torch."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hf_cases
from helpers.hf_rows import jit, random_tokens

from lm.data.batch import Batch
from lm.hf import files, weights

torch = pytest.importorskip('torch')

# Relative to the largest entry of a tensor's gradient, in float32.
TOLERANCE = 1e-5
CASES = [case for case in hf_cases.CASES if case.name in (
    'GPT2LMHeadModel', 'LlamaForCausalLM', 'LlamaForCausalLM-3.2', 'Gemma3ForCausalLM', 'DeepseekV3ForCausalLM',
    'DeepseekV3ForCausalLM-plain', 'Llama4ForCausalLM')]


def loss(params, model, tokens):
  out = model.apply(params, Batch(tokens))
  logits = jax.nn.log_softmax(out.head(out.hidden)[:, :-1])
  return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))


def their_gradients(theirs, tokens, folder):
  """Returns torch's gradients under the names of a file, by saving the model with its gradients as weights."""
  tokens = torch.tensor(tokens).long()
  logits = theirs(tokens, use_cache=False).logits[:, :-1]
  mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
  mean.backward()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.copy_(parameter.grad)
    for name, buffer in theirs.named_buffers():
      if name.endswith('e_score_correction_bias'):   # it only affects the choice of experts
        buffer.zero_()
  theirs.save_pretrained(folder)
  return mean.item()


@pytest.mark.parametrize('case', [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name != 'LlamaForCausalLM')) for case in CASES])
def test_gradients_of_all_tensors_are_those_of_torch(case, tmp_path):
  theirs, tokens = hf_cases.torch_model(case), random_tokens(2, 64)
  theirs.save_pretrained(tmp_path / 'model')
  expected_loss = their_gradients(theirs, tokens, tmp_path / 'gradients')
  model, family = weights.open_model(tmp_path / 'model')
  with files.Weights(tmp_path / 'model') as stored:
    params = weights.load_params(model, family, stored)
  value, gradients = jit(jax.value_and_grad(loss), static_argnums=1)(params, model, tokens)
  assert abs(value - expected_loss) < 1e-5
  actual = weights.tensors(model, family, gradients)
  with files.Weights(tmp_path / 'gradients') as expected:
    assert set(actual) == set(expected)
    for name, (_, _, give) in actual.items():
      largest = np.abs(expected[name]).max()
      assert largest > 1e-4 or name.endswith('e_score_correction_bias'), name
      assert np.abs(give() - expected[name]).max() <= TOLERANCE * largest, name
