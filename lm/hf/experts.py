"""Mixtures of experts: their config fields, their layers, and their tensors in files with a tensor for each expert."""
import dataclasses
from collections.abc import Iterator
from typing import Any

from lm.hf import names
from lm.hf.config import Config
from lm.models import moe


def count(c: Config, default: int) -> int:
  """Reads the number of experts, which Mixtral and Qwen name differently."""
  experts = c.size('num_local_experts', c.size('num_experts', default))
  c.only('num_experts', experts)
  return experts


def top_k(c: Config, experts: int, default: int) -> int:
  """Reads the number of experts for each token."""
  chosen = c.size('num_experts_per_tok', default)
  if chosen > experts:
    c.refuse('num_experts_per_tok', chosen, f'at most the {experts} experts that there are')
  return chosen


def sparse(c: Config, layers: int) -> list[bool]:
  """Reads which layers have experts: every `decoder_sparse_step`-th, except `mlp_only_layers`."""
  step, dense = c.size('decoder_sparse_step', 1), c.get('mlp_only_layers', list, [])
  if not all(type(i) is int and 0 <= i < layers for i in dense):
    c.refuse('mlp_only_layers', dense, f'layers, from 0 to {layers - 1}')
  return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def sparse_config(model: Any) -> dict[str, Any]:
  """Returns the fields that `sparse` reads, and the `intermediate_size` of dense layers, if there are any."""
  dense = [i for i, block in enumerate(model.layers) if not isinstance(block.feed_forward, moe.Experts)]
  values = {'decoder_sparse_step': 1, 'mlp_only_layers': dense}
  return {**values, 'intermediate_size': model.layers[dense[0]].feed_forward.hidden} if dense else values


def first(model: Any) -> moe.Experts:
  """Returns the first mixture of experts of a model. Raises ValueError if no layer has one."""
  for block in model.layers:
    if isinstance(block.feed_forward, moe.Experts):
      return block.feed_forward
  raise ValueError('no layer has experts')


def tensors(mixture: moe.Experts, prefix: str, **named: str) -> Iterator[names.Map]:
  """Yields the map of the router, and those of each expert: `named` has the name of the tensor for each leaf."""
  yield names.linear(f'{prefix}gate.weight', 'feed_forward/router/router')
  for leaf, tensor in named.items():
    for i in range(mixture.experts):
      yield dataclasses.replace(names.linear(f'{prefix}experts.{i}.{tensor}.weight', f'feed_forward/{leaf}'), expert=i)


def qwen_layer(block: Any) -> list[names.Map]:
  """Returns the maps of a layer that is dense or has experts, which may have a shared expert too."""
  return names.llama_layer(block, _qwen_feed_forward)


def _qwen_feed_forward(feed_forward: Any) -> Iterator[names.Map]:
  if not isinstance(feed_forward, moe.Experts):
    yield from names.llama_feed_forward(feed_forward)
    return
  yield from tensors(feed_forward, 'mlp.', gate='gate_proj', up='up_proj', down='down_proj')
  if feed_forward.shared is not None:
    yield from names.llama_feed_forward(feed_forward.shared, 'mlp.shared_expert.', 'feed_forward/shared')
    yield names.linear('mlp.shared_expert_gate.weight', 'feed_forward/shared_gate')
