"""Maps between the tensors of a file and the leaves of a parameter tree.

A path such as 'attention/query' is a leaf of a block's tree. Reading returns views, so that only the indexed part of a
leaf is read from its file: to transpose an axis or to split it copies nothing.
"""
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.hf.config import Config
from lm.models.stack import Stacks
from lm.models.transformer import Transformer

Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Map:
  """Tensors of a file that together make some leaves: `read` maps tensors to leaves, and `write` leaves to tensors.

  If each expert has its own tensors, they are the index `expert` of the leaves. If `by_expert` is true, the first axis
  of tensors and leaves is that of experts, and `read` accepts any number of experts.
  """
  tensors: tuple[str, ...]
  leaves: tuple[str, ...]
  read: Callable[..., Arrays]
  write: Callable[..., Arrays]
  expert: int | None = None
  by_expert: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
  """An architecture of `transformers` and how it is converted.

  `model(config)` composes the model and reads every field of the config; `config(model)` returns the fields, or raises
  ValueError if the model is of another family. `layer(block)` returns the maps of a layer, with names that follow the
  prefix of the layer; `outer(model)` returns the maps of what lies outside of layers. `ignored(name)` says whether a
  tensor of a file holds no weights. `copies(model)` names tensors of a file that may repeat another tensor, though they
  are not parameters of the model; `older(name)` returns another name that a tensor may have.

  `stacks(model)` is for models other than decoders: it returns the prefix of layers, the place of their trees and
  their blocks. `tensors(weights)` returns the tensors of a folder under the names of the maps, dequantised if need be.
  """
  architecture: str
  model_type: str
  model: Callable[[Any], Transformer]
  config: Callable[[Transformer], dict[str, Any]]
  layer: Callable[[Any], Sequence[Map]]
  outer: Callable[[Transformer], Sequence[Map]]
  prefix: str = 'model.layers.{}.'
  ignored: Callable[[str], bool] = lambda name: name.endswith('rotary_emb.inv_freq')
  copies: Callable[[Any], dict[str, str]] = lambda model: {'lm_head.weight': 'model.embed_tokens.weight'}
  older: Callable[[str], str] = lambda name: name
  stacks: Callable[[Any], Sequence[tuple[str, tuple[str, ...], Stacks]]] | None = None
  tensors: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda weights: weights


def same(tensor: str, leaf: str) -> Map:
  """Returns the map of a tensor that equals its leaf, such as a vector or an embedding."""
  return Map((tensor,), (leaf,), lambda w: (w,), lambda w: (w,))


def linear(tensor: str, leaf: str) -> Map:
  """Returns the map of a weight that is [out, in] in the file."""
  return Map((tensor,), (leaf,), lambda w: (w.T,), lambda w: (w.T,))


def to_heads(tensor: str, leaf: str, size: int) -> Map:
  """Returns the map of a projection to heads of `size` entries, from [heads * H, D] to [D, heads, H]."""
  return Map((tensor,), (leaf,), lambda w: (w.T.reshape(w.shape[1], -1, size),),
             lambda w: (np.reshape(w, (w.shape[0], -1)).T,))


def from_heads(tensor: str, leaf: str, size: int) -> Map:
  """Returns the map of the projection from heads of `size` entries, from [D, heads * H] to [heads, H, D]."""
  return Map((tensor,), (leaf,), lambda w: (w.T.reshape(-1, size, w.shape[0]),),
             lambda w: (np.reshape(w, (-1, w.shape[-1])).T,))


def by_heads(tensor: str, leaf: str, size: int) -> Map:
  """Returns the map of a vector over all heads, from [heads * H] to [heads, H]."""
  return Map((tensor,), (leaf,), lambda w: (w.reshape(-1, size),), lambda w: (np.reshape(w, -1),))


