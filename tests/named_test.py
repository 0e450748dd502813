"""A flag that names a model refuses one of another kind in one line, before anything is trained."""
import importlib
import pathlib

import learned_metric
import pytest

from lm import load, named, signature, train
from lm.data import tokenizers
from lm.models import Reward, encoder, encoder_decoder, kinds, prediction_heads, transformer

DECODER = transformer.llama(320, 16, 1, heads=2, max_length=512)
MODELS = {'a decoder': DECODER, 'a reward model': Reward(DECODER), 'an encoder': encoder.bert(320, 16, 1, 2, 256),
          'an encoder-decoder': encoder_decoder.t5(320, 16, 1, 2, 8, 64, gated=True, tied=False)}
# The flags of scripts that name models, and the kind that each is for.
FLAGS = [('pretrain', 'model', {}, 'a decoder'), ('pretrain', 'init', {}, 'a decoder'),
         ('finetune_chat', 'model', {}, 'a decoder'), ('preference', 'model', {}, 'a decoder'),
         ('preference', 'model', {'method': 'reward'}, 'a decoder'), ('distill', 'teacher', {}, 'a decoder'),
         ('distill', 'student', {'teacher': 'a decoder'}, 'a decoder'),
         ('denoise', 'model', {}, 'an encoder-decoder'), ('denoise', 'model', {'objective': 'masked'}, 'an encoder')]


@pytest.fixture(autouse=True)
def opened(monkeypatch):
  """Folders that are called as the kind of the model in them."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / 'experiments')
  monkeypatch.setattr(load, 'open_base', lambda name, dtype=None, with_tokenizer=True: load.BaseModel(
      MODELS[name], tokenizers.Bytes(), None, lambda model: None))


@pytest.mark.parametrize('script, flag, others, needed', FLAGS)
def test_a_model_of_another_kind_is_refused(script, flag, others, needed):
  experiment = importlib.import_module(script).experiment
  for name in MODELS:
    pending = signature.call(experiment, {**others, flag: name})
    if name == needed:
      assert isinstance(pending.open(), train.Run)
    else:
      with pytest.raises(ValueError, match=f'^--{flag}={name} is {name}, and what is needed is {needed}, such as .*; '
                                           f'give another --{flag}$'):
        pending.open()


def test_init_of_another_kind_is_refused_and_decoders_that_predict_further_tokens_are_decoders(texts_run):
  for name in MODELS:
    if name == 'a decoder':
      assert load.start_from(texts_run, name).start is not None
    else:
      with pytest.raises(ValueError, match=f'^--init={name} is {name}, and this run trains a decoder; give another'):
        load.start_from(texts_run, name)
  assert kinds.in_words(prediction_heads.sequential(DECODER, 1)) == 'a decoder'


@pytest.fixture
def texts_run():
  pretrain = importlib.import_module('pretrain')
  return train.build(pretrain.experiment(model='a decoder'))


def test_what_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
  monkeypatch.undo()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match=r'^--teacher=runs/quickstart is not there; make it with "python '
                                              r'experiments/quickstart.py", or give another --teacher$'):
    named.decoder('--teacher', 'runs/quickstart').open()
  with pytest.raises(FileNotFoundError, match='^./missing is no folder$'):
    named.decoder('--teacher', './missing').open()


def test_the_best_checkpoint_of_what_is_no_run_is_refused():
  with pytest.raises(ValueError, match='--best is for the checkpoints of a run, and --model=gpt2 is none'):
    load.run_or_model(None, 'gpt2', True)


def test_the_shape_of_a_scorer_that_starts_from_another_is_refused():
  with pytest.raises(ValueError, match='--width=8 is for a new encoder, and --init=bert gives one'):
    learned_metric.experiment(init='bert', width=8)
