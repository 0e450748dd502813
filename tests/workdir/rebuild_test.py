"""Objects are rebuilt from JSON; JSON that names anything else builds nothing."""
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import Bigram

from lm import lora
from lm.data import dataset, tokenizers
from lm.data.batch import Batch, Pair
from lm.data.chat import conversation, dialogues
from lm.data.text.source import Source
from lm.evaluate import annotate
from lm.models import encoder_decoder, layers, mup, prediction_heads, reward, transformer
from lm.objectives import (
  diffusion,
  distillation,
  infill,
  losses,
  masked,
  multi_token,
  next_token,
  objective,
  preference,
  prefix,
  span_corruption,
  supervised,
  ul2,
  unlikelihood,
)
from lm.train import interfaces
from lm.workdir import rebuild
from lm.workdir.describe import describe


def again(value):
  tree = json.loads(json.dumps(rebuild.stored(value)))
  assert rebuild.outside(tree) == []
  return rebuild.rebuilt(tree)


DECODER = transformer.llama(40, 16, 2, 2, max_length=16)
NEXT = next_token.next_token(objective.sequence_mean, losses.token_loss(losses.nll, losses.smoothing(0.1)))


@pytest.mark.parametrize('model', [
    DECODER, transformer.gpt2(40, 16, 2, 2, 16, dtype=jnp.bfloat16, dropout=0.1), reward.Reward(DECODER),
    lora.Adapted(DECODER, 2, 4.), prediction_heads.parallel(DECODER, 2), prediction_heads.sequential(DECODER, 2),
    mup.parametrised(DECODER, 8, 1), encoder_decoder.t5(40, 16, 1, 2, 8, 32)], ids=lambda model: type(model).__name__)
def test_a_model_is_built_again(model):
  built = again(model)
  assert type(built) is type(model) and built == model and describe(built) == describe(model)


OBJECTIVES = [
    NEXT, next_token.next_token(), masked.masked(), prefix.prefix(), infill.infill(), supervised.supervised(),
    span_corruption.span_corruption(), ul2.ul2(), diffusion.masked_diffusion(), unlikelihood.unlikelihood(NEXT),
    multi_token.multi_token(NEXT), preference.preference(preference.dpo(0.2)), preference.kto(), preference.reward(),
    distillation.distil(NEXT, DECODER.apply, distillation.JensenShannon(0.3), 2.),
    distillation.distil_stored(NEXT, distillation.TopK(3, 40))]


@pytest.mark.parametrize('objective', OBJECTIVES, ids=lambda objective: objective.loss.__qualname__.partition('.')[0])
def test_an_objective_is_built_again_with_the_numbers_that_it_holds(objective):
  built = again(objective)
  assert built.prompt is objective.prompt or built.prompt.__closure__
  assert built.needs is objective.needs and built.control == objective.control
  assert describe(built, inside=True) == describe(objective, inside=True)


def test_a_loss_that_was_built_again_is_the_same_bit_for_bit():
  rng = np.random.default_rng(0)
  params = jax.jit(DECODER.init)(jax.random.key(0))
  batch = Batch(*rng.integers(0, 40, (2, 2, 16)).astype('i4'), rng.random((2, 16)).astype('f4'))
  values = [jax.jit(lambda params, loss=loss: loss(DECODER.apply, params, batch, None))(params)
            for loss in (NEXT.loss, again(NEXT).loss, next_token.next_token().loss)]
  assert jax.tree.all(jax.tree.map(np.array_equal, values[0], values[1]))
  assert values[0][0] != values[2][0]


def test_data_is_built_again_without_its_text():
  source = Source('numbers', {'train': ['1', '2'], 'validation': ['3']}, 'fingerprint')
  built = again(dataset.Text(source, tokenizers.Bytes(), 16))
  assert (built.source.name, built.source.fingerprint, list(built.source.splits)) == (
      'numbers', 'fingerprint', ['train', 'validation'])
  assert built.tokenizer is None and built.length == 16
  chat = dialogues.Dialogues(source, tokenizers.Bytes(), 16, Pair, conversation.Plain('\n'), answer='(.)')
  built = again(chat)
  assert (built.kind, built.template, built.keys, built.answer) == (Pair, chat.template, chat.keys, '(.)')
  constants = interfaces.Constants('teacher', DECODER, jnp.abs)
  marked = annotate.Annotated(chat, constants, preference.COLUMNS, preference.reference)
  assert rebuild.outside(rebuild.stored(marked)) == ['jax.numpy:abs']


def test_objects_of_no_package_are_refused_by_name():
  for value, name in ((Bigram(), 'helpers.runs:Bigram'), (layers.FeedForward(4, os.system), 'posix:system'),
                      (functools.partial(again, 3), 'rebuild_test:again'), (object(), 'builtins:object')):
    assert rebuild.outside(rebuild.stored({'a': (value,)})) == [name]


def function(name, **fields):
  return {'function': name, **fields}


def nested(depth):
  tree = 1
  for _ in range(depth):
    tree = {'tuple': [tree]}
  return tree


HOSTILE = [
    function('os:system'), function('posix:system'), function('builtins:eval'), {'type': 'subprocess:Popen'},
    {'class': 'subprocess:Popen', 'fields': {'args': ['touch', 'mark']}},
    {'partial': function('os:system'), 'args': {'tuple': ['touch mark']}, 'keywords': {'dict': []}},
    function('lm.data.text.source:importlib.import_module'),     # what a module merely imports
    function('lm.data.dataset:pathlib.Path.touch'), function('lm.data.text.source:require'),
    function('lm.models.layers:jax.numpy.save'), function('lm.models.evil:run'), function('lm.launch.program:start'),
    function('lm.scripts:function'), function('lm.workdir.atomic:write'), function('jax.nn:__builtins__'),
    function('lm.models.layers:Block.__init__.__globals__'), function('lm.models..layers:Block'), function(':'),
    function('jax.nn:initializers'), function('lm.models.layers:Block'), {'type': 'lm.models.layers:silu_gated'},
    {'class': 'lm.models.layers:Block', 'fields': {'__class__': 1}}, {'class': 'lm.data.store:_Build', 'fields': {}},
    {'class': 'lm.models.attention:Path', 'fields': {}},
    {'method': '__reduce__', 'of': {'path': 'mark'}}, {'method': 'touch', 'of': {'path': 'mark'}},
    {'method': '__init_subclass__', 'of': {'class': 'lm.models.layers:LayerNorm', 'fields': {}}},
    function('lm.objectives.losses:smoothing.<locals>.<lambda>', number=7, cells={}, defaults=None, keywords=None),
    function('lm.objectives.losses:z_loss.<locals>.<lambda>', number=0, cells={'x': 1}, defaults=None, keywords=None),
    function('lm.objectives.losses:no.<locals>.f', number=0, cells={}, defaults=None, keywords=None),
    {'class': 'lm.models.layers:Block', 'fields': {}}, {'dict': [[{'list': []}, 1]]}, {'dtype': 'nothing'},
    {'class': 'lm.train.interfaces:Constants', 'fields': {'name': 1}},
    nested(150), nested(100_000), {'tuple': [0] * 200_000}, {'what': 1}, {}, [1]]


@pytest.mark.parametrize('tree', HOSTILE, ids=range(len(HOSTILE)))
def test_what_may_not_be_built_is_refused_in_one_line(tree, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(rebuild.Unknown) as error:
    rebuild.rebuilt(tree)
  assert '\n' not in str(error.value) and len(str(error.value)) < 500
  assert list(pathlib.Path().iterdir()) == []
