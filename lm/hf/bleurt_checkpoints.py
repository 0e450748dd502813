"""BLEURT checkpoints, opened as a metric: Hugging Face folders, and the folders that Google published for TensorFlow.

A folder for TensorFlow has bleurt_config.json, bert_config.json, vocab.txt or sent_piece.model, and a SavedModel with
the variables in variables/variables.index and its data files. There, `gelu` is the tanh approximation.
"""
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from lm import paths
from lm.data import tokenizers
from lm.evaluate.learned.bleurt import Bleurt
from lm.hf import pretrained, text_scorers, tf_checkpoint, weights
from lm.hf.config import Config
from lm.workdir.parsing import read_object

_FAMILY = next(family for family in text_scorers.FAMILIES if family.model_type == 'bleurt')
_WORDS = {'kernel': 'weight', 'gamma': 'weight', 'beta': 'bias', 'embedding_hidden_mapping_in': 'embedding_projection',
          'bert': 'bleurt'}


def load(name: str) -> Bleurt:
  """Opens a folder of either kind, or the id of a model on the hub, on the mesh that is set.

  Raises:
    FileNotFoundError, OSError: there is no such folder, or a file is missing.
    ValueError: the model is no scorer of pairs, or its files are damaged.
  """
  folder = paths.local(name)
  if (folder / 'bleurt_config.json').is_file() and not (folder / 'config.json').is_file():
    return _load_tensorflow(folder, name)
  loaded = pretrained.load(name)
  length = pretrained.tokenizer_length(loaded.folder)
  return Bleurt(loaded.model, loaded.params, loaded.tokenizer, name, _length(length, loaded.model.max_length))


def _length(length: Any, most: int) -> int:
  return min(length, most) if isinstance(length, int) and length > 3 else most


def _load_tensorflow(folder: pathlib.Path, name: str) -> Bleurt:
  settings = read_object(folder / 'bleurt_config.json')
  path = folder / settings.get('bert_config_file', 'bert_config.json')
  values = read_object(path)
  if values.get('hidden_act', 'gelu') == 'gelu':
    values['hidden_act'] = 'gelu_new'
  config = Config(values, str(path))
  model = _FAMILY.model(config)
  config.finish()
  tokenizer = tokenizers.load(folder, '[CLS]', '[SEP]')   # a SentencePiece model may have <s> and </s> too
  if tokenizer.vocab_size > model.vocab:
    raise ValueError(f'{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the weights only {model.vocab}; they '
                     'are not of one model')
  with tf_checkpoint.Variables(folder / 'variables' / 'variables') as variables:
    params = weights.load_params(model, _FAMILY, Renamed(variables))
  return Bleurt(model, params, tokenizer, name, _length(settings.get('max_seq_length'), model.max_length))


class Renamed(Mapping[str, Any]):
  """The variables of a BLEURT checkpoint under the names, and in the shapes, of the PyTorch port.

  Raises ValueError if the variables have no names of their own, as in a SavedModel of TensorFlow 2.
  """

  def __init__(self, variables: tf_checkpoint.Variables):
    self.release = variables.release
    self._variables = variables
    self._names = {_renamed(name): name for name in variables if not _is_of_training(name)}
    if any(name.endswith('.ATTRIBUTES/VARIABLE_VALUE') for name in variables):
      raise ValueError(f'{variables.prefix} names variables by their place in objects, as TensorFlow 2 does; this '
                       'reader needs the names of TensorFlow 1, such as bert/pooler/dense/kernel')

  def __getitem__(self, name: str) -> Any:
    value = self._variables[self._names[name]]
    return value.T if self._names[name].endswith('/kernel') else value

  def __iter__(self) -> Any:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def _is_of_training(name: str) -> bool:
  return name == 'global_step' or name.endswith(('/adam_m', '/adam_v'))


def _renamed(name: str) -> str:
  name = re.sub(r'^dense/', 'classifier/', name)
  name = re.sub(r'/layer_(\d+)/', r'/layer/\1/', name)
  words = [_WORDS.get(word, word) for word in name.split('/')]
  return '.'.join([*words, 'weight'] if words[-1].endswith('_embeddings') else words)
