"""Which tensors of a file are which leaves of a parameter tree, and how one becomes the other.

A path such as 'attention/query' is a leaf of a block's tree. Reading only views, so that a leaf is read from its file
as far as it is wanted: transposing and splitting an axis copy nothing.
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
  """Tensors of a file that together are some leaves: `read` makes leaves of tensors, `write` tensors of leaves.

  Where each expert has tensors of its own, they are the entry `expert` of the leaves. With `by_expert`, tensors and
  leaves have the experts as their first axis, and `read` takes any number of these.
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
  """Vectors, and tables of embeddings."""
  return Map((tensor,), (leaf,), lambda w: (w,), lambda w: (w,))


def linear(tensor: str, leaf: str) -> Map:
  """A weight that the file has as [out, in]."""
  return Map((tensor,), (leaf,), lambda w: (w.T,), lambda w: (w.T,))


def to_heads(tensor: str, leaf: str, size: int) -> Map:
  """Projections to heads of `size` entries: [heads * H, D] to [D, heads, H]."""
  return Map((tensor,), (leaf,), lambda w: (w.T.reshape(w.shape[1], -1, size),),
             lambda w: (np.reshape(w, (w.shape[0], -1)).T,))


def from_heads(tensor: str, leaf: str, size: int) -> Map:
  """The projection out of heads: [D, heads * H] to [heads, H, D]."""
  return Map((tensor,), (leaf,), lambda w: (w.T.reshape(-1, size, w.shape[0]),),
             lambda w: (np.reshape(w, (-1, w.shape[-1])).T,))


def by_heads(tensor: str, leaf: str, size: int) -> Map:
  """A vector over all heads: [heads * H] to [heads, H]."""
  return Map((tensor,), (leaf,), lambda w: (w.reshape(-1, size),), lambda w: (np.reshape(w, -1),))


def llama_attention(attention: Any, prefix: str = 'self_attn.') -> Iterator[Map]:
  """q_proj, k_proj, v_proj, o_proj, and what norms and biases there are."""
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
  for name in ('gate', 'up', 'down') if feed_forward.gated else ('up', 'down'):
    yield linear(f'{prefix}{name}_proj.weight', f'{leaf}/{name}')
    if feed_forward.bias:
      yield same(f'{prefix}{name}_proj.bias', f'{leaf}/{name}_bias')


def llama_layer(block: Any, feed_forward: Callable[[Any], Iterable[Map]] = llama_feed_forward) -> list[Map]:
  """The norms before or after attention and feed-forward, or both; the name of one depends on what others there are."""
  middle = ('attention_out_norm', 'feed_forward_norm')[block.attention_out_norm is None]
  norms = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': middle,
           'pre_feedforward_layernorm': 'feed_forward_norm', 'post_feedforward_layernorm': 'feed_forward_out_norm'}
  if block.attention_out_norm is None:
    del norms['pre_feedforward_layernorm']
  return [*(same(f'{tensor}.weight', f'{leaf}/scale') for tensor, leaf in norms.items() if getattr(block, leaf)),
          *llama_attention(block.attention), *feed_forward(block.feed_forward)]


def llama_rest(model: Transformer) -> list[Map]:
  head = [] if model.tied else [same('lm_head.weight', 'head')]
  return [same('model.embed_tokens.weight', 'embedding'), same('model.norm.weight', 'norm/scale'), *head]


def beside_images(family: Family, architecture: str, model_type: str, fields: Sequence[str], vision: str, tied: bool
                  ) -> Family:
  """The language model alone of files that see images too: its config is their `text_config`.

  `fields` are others of theirs, of images; tensors whose names begin with `vision` are left out.
  """
  prefix = 'language_model.'

  def model(c):
    c.only('tie_word_embeddings', tied)
    for name in fields:
      c.get(name, (dict, int), None)
    text = c.inner('text_config') or Config({})
    text.only('tie_word_embeddings', tied)
    found = family.model(text)
    text.finish()
    return found

  def config(model):
    raise ValueError(f'{architecture} without its vision model is a {family.architecture}')

  def outer(model):
    return [dataclasses.replace(m, tensors=tuple(prefix + name for name in m.tensors)) for m in family.outer(model)]

  return dataclasses.replace(
      family, architecture=architecture, model_type=model_type, model=model, config=config, outer=outer,
      prefix=prefix + family.prefix, ignored=lambda name: name.startswith((vision, 'multi_modal_projector.')),
      copies=lambda model: {copy: prefix + name for copy, name in family.copies(model).items()})
