"""Reads weight files directly into the shards of a mesh, and writes parameters as a Hugging Face folder."""
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.hf import (
  bert,
  deepseek_v3,
  files,
  gemma2,
  gemma3,
  gpt2,
  gpt_neox,
  gpt_oss,
  llama,
  llama4,
  mistral,
  mixtral,
  olmo2,
  olmo3,
  phi3,
  quantized,
  qwen2,
  qwen2_moe,
  qwen3,
  qwen3_moe,
  smollm3,
  t5,
  text_scorers,
)
from lm.hf.config import Config
from lm.hf.names import Family, Map
from lm.models.quantized_decoder import exact
from lm.models.transformer import Transformer
from lm.workdir.describe import describe
from lm.workdir.parsing import read_object

# If several families compute the same as a model, the first of them exports it.
FAMILIES = (gpt2.FAMILY, gpt_neox.FAMILY, llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, smollm3.FAMILY,
            phi3.FAMILY, olmo2.FAMILY, olmo3.FAMILY, gemma2.FAMILY, gemma3.FAMILY, mixtral.FAMILY, qwen2_moe.FAMILY,
            qwen3_moe.FAMILY, gpt_oss.FAMILY, deepseek_v3.FAMILY, llama4.FAMILY, gemma3.WITH_IMAGES,
            llama4.WITH_IMAGES, bert.FAMILY, t5.FAMILY, *text_scorers.FAMILIES)


def family_of(values: dict[str, Any], families: Sequence[Family] = FAMILIES) -> Family:
  """Returns the family that a config.json names. Raises ValueError if it is not one of `families`."""
  named = values.get('architectures')
  if named is None:
    named = [family.architecture for family in families if family.model_type == values.get('model_type')]
  for family in families:
    if named == [family.architecture]:
      return family
  raise ValueError(f'architectures={named!r} of model_type={values.get("model_type")!r} is not supported; supported '
                   'are ' + ', '.join(family.architecture for family in families))


def open_model(folder: pathlib.Path, families: Sequence[Family] = FAMILIES, dtype: Any = jnp.float32
               ) -> tuple[Transformer, Family]:
  """Returns the model that a folder's config.json describes, computing in `dtype`, and the family with its readers."""
  path = folder / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(f'{folder} has no config.json; give a Hugging Face folder')
  values = read_object(path)
  family, config = family_of(values, families), Config(values, str(path))
  tensors = quantized.reader(config)
  model = family.model(config)
  config.finish()
  return model.clone(dtype=dtype), dataclasses.replace(family, tensors=tensors)


class _Place(NamedTuple):
  """A map with the full names of its tensors, and the places of its leaves in the parameters."""
  map: Map
  tensors: tuple[str, ...]
  paths: tuple[tuple[str, ...], ...]
  index: tuple[int, ...]   # of the leaves' first axes: the repeat of the layer's stack, and the expert


def _places(model: Transformer, family: Family) -> Iterator[_Place]:
  for m in family.outer(model):
    yield _Place(m, m.tensors, tuple(tuple(leaf.split('/')) for leaf in m.leaves), ())
  stacks = [(family.prefix, ('blocks',), model.blocks)] if family.stacks is None else family.stacks(model)
  for prefix, root, blocks in stacks:
    layer = tree = 0
    for stack in blocks:
      for repeat in range(stack.repeats):
        for i, block in enumerate(stack.pattern):
          for m in family.layer(block):
            yield _Place(m, tuple(prefix.format(layer) + name for name in m.tensors),
                         tuple((*root, str(tree + i), *leaf.split('/')) for leaf in m.leaves),
                         (repeat,) if m.expert is None else (repeat, m.expert))
          layer += 1
      tree += len(stack.pattern)