def llama_attention(attention: Any, prefix: str = 'self_attn.') -> Iterator[Map]:
  """Yields the maps of q_proj, k_proj, v_proj and o_proj, and of the norms and biases that the module has."""
  size = attention.head_size
  for tensor, leaf in (('q_proj', 'query'), ('k_proj', 'key'), ('v_proj', 'value')):
    yield to_heads(f'{prefix}{tensor}.weight', f'attention/{leaf}', size)
    if attention.bias:
      yield by_heads(f'{prefix}{tensor}.bias', f'attention/{leaf}_bias', size)
  yield from_heads(f'{prefix}o_proj.weight', 'attention/out', size)
  if attention.bias if attention.out_bias is None else attention.out_bias:
    yield same(f'{prefix}o_proj.bias', 'attention/out_bias')
  for tensor, leaf in (('q_norm', 'query_norm'), ('k_norm', 'key_norm')):
    norm = getattr(attention, leaf)
    if norm is not None and norm.learned:
      make = same if norm.axes == '-' else lambda t, n: by_heads(t, n, size)
      yield make(f'{prefix}{tensor}.weight', f'attention/{leaf}/scale')


def llama_feed_forward(feed_forward: Any, prefix: str = 'mlp.', leaf: str = 'feed_forward') -> Iterator[Map]:
  """Yields the maps of gate_proj, if there is one, up_proj and down_proj, and of their biases."""
  for name in ('gate', 'up', 'down') if feed_forward.gated else ('up', 'down'):
    yield linear(f'{prefix}{name}_proj.weight', f'{leaf}/{name}')
    if feed_forward.bias:
      yield same(f'{prefix}{name}_proj.bias', f'{leaf}/{name}_bias')


def llama_layer(block: Any, feed_forward: Callable[[Any], Iterable[Map]] = llama_feed_forward) -> list[Map]:
  """Returns the maps of a layer with norms before or after attention and feed-forward layer, or both.

  `post_attention_layernorm` is the norm after attention, or without one, the norm before the feed-forward layer.
  """
  middle = 'feed_forward_norm' if block.attention_out_norm is None else 'attention_out_norm'
  norms = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': middle,
           'pre_feedforward_layernorm': 'feed_forward_norm', 'post_feedforward_layernorm': 'feed_forward_out_norm'}
  if block.attention_out_norm is None:
    del norms['pre_feedforward_layernorm']
  return [*(same(f'{tensor}.weight', f'{leaf}/scale') for tensor, leaf in norms.items() if getattr(block, leaf)),
          *llama_attention(block.attention), *feed_forward(block.feed_forward)]


def llama_outer(model: Transformer) -> list[Map]:
  """Returns the maps of the embedding, of the last norm, and of the head if it is not tied."""
  head = [] if model.tied else [same('lm_head.weight', 'head')]
  return [same('model.embed_tokens.weight', 'embedding'), same('model.norm.weight', 'norm/scale'), *head]


def with_images(family: Family, architecture: str, model_type: str, fields: Sequence[str], vision: str, tied: bool
                ) -> Family:
  """Returns the family of multimodal files, of which only the language model is read, with their `text_config`.

  `fields` are the config's fields of images. Tensors whose names begin with `vision` are ignored.
  """
  prefix = 'language_model.'

  def model(c):
    c.only('tie_word_embeddings', tied)
    for name in fields:
      c.get(name, (dict, int), None)
    text = c.inner('text_config') or Config({})
    text.only('tie_word_embeddings', tied)
    language_model = family.model(text)
    text.finish()
    return language_model

  def config(model):
    raise ValueError(f'{architecture} without its vision model is a {family.architecture}')

  def outer(model):
    return [dataclasses.replace(m, tensors=tuple(prefix + name for name in m.tensors)) for m in family.outer(model)]

  return dataclasses.replace(
      family, architecture=architecture, model_type=model_type, model=model, config=config, outer=outer,
      prefix=prefix + family.prefix, ignored=lambda name: name.startswith((vision, 'multi_modal_projector.')),
      copies=lambda model: {copy: prefix + name for copy, name in family.copies(model).items()})
