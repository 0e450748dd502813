"""Mixtures of experts are those of `transformers`."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.experts import EXPERTS, HIDDEN, KINDS, ROWS, TIME, WIDTH

from lm import sharding
from lm.models import attention, layers, moe
from lm.models.context import Context

# These programs are run once or twice: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})
CONTEXT = Context(None, attention.Visible())


def shapes(module):
  x = jnp.zeros((ROWS, 1, WIDTH))
  return jax.eval_shape(lambda: module.init(jax.random.key(0), sharding.constrain(x, 'BTD'), CONTEXT)['params'])


def inputs(seed=1):
  return np.random.default_rng(seed).normal(size=(2, ROWS, TIME, WIDTH)).astype('f4')


def parity(theirs, module, params, tensors, output=lambda out: out):
  """Asserts that both modules give the same output for the same x and the same random weights."""
  import torch
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for tensor in theirs.state_dict().values():
      tensor.copy_(torch.from_numpy(np.asarray(rng.normal(size=tuple(tensor.shape)) * 0.3)))
  x = inputs()[0]
  with torch.no_grad():
    expected = output(theirs.eval()(torch.from_numpy(x))).numpy().reshape(x.shape)
  params = params(**{name: theirs.state_dict()[key].numpy() for name, key in tensors.items()})
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes(module))
  assert 0.1 < np.abs(expected).max() < 30
  actual = jit(lambda p: module.apply({'params': p}, jnp.asarray(x), CONTEXT)[0])(params)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def halves(gate_up):
  """Splits torch's [E, 2F, D] into two [E, D, F]."""
  gate, up = np.split(gate_up.swapaxes(1, 2), 2, axis=-1)
  return {'gate': gate, 'up': up}


def linear(gate, up, down):
  return {'gate': gate.T, 'up': up.T, 'down': down.T}


STACKED = {'gate_up': 'experts.gate_up_proj', 'down': 'experts.down_proj'}


def shared_tensors(name):
  return {'s_' + n: f'{name}.{n}_proj.weight' for n in ('gate', 'up', 'down')}


@pytest.fixture
def hf():
  pytest.importorskip('torch')
  return pytest.importorskip('transformers')


@pytest.mark.filterwarnings('default')
def test_mixtral_is_that_of_transformers(hf):
  from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Theirs
  config = hf.MixtralConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS,
                            num_experts_per_tok=2)
  config._experts_implementation = 'eager'
  parity(Theirs(config), KINDS['mixtral'], lambda router, gate_up, down: {
      'router': {'router': router.T}, **halves(gate_up), 'down': down.swapaxes(1, 2)},
         {'router': 'gate.weight', **STACKED})


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('renormalize', [False, True])
def test_qwen3_moe_is_that_of_transformers(hf, renormalize):
  from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Theirs
  config = hf.Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=HIDDEN, num_experts=EXPERTS,
                             num_experts_per_tok=3, norm_topk_prob=renormalize)
  config._experts_implementation = 'eager'
  parity(Theirs(config), moe.Experts(moe.SoftmaxRouter(3, renormalize), EXPERTS, HIDDEN),
         lambda router, gate_up, down: {'router': {'router': router.T}, **halves(gate_up),
                                        'down': down.swapaxes(1, 2)},
         {'router': 'gate.weight', **STACKED})


@pytest.mark.filterwarnings('default')
def test_qwen2_moe_is_that_of_transformers(hf):
  from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock as Theirs
  config = hf.Qwen2MoeConfig(hidden_size=WIDTH, moe_intermediate_size=HIDDEN, shared_expert_intermediate_size=16,
                             num_experts=EXPERTS, num_experts_per_tok=4, norm_topk_prob=False)
  config._experts_implementation = 'eager'
  parity(Theirs(config), KINDS['qwen2'], lambda router, gate_up, down, s_gate, s_up, s_down, gate: {
      'router': {'router': router.T}, **halves(gate_up), 'down': down.swapaxes(1, 2), 'shared_gate': gate.T,
      'shared': linear(s_gate, s_up, s_down)},
         {'router': 'gate.weight', 'gate': 'shared_expert_gate.weight', **STACKED, **shared_tensors('shared_expert')})


@pytest.mark.filterwarnings('default')
def test_gpt_oss_is_that_of_transformers(hf):
  from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP as Theirs
  config = hf.GptOssConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS,
                           num_experts_per_tok=3)
  config._experts_implementation = 'eager'
  parity(Theirs(config), KINDS['gpt_oss'].clone(activation=moe.ClampedGated()),
         lambda router, router_bias, gate_up, gate_up_bias, down, down_bias: {
             'router': {'router': router.T, 'router_bias': router_bias}, 'gate': gate_up[..., ::2],
             'up': gate_up[..., 1::2], 'gate_bias': gate_up_bias[..., ::2], 'up_bias': gate_up_bias[..., 1::2],
             'down': down, 'down_bias': down_bias},
         {'router': 'router.weight', 'router_bias': 'router.bias', **STACKED,
          'gate_up_bias': 'experts.gate_up_proj_bias', 'down_bias': 'experts.down_proj_bias'}, lambda out: out[0])


@pytest.mark.filterwarnings('default')
def test_deepseek_v3_is_that_of_transformers(hf):
  from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE as Theirs
  config = hf.DeepseekV3Config(hidden_size=WIDTH, moe_intermediate_size=HIDDEN, n_shared_experts=2,
                               n_routed_experts=EXPERTS, num_experts_per_tok=3, n_group=4, topk_group=2)
  config._experts_implementation = 'eager'
  parity(Theirs(config), KINDS['deepseek'].clone(shared=layers.FeedForward(2 * HIDDEN)),
         lambda router, correction, gate_up, down, s_gate, s_up, s_down: {
             'router': {'router': router.T, 'correction': correction}, **halves(gate_up),
             'down': down.swapaxes(1, 2), 'shared': linear(s_gate, s_up, s_down)},
         {'router': 'gate.weight', 'correction': 'gate.e_score_correction_bias', **STACKED,
          **shared_tensors('shared_experts')})


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('top_k', [1, 2])
def test_llama4_is_that_of_transformers(hf, top_k):
  from transformers.models.llama4.modeling_llama4 import Llama4TextMoe as Theirs
  config = hf.Llama4TextConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS,
                               num_experts_per_tok=top_k)
  parity(Theirs(config), KINDS['llama4'].clone(router=moe.SigmoidRouter(top_k), shared=layers.FeedForward(HIDDEN)),
         lambda router, gate_up, down, s_gate, s_up, s_down: {
             'router': {'router': router.T}, 'gate': gate_up[..., :HIDDEN], 'up': gate_up[..., HIDDEN:],
             'down': down, 'shared': linear(s_gate, s_up, s_down)},
         {'router': 'router.weight', **STACKED, **shared_tensors('shared_expert')}, lambda out: out[0])
