"""Hugging Face models: opened, imported into a folder with a checkpoint, and exported."""
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import paths, sharding
from lm.data import tokenizers
from lm.data.chat import conversation, templates
from lm.data.text import source
from lm.data.tokenizers import export
from lm.hf import files, weights
from lm.models.prediction_heads import MultiToken
from lm.workdir import checkpoint
from lm.workdir.describe import describe, differences, fingerprint
from lm.workdir.parsing import read_object, read_object_if_any

# Files beside the weights. An import keeps them, so that an export of the imported model is complete.
_SIDE = ('config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
         'added_tokens.json', 'vocab.json', 'merges.txt', 'vocab.txt', 'chat_template.jinja', 'chat_template.json')


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model with its parameters and its tokenizer, and the folder that it was loaded from."""
  model: Any
  params: Any
  tokenizer: Any
  folder: pathlib.Path


def folder_template(folder: pathlib.Path) -> conversation.Template | None:
  """Returns the default chat template of a Hugging Face folder; None if it has none."""
  return templates.load(folder) if 'default' in templates.sources(folder) else None


def locate(name: str) -> pathlib.Path:
  """Returns the folder `name`, or that of the downloaded files of the model `name` of the Hugging Face hub.

  Raises FileNotFoundError if `name` is a path of no folder, `paths.Remote` if it is a URL, OSError if the hub does not
  give the files.
  """
  folder = paths.local(name)
  if folder.is_dir():
    return folder
  if name.count('/') > 1 or name.startswith(('.', '~', '/')):
    raise FileNotFoundError(f'{name} is no folder')
  hub = source.require('huggingface_hub', 'hf')
  try:
    # Weights as safetensors only: other formats can run code.
    return pathlib.Path(hub.snapshot_download(name, allow_patterns=['*.safetensors', '*.safetensors.index.json',
                                                                    '*.model', *_SIDE],
                                              ignore_patterns=['*/*']))   # copies in other formats; `*` matches `/` too
  except Exception as error:   # the network and the hub raise errors of many types
    raise OSError(f'{name} is no folder here, and the hub does not give it: {" ".join(str(error).split())[:300]}'
                  ) from None


def tokenizer_length(folder: pathlib.Path) -> Any:
  """Returns the most tokens of a text by tokenizer_config.json; None if it does not say it."""
  return read_object_if_any(folder / 'tokenizer_config.json').get('model_max_length')


def open_model(folder: pathlib.Path, dtype: Any = jnp.float32) -> Any:
  """Returns the model that a folder describes, without its parameters, computing in `dtype`."""
  return weights.open_model(folder, dtype=dtype)[0]


def open_tokenizer(folder: pathlib.Path, model: Any) -> tokenizers.Tokenizer:
  """Opens the tokenizer of a folder. Raises ValueError if it has more tokens than the model."""
  tokenizer = tokenizers.load(folder)
  if tokenizer.vocab_size > model.vocab:
    raise ValueError(f'{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the weights only {model.vocab}; they '
                     'are not of one model')
  facts = checkpoint.stored_facts(folder / 'checkpoints') or {}
  if facts.get('tokenizer', tokenizer.fingerprint) != tokenizer.fingerprint:
    raise ValueError(f'{folder}: the tokenizer (fingerprint {tokenizer.fingerprint}) is not the one that was imported '
                     f'(fingerprint {facts["tokenizer"]}); import the model anew')
  return tokenizer


def load(name: str, dtype: Any = jnp.float32, param_dtype: Any = None,
         check: Callable[[Any], None] = lambda model: None) -> Pretrained:
  """Loads a model of the hub, a Hugging Face folder or an imported model, on the mesh that is set.

  It computes in `dtype`; its parameters are cast to `param_dtype`, or keep the dtypes of the files. `check` is called
  with the model before these are read, and may raise an error.
  """
  folder = locate(name)
  model = open_model(folder, dtype)
  check(model)
  tokenizer = open_tokenizer(folder, model)   # before the weights, which take long
  return Pretrained(model, _params(folder, param_dtype), tokenizer, folder)


def _params(folder: pathlib.Path, dtype: Any = None) -> Any:
  """Returns the parameters in a folder, from its checkpoint if it was imported, cast to `dtype` if given."""
  if (folder / 'checkpoints').is_dir():
    model = open_model(folder)
    with checkpoint.Checkpoints(folder / 'checkpoints', create=False) as saved:
      restored = saved.restore_params(_abstract(model), dtypes=lambda stored: dtype or stored)
    if restored is None:
      raise FileNotFoundError(f'{folder} holds no checkpoint')
    lines = differences(restored.facts['model'], describe(model))
    if lines:
      raise ValueError(f'the config.json of {folder} is not of the model that was imported; import it anew\n  '
                       + '\n  '.join(lines[:6]))
    return restored.state
  model, family = weights.open_model(folder)
  with files.Weights(folder) as tensors:
    return weights.load_params(model, family, tensors, dtype)


def _abstract(model: Any) -> Any:
  mesh = jax.sharding.get_mesh()
  return jax.tree.map(lambda s: s.update(sharding=sharding.layout(mesh, s.sharding and s.sharding.spec)),
                      jax.eval_shape(model.init, jax.random.key(0)))


def save(name: str, folder: pathlib.Path) -> Pretrained:
  """Imports a model into a folder with a checkpoint, from which any experiment can start, on any mesh.

  The parameters keep the dtypes of the files; a run that starts from them casts them to float32.
  """
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f'{folder} is not empty; choose another')
  loaded = load(name)
  folder.mkdir(parents=True, exist_ok=True)
  with checkpoint.Checkpoints(folder / 'checkpoints') as saved:
    saved.save(0, {'params': loaded.params},
               {'model': describe(loaded.model), 'tokenizer': loaded.tokenizer.fingerprint,
                'parameters': fingerprint(loaded.params)})
  for path in (*loaded.folder.glob('*.model'), *(loaded.folder / name for name in _SIDE)):
    if path.is_file():
      shutil.copyfile(path, folder / path.name)
  return loaded


def check_shapes(name: str, theirs: Any, ours: Any) -> None:
  """Raises ValueError, with the first differences, if the parameters of two models differ in shape."""
  shapes = [{jax.tree_util.keystr(p, simple=True, separator='.'): str(list(x.shape))
             for p, x in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (jax.eval_shape(lambda model=model: model.init(jax.random.key(0))) for model in (theirs, ours))]
  lines = differences(*shapes)
  if lines:
    lines = [line.replace(' before, ', ' there, ').removesuffix('now') + 'in this run' for line in lines[:4]]
    raise ValueError(f'{name} does not fit the model of this run:\n  ' + '\n  '.join(lines))


@dataclasses.dataclass(frozen=True)
class Parameters:
  """A function of a model that returns the parameters in a Hugging Face folder or of an imported model, in float32."""
  folder: pathlib.Path
  parameters: str | None   # the fingerprint of the parameters

  def __call__(self, model: Any) -> Any:
    del model
    return _params(self.folder, jnp.float32)


def start(folder: pathlib.Path, model: Any) -> Parameters:
  """Returns `Parameters` of a Hugging Face folder or of an imported model, for `train.Run.start`.

  It compares the shapes at once, without reading the parameters. Raises FileNotFoundError if the folder holds no model,
  ValueError, with the first differences, if its model has other shapes than `model`.
  """
  check_shapes(str(folder), open_model(folder), model)
  if (folder / 'checkpoints').is_dir():
    parameters = (checkpoint.stored_facts(folder / 'checkpoints') or {}).get('parameters')
  else:
    parameters = _fingerprint(folder)
  return Parameters(folder.resolve(), parameters)


def _fingerprint(folder: pathlib.Path) -> str:
  """Returns a hash of the names, shapes and dtypes of the tensors in a folder, and of 16 samples of each."""
  digest = hashlib.sha256()
  with files.Weights(folder) as tensors:
    for name in sorted(tensors):
      values = tensors[name].reshape(-1)
      digest.update(repr((name, tensors[name].shape, str(values.dtype))).encode())
      for place in np.linspace(0, values.size, 16, endpoint=False, dtype=int).tolist():
        digest.update(values[place:place + 64].tobytes())
  return digest.hexdigest()[:16]


def write(folder: pathlib.Path, model: Any, params: Any, tokenizer: Any, dtype: Any = None,
          like: pathlib.Path | None = None, template: conversation.Template | None = None) -> None:
  """Writes a folder for `from_pretrained` of transformers, with model and tokenizer; it appears whole or not at all.

  Of a model that predicts further tokens, only the trunk is written.

  Args:
    folder: the folder, which is missing or empty.
    model: the model; a family of `weights.FAMILIES` must compute the same.
    params: its parameters.
    tokenizer: the tokenizer of the model.
    dtype: the dtype of the files; None is that of the parameters.
    like: the folder from which the model was imported: its family, tokenizer, chat template and generation config are
      kept.
    template: replaces the chat template; generation then also ends where the template ends an answer.

  Raises:
    ValueError: no family computes the same as the model, or `like` has another tokenizer.
  """
  model = model.trunk if isinstance(model, MultiToken) else model
  if like:
    fingerprint_of_like = tokenizers.load(like).fingerprint
    if fingerprint_of_like != tokenizer.fingerprint:
      raise ValueError(f'the tokenizer of {like} (fingerprint {fingerprint_of_like}) is not that of the model '
                       f'(fingerprint {tokenizer.fingerprint}): give the folder that the model was started from')
  with files.new_folder(folder) as new:
    config = read_object_if_any(like / 'config.json') if like else {}
    ids = _token_ids(model, tokenizer, config, template)
    families = [weights.family_of(config)] if config else []
    weights.write(new, model, params, [*families, *weights.FAMILIES], dtype, ids)
    if like:
      side_files = [like / name for name in _SIDE if name != 'config.json' and (like / name).is_file()]
      for path in (*side_files, *like.glob('*.model')):
        shutil.copyfile(path, new / path.name)
    jinja = template and template.jinja(tokenizer)
    if not like:
      export.export(tokenizer, new, jinja, begins=model.causal and not model.reads_source)
    elif jinja and jinja != templates.sources(like).get('default'):
      (new / 'chat_template.jinja').write_text(jinja, 'utf-8', newline='')
    _write_generation_config(new / 'generation_config.json', ids, bool(template))


def _write_generation_config(path: pathlib.Path, ids: dict[str, Any], replace_ends: bool) -> None:
  """Writes the config of generation; one that was copied is kept, except for its ends if they are replaced."""
  generation = read_object(path) if path.is_file() else ids
  if replace_ends or not path.is_file():
    path.write_text(json.dumps({**generation, 'eos_token_id': ids['eos_token_id']}, indent=2) + '\n')


def _token_ids(model: Any, tokenizer: Any, config: dict[str, Any], template: conversation.Template | None
               ) -> dict[str, Any]:
  """Returns the ids of control tokens for config.json; the id of padding is that of `config`."""
  ends = list(dict.fromkeys((*tokenizer.eos_ids, *(template.ends(tokenizer) if template else ()))))
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': ends[0] if len(ends) == 1 else ends}
  pad = config.get('pad_token_id', (config.get('text_config') or {}).get('pad_token_id'))
  if model.reads_source:   # transformers shifts labels by these
    ids |= {'decoder_start_token_id': tokenizer.bos_id, 'pad_token_id': tokenizer.bos_id}
  elif isinstance(pad, int) and 0 <= pad < model.vocab:
    ids['pad_token_id'] = pad
  elif '<|pad|>' in tokenizer.control_names:
    ids['pad_token_id'] = tokenizer.control_id('<|pad|>')
  return ids
