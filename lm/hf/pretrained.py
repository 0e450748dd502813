"""Models that others trained: a Hugging Face folder, or what was imported from one; and parameters to start from."""
import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data import tokenizers
from lm.data.chat import conversation, templates
from lm.data.text import source
from lm.data.tokenizers import export
from lm.hf import files, weights
from lm.hf.config import read
from lm.models.prediction_heads import MultiToken
from lm.workdir import checkpoint
from lm.workdir.describe import describe, differences, fingerprint

# Files beside the weights. An import keeps them, so that an export of the imported model is complete.
_SIDE = ('config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
         'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json')


@dataclasses.dataclass(frozen=True)
class Pretrained:
  model: Any
  params: Any
  tokenizer: Any
  folder: pathlib.Path


def folder_template(folder: pathlib.Path) -> conversation.Template | None:
  """Returns the default chat template of a Hugging Face folder; None if it has none."""
  return templates.load(folder) if 'default' in templates.sources(folder) else None


def locate(name: str) -> pathlib.Path:
  """Returns the folder `name`, or the fetched files of the model `name` of the Hugging Face hub."""
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return folder
  if name.count('/') > 1 or name.startswith(('.', '~', '/')):
    raise FileNotFoundError(f'{name} is no folder')
  hub = source.require('huggingface_hub', 'hf')
  try:
    # Weights as safetensors only: other formats can run code.
    return pathlib.Path(hub.snapshot_download(name, allow_patterns=['*.safetensors', '*.safetensors.index.json',
                                                                    '*.model', *_SIDE],
                                              ignore_patterns=['*/*']))   # copies of other formats; * matches / too
  except Exception as error:   # of the network and of the hub, of many kinds
    raise OSError(f'{name} is no folder here, and the hub does not give it: {" ".join(str(error).split())[:300]}'
                  ) from None


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


def load(name: str, dtype: Any = jnp.float32, param_dtype: Any = None) -> Pretrained:
  """Loads a model of the hub, a Hugging Face folder or an imported model, on the mesh that is set.

  It computes in `dtype`; its parameters are cast to `param_dtype`, or keep the dtypes of the files.
  """
  folder = locate(name)
  model = open_model(folder, dtype)
  tokens = open_tokenizer(folder, model)   # before the weights, which take long
  return Pretrained(model, _params(folder, param_dtype), tokens, folder)


def _params(folder: pathlib.Path, dtype: Any = None) -> Any:
  if (folder / 'checkpoints').is_dir():
    model = open_model(folder)
    with checkpoint.Checkpoints(folder / 'checkpoints', create=False) as saved:
      restored = saved.restore_params(_abstract(model), dtypes=lambda stored: dtype or stored)
    if restored is None:
      raise FileNotFoundError(f'{folder} holds no checkpoint')
    if lines := differences(restored.facts['model'], describe(model)):
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
  if lines := differences(*shapes):
    lines = [line.replace(' before, ', ' there, ').removesuffix('now') + 'in this run' for line in lines[:4]]
    raise ValueError(f'{name} does not fit the model of this run:\n  ' + '\n  '.join(lines))


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Called with a model, returns the parameters of a Hugging Face folder or of an imported model, in float32."""
  folder: pathlib.Path
  parameters: str | None   # their fingerprint

  def __call__(self, model: Any) -> Any:
    del model
    return _params(self.folder, jnp.float32)


def start(folder: pathlib.Path, model: Any) -> Parameters:
  """For `train.Run.start`: parameters of a Hugging Face folder or of an imported one, in float32.

  Checked at once, without reading them: FileNotFoundError where there is nothing of the kind, ValueError where the
  folder's model is of another shape, naming the first differences.
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


def write(folder: pathlib.Path, model: Any, params: Any, tokens: Any, dtype: Any = None,
          like: pathlib.Path | None = None, template: conversation.Template | None = None) -> None:
  """A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` open; whole or not at all.

  `like` is the folder that the model was imported from, whose family, tokenizer, chat template and generation config it
  keeps. With a `template`, that is the chat template, and generation ends where it ends an answer too. Of a model that
  predicts further tokens, its trunk is written. ValueError where the tokenizer of `like` is another one.
  """
  model = model.trunk if isinstance(model, MultiToken) else model
  if like and (theirs := tokenizers.load(like).fingerprint) != tokens.fingerprint:
    raise ValueError(f'the tokenizer of {like} (fingerprint {theirs}) is not that of the model (fingerprint '
                     f'{tokens.fingerprint}): give the folder that the model was started from')
  with files.new_folder(folder) as new:
    config = read(like / 'config.json') if like and (like / 'config.json').is_file() else {}
    ids = _token_ids(model, tokens, config, template)
    families = [weights.family_of(config)] if config else []
    weights.write(new, model, params, [*families, *weights.FAMILIES], dtype, ids)
    kept = [path for name in _SIDE if name != 'config.json' and like and (path := like / name).is_file()]
    for path in (*kept, *(like.glob('*.model') if like else ())):
      shutil.copyfile(path, new / path.name)
    jinja = template and template.jinja(tokens)
    if not like:
      export.export(tokens, new, jinja, begins=model.causal and not model.reads_source)
    elif jinja and jinja != templates.sources(like).get('default'):
      (new / 'chat_template.jinja').write_text(jinja, 'utf-8', newline='')
    generation = read(new / 'generation_config.json') if (new / 'generation_config.json').is_file() else ids
    if not (new / 'generation_config.json').is_file() or template:
      ends = {'eos_token_id': ids['eos_token_id']}
      (new / 'generation_config.json').write_text(json.dumps({**generation, **ends}, indent=2) + '\n')


def _token_ids(model: Any, tokens: Any, config: dict[str, Any], template: conversation.Template | None
               ) -> dict[str, Any]:
  """Returns the ids of control tokens for config.json; the id of padding is that of `config`."""
  ends = list(dict.fromkeys((*tokens.eos_ids, *(template.ends(tokens) if template else ()))))
  ids = {'bos_token_id': tokens.bos_id, 'eos_token_id': ends[0] if len(ends) == 1 else ends}
  pad = config.get('pad_token_id', (config.get('text_config') or {}).get('pad_token_id'))
  if model.reads_source:   # transformers shifts labels by these
    ids |= {'decoder_start_token_id': tokens.bos_id, 'pad_token_id': tokens.bos_id}
  elif isinstance(pad, int) and 0 <= pad < model.vocab:
    ids['pad_token_id'] = pad
  elif '<|pad|>' in tokens.control_names:
    ids['pad_token_id'] = tokens.control_id('<|pad|>')
  return ids