def load_params(model: Transformer, family: Family, weights: files.Weights, dtype: Any = None) -> Any:
  """Returns the parameters, cast to `dtype` if given, on the mesh that is set; they are read leaf by leaf.

  Without a dtype, weights in FP8 blocks become float32, and weights in MXFP4 become bfloat16. Raises ValueError if a
  tensor is missing, has another shape, or is not a weight of the model.
  """
  shapes, stored = jax.eval_shape(model.init, jax.random.key(0)), family.tensors(weights)
  unused, parts_by_leaf = {name for name in stored if not family.ignored(name)}, {}
  root = family.prefix.partition('.')[0] + '.'
  omitted = '' if any(name.startswith(root) for name in unused) else root   # GPT-2's files omit it

  def in_file(name):
    name = name.removeprefix(omitted)
    return name if name in stored else family.older(name)

  for place in _places(model, family):
    names = [in_file(name) for name in place.tensors]
    unused -= set(names)
    for path, part in zip(place.paths, _parts(place.map, names, stored)):
      expected = _leaf(shapes, path).shape[len(place.index):]
      if part.shape != expected:
        raise ValueError(f'{" and ".join(names[:2])} of shape {stored[names[0]].shape} make {"/".join(path)} of shape '
                         f'{part.shape}, where the config gives {expected}')
      parts_by_leaf.setdefault(path, {})[place.index] = part
  for copy, name in family.copies(model).items():
    if copy in unused and not np.array_equal(stored[copy][()], stored[in_file(name)][()]):
      raise ValueError(f'{copy} is not {in_file(name)}, where the config gives one tensor for both')
    unused.discard(copy)
  if unused:
    raise ValueError(f'{len(unused)} tensors are not weights of this model: {", ".join(sorted(unused)[:3])}')

  def make(path, shape):
    return _assemble(parts_by_leaf[tuple(key.key for key in path)], shape, dtype, weights.release)
  return jax.tree_util.tree_map_with_path(make, shapes)


@dataclasses.dataclass(frozen=True)
class _Part:
  """A leaf of one layer, or of one of its experts. Indexing it reads the tensors and dequantises them."""
  map: Map
  leaf: int   # of the map's leaves
  tensors: tuple[Any, ...]
  shape: tuple[int, ...]
  dtype: np.dtype

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    experts = index[:1] if self.map.by_expert else ()
    leaf = self.map.read(*(tensor[experts] for tensor in self.tensors))[self.leaf]
    return leaf[(slice(None),) * len(experts) + index[len(experts):]]


def _parts(m: Map, names: list[str], stored: Mapping[str, Any]) -> Iterator[_Part]:
  """Returns the leaves that a map makes of the tensors with these names."""
  missing = [name for name in names if name not in stored]
  if missing:
    raise ValueError(f'the tensor {missing[0]} is missing; the files hold {len(stored)} tensors')
  tensors = tuple(stored[name] for name in names)
  for name, tensor in zip(names, tensors):
    if tensor.dtype not in (np.float32, np.float16, jnp.bfloat16):
      raise ValueError(f'{name} is of dtype {tensor.dtype}; only float32, float16 and bfloat16 are supported')
  try:
    leaves = m.read(*(_placeholder(tensor.shape, tensor.dtype) for tensor in tensors))
  except (ValueError, IndexError) as error:
    raise ValueError(f'the tensors {", ".join(names)} of shapes {[t.shape for t in tensors]} do not fit: {error}'
                     ) from None
  return (_Part(m, i, tensors, leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves))


