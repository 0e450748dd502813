"""Each part of a model matters: if one is exchanged, the logits differ from those of `transformers`."""
import dataclasses
import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hf_cases
from helpers.hf_rows import random_tokens, rows

from lm.hf import gpt_neox
from lm.models import attention as attend
from lm.models import latent, moe
from lm.models import layers as parts
from lm.models.rotary import LongRope, Rotary, Yarn
from lm.models.stack import Stack
from lm.models.transformer import Transformer
from lm.workdir.describe import describe

CASES, logits_of = hf_cases.CASES, hf_cases.logits_of


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  yield hf_cases.opener(tmp_path_factory.mktemp)
  gc.collect()


def replaced(kind, change):
  """Returns the model with the fields of parts of `kind` that `change` gives. A falsy change leaves a part alone."""
  def apply(part):
    fields = change(part) if isinstance(part, kind) else None
    return part if not fields else part.clone(**fields) if isinstance(part, nn.Module) else (
        dataclasses.replace(part, **fields))
  return apply


def swapped(block):
  other = {parts.Block: parts.ParallelBlock, parts.ParallelBlock: parts.Block}.get(type(block))
  if other is None or getattr(block, 'attention_norm', None) is None:
    return block
  return other(block.attention, block.feed_forward, block.attention_norm, block.feed_forward_norm)


def moved(block):
  """Returns the model with norms after their branch instead of before it, or the other way; of both, the one before
  stays.
  """
  if not isinstance(block, parts.Block):
    return block
  before = block.attention_norm, block.feed_forward_norm
  after = block.attention_out_norm, block.feed_forward_out_norm
  both = None not in before + after
  return parts.Block(block.attention, block.feed_forward, *(before if both else after),
                     *((None, None) if both else before))


def turned(model):
  """Returns the model in which each layer has the attention of the next."""
  blocks = [stack.pattern[0] for stack in model.blocks]
  return {'blocks': tuple(Stack((block.clone(attention=other.attention),), 1)
                          for block, other in zip(blocks, (*blocks[1:], blocks[0])))}


WRONG = {
    'a window longer by one': replaced(attend.AttentionScores, lambda s: s.window and {'window': s.window + 1}),
    'a window shorter by one': replaced(attend.AttentionScores, lambda s: s.window and {'window': s.window - 1}),
    'another scale': replaced(attend.AttentionScores, lambda s: {'scale': (s.scale or 0.3) * 1.1}),
    'no soft cap': replaced((attend.AttentionScores, Transformer), lambda s: s.softcap and {'softcap': None}),
    'another theta': replaced(Rotary, lambda r: {'theta': r.theta * 1.1}),
    'neighbours as pairs': replaced(Rotary, lambda r: {'interleaved': True}),
    'all of a head turns': replaced(
        Rotary, lambda r: r.size and not isinstance(r.scaling, LongRope) and {'size': None}),
    'no stretched positions': replaced(Rotary, lambda r: r.scaling and {'scaling': None}),
    'cosines of size one': replaced((Yarn, LongRope), lambda s: {'attention': 1.}),
    'no positions': replaced(attend.Attention, lambda a: a.rotary and {'rotary': None}),
    'positions on all layers': replaced(attend.Attention, lambda a: not a.rotary and {'rotary': Rotary()}),
    'no bias': replaced((attend.Attention, parts.FeedForward, moe.Experts), lambda a: a.bias and {'bias': False}),
    'an output bias more or less': replaced(attend.Attention, lambda a: a.bias and {'out_bias': a.out_bias is False}),
    'no norm of queries': replaced((attend.Attention, latent.LatentAttention),
                                   lambda a: a.query_norm and {'query_norm': None}),
    'no norm of keys': replaced(attend.Attention, lambda a: a.key_norm and {'key_norm': None}),
    'norms after the rotation': replaced(attend.Attention, lambda a: a.query_norm and {'norms_last': True}),
    'another offset': replaced(parts.RMSNorm, lambda n: {'offset': 1 - n.offset}),
    'another epsilon': replaced((parts.RMSNorm, parts.LayerNorm), lambda n: {'eps': 0.01}),
    'another activation': replaced(parts.FeedForward, lambda f: {'activation': {
        parts.silu_gated: parts.gelu_gated, parts.gelu_gated: parts.silu_gated, jax.nn.gelu: gpt_neox.erf_gelu,
        gpt_neox.erf_gelu: jax.nn.gelu}[f.activation]}),
    'no bias of the router': replaced(moe.SoftmaxRouter, lambda r: r.bias and {'bias': False}),
    'weights that sum to one, or not': replaced(moe.SoftmaxRouter, lambda r: {'renormalize': not r.renormalize}),
    'an expert less for a token': replaced(moe.SoftmaxRouter, lambda r: {'top_k': r.top_k - 1}),
    'another limit': replaced(moe.ClampedGated, lambda a: {'limit': a.limit * 1.1}),
    'another slope': replaced(moe.ClampedGated, lambda a: {'alpha': a.alpha * 1.1}),
    'no sinks': replaced(attend.Attention, lambda a: a.sinks and {'sinks': False}),
    'no gate of the shared expert': replaced(moe.Experts, lambda e: e.shared_gate and {'shared_gate': False}),
    'no shared expert': replaced(moe.Experts, lambda e: e.shared and {'shared': None, 'shared_gate': False}),
    'side by side, or in turn': swapped,
    'norms elsewhere': moved,
    'attention of other layers': replaced(Transformer, turned),
    'another head': replaced(Transformer, lambda m: {'tied': not m.tied}),
    'no norm of the latent': replaced(latent.LatentAttention, lambda a: {'key_value_norm': None}),
    'no bias of the latents': replaced(latent.LatentAttention, lambda a: a.bias and {'bias': False}),
    'no temperature': replaced(attend.Attention, lambda a: a.temperature and {'temperature': None}),
    'a temperature one position later': replaced(attend.Temperature, lambda t: {'floor': t.floor + 1}),
    'a chunk longer by one': replaced(attend.AttentionScores, lambda s: s.chunk and {'chunk': s.chunk + 1}),
    'a window for chunks': replaced(attend.AttentionScores, lambda s: s.chunk and {'window': s.chunk, 'chunk': None}),
    'an expert less': replaced((moe.SigmoidRouter, moe.SigmoidGroupRouter),
                               lambda r: r.top_k > 1 and {'top_k': r.top_k - 1}),
    'all groups': replaced(moe.SigmoidGroupRouter, lambda r: r.groups > 1 and {'groups': 1, 'top_groups': 1}),
    'a group more': replaced(moe.SigmoidGroupRouter,
                             lambda r: r.top_groups < r.groups and {'top_groups': r.top_groups + 1}),
    'weights that do not sum to one': replaced(moe.SigmoidGroupRouter, lambda r: {'renormalize': not r.renormalize}),
    'another scale of experts': replaced(moe.SigmoidGroupRouter, lambda r: {'scale': r.scale * 1.01}),
    'weights on the other side': replaced(moe.Experts, lambda e: {'weight_inputs': not e.weight_inputs}),
    'no scale of the embedding': replaced(Transformer, lambda m: m.embedding_scale and {'embedding_scale': None}),
}