def _placeholder(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Returns zeros that take no memory, to compute shapes with."""
  return np.broadcast_to(np.zeros((), dtype), shape)


def _empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Returns an empty array that JAX on CPU does not copy: its data begins at a multiple of 64 bytes."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start:start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray, release: Callable[[], None]) -> None:
  """Copies in blocks, and calls `release` between them, so that few pages of a file are in memory at once.

  Blocks are faster too: most weights are transposed, and one loop over such an array misses the cache at every element.
  """
  large = source.nbytes > 1 << 26
  if large:   # in the order of the file
    axis = max(range(source.ndim), key=lambda i: (source.shape[i] > 1, abs(source.strides[i])))
  elif source.size > 1 << 16:
    axis = int(np.argmax(source.shape))
  else:
    target[...] = source
    return
  half = source.shape[axis] // 2
  for side in (slice(half), slice(half, None)):
    half_index = *(slice(None),) * axis, side
    _copy(target[half_index], source[half_index], release)
    if large:
      release()


def _assemble(parts: dict[tuple[int, ...], _Part], leaf: jax.ShapeDtypeStruct, dtype: Any,
              release: Callable[[], None]) -> jax.Array:
  """Assembles a leaf from its parts, by their index along its first axes; `release` frees the pages of files."""
  dtype = dtype or functools.reduce(jnp.promote_types, (part.dtype for part in parts.values()))
  stacked = len(next(iter(parts)))

  def read(index):
    outer = [range(size)[i] for size, i in zip(leaf.shape, index[:stacked])]
    inner = [len(range(size)[i]) for size, i in zip(leaf.shape[stacked:], index[stacked:])]
    array = _empty_aligned((*map(len, outer), *inner), dtype)
    for place in np.ndindex(array.shape[:stacked]):
      part = parts[tuple(indices[i] for indices, i in zip(outer, place))]
      _copy(array[(*place, ...)], part[index[stacked:]], release)
      release()
    return array

  layout = sharding.layout(jax.sharding.get_mesh(), leaf.sharding and leaf.sharding.spec)
  return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, layout, read))


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def tensors(model: Transformer, family: Family, params: Any, dtype: Any = None) -> dict[str, files.Tensor]:
  """Returns the parameters for `files.write`, under the names of `family`, cast to `dtype` if given."""
  by_name = {}
  for place in _places(model, family):
    leaves = [_leaf(params, path) for path in place.paths]
    kind = np.dtype(dtype or leaves[0].dtype)
    shapes = place.map.write(*(_placeholder(leaf.shape[len(place.index):], kind) for leaf in leaves))
    for i, (name, shape) in enumerate(zip(place.tensors, shapes)):
      def make(i=i, place=place, leaves=leaves, kind=kind):
        parts = (np.asarray(leaf[place.index] if place.index else leaf) for leaf in leaves)
        return np.ascontiguousarray(place.map.write(*parts)[i].astype(kind, copy=False))
      by_name[name] = shape.shape, kind, make
  return by_name


def export_config(model: Transformer, families: Sequence[Family] = FAMILIES) -> tuple[Family, dict[str, Any]]:
  """Returns a family that computes the same as the model, and its config. Raises ValueError if there is none."""
  for family in families:
    try:
      values = family.config(model)
      again = family.model(Config(values))
    except (ValueError, AttributeError, TypeError):   # the model has parts that the family lacks
      continue
    if _computes(again) == _computes(model):
      return family, {'architectures': [family.architecture], 'model_type': family.model_type, **values}
  raise ValueError('no known family of transformers computes the same as this model; known families are '
                   + ', '.join(family.architecture for family in families))


def _computes(model: Transformer) -> Any:
  """Returns a model's description without the fields that only training reads."""
  training = {'std', 'out_std', 'query_std', 'dropout', 'layer_dropout', 'dtype'}

  def strip(tree):
    if isinstance(tree, dict):
      return {k: strip(v) for k, v in tree.items() if k not in training}
    return [strip(item) for item in tree] if isinstance(tree, list) else tree
  return strip(describe(exact(model)))


def write(folder: pathlib.Path, model: Transformer, params: Any, families: Sequence[Family] = FAMILIES,
          dtype: Any = None, extra: dict[str, Any] | None = None) -> None:
  """Writes a folder for `from_pretrained` of transformers; it appears whole or not at all.

  `extra` is added to config.json: token ids, such as `bos_token_id`.
  """
  family, values = export_config(model, families)
  with files.new_folder(folder) as new:
    weights = tensors(model, family, params, dtype)
    files.write(new, weights)
    kind = np.dtype(dtype or next(iter(jax.tree.leaves(params))).dtype).name
    # Null, because default ids of the class in transformers may exceed the vocabulary.
    ids = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
    (new / 'config.json').write_text(json.dumps({**values, **ids, 'dtype': kind, **(extra or {})}, indent=2) + '\n')