# The others are slow, and those with the most parts the slowest.
MANY_PARTS = ('GptOssForCausalLM', 'DeepseekV3ForCausalLM', 'Llama4ForCausalLM', 'Qwen2MoeForCausalLM')
FAST = ('LlamaForCausalLM', 'Gemma2ForCausalLM')


def changed(part, change):
  """Returns `part` with `change` applied to it and to all its parts."""
  match part:
    case tuple():
      return tuple(changed(item, change) for item in part)
    case _ if not dataclasses.is_dataclass(part):
      return part
  fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in ('parent', 'name')}
  new = {name: changed(value, change) for name, value in fields.items()}
  new = {name: value for name, value in new.items() if value is not fields[name]}
  if new:
    part = part.clone(**new) if isinstance(part, nn.Module) else dataclasses.replace(part, **new)
  return change(part)


@pytest.mark.parametrize('case', [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name not in FAST)
                 + [pytest.mark.long] * (case.name in MANY_PARTS))
    for case in CASES[1:] if '-' not in case.name])
def test_each_part_changes_the_logits(opened, case):
  """Any wrong part shows in the logits, so equal logits mean that all parts are right."""
  _, model, params, _ = opened(case)
  # Each kind of layer is a stack of its own, and has every parameter that a changed model may need.
  params_of = dict(zip(model.layers, model.unstack(params)['blocks']))
  layers = params_of.values()
  alike = {'attention_norm': 'attention_out_norm', 'feed_forward_norm': 'feed_forward_out_norm'}
  alike |= {b: a for a, b in alike.items()}
  layers = [{**{alike[name]: tree for name, tree in layer.items() if name in alike}, **layer} for layer in layers]
  for layer in layers:
    layer['attention'] = {'out_bias': layer['feed_forward_norm']['scale'], **layer['attention']}
  params = {'head': jnp.flip(params['embedding']), **params,
            'blocks': {str(i): jax.tree.map(lambda x: x[None], layer) for i, layer in enumerate(layers)}}
  model = model.clone(blocks=tuple(Stack((block,), 1) for block in params_of), remat=None)
  batch = rows(random_tokens(1, 64), random_tokens(1, 40, seed=1))
  def logits(model):
    out = model.apply(params, batch)
    return np.asarray(out.head(out.hidden))[batch.segments > 0]
  with jax.disable_jit():
    right, tried = logits(model), []
    for name, change in WRONG.items():
      wrong = changed(model, change)
      if describe(wrong) != describe(model):
        assert np.abs(logits(wrong) - right).max() > 1e-4, name
        tried.append(name)
  assert len(tried) >= 10
