"""Everything that trains, generates or scores gives the numbers of one device on every kind of mesh.

`pytest tests/sharding/every_mesh_test.py -m long -n 0 -s` prints how far each of them differs, relative to the largest
number of an array, as the rows of a table.
"""
import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers.experts import KINDS
from helpers.meshes import on, random_params
from helpers.runs import RUN, Data

from lm import evaluate, generate, lora, sharding
from lm.data.batch import special
from lm.data.tokenizers import Bytes
from lm.doctor.small_batch import small_batch
from lm.evaluate import rewards
from lm.generate import module_drafts, prompt_lookup, unmask
from lm.models import attention, context, encoder, encoder_decoder, layers, prediction_heads, reward, stack, transformer
from lm.models.rotary import Rotary
from lm.objectives.diffusion import masked_diffusion
from lm.objectives.distillation import distil
from lm.objectives.masked import masked
from lm.objectives.multi_token import multi_token
from lm.objectives.next_token import next_token
from lm.objectives.preference import COLUMNS, dpo, preference
from lm.objectives.preference import reward as reward_objective
from lm.objectives.span_corruption import span_corruption
from lm.train.gradient import accumulate_gradients

MESHES = ['replica:8', 'fsdp:8', 'fsdp:4,tensor:2', 'fsdp:2,context:4', 'fsdp:2,expert:4', 'replica:2,fsdp:2,tensor:2',
          'fsdp:2,tensor:4', 'stage:2,fsdp:4']
VOCAB, WIDTH, ROWS, TIME = 401, 32, 8, 32   # a vocabulary that no mesh with `tensor` divides
LAYERS = 2   # one for each stage
MASK = '<|mask|>'


def decoder(feed_forward):
  block = layers.Block(attention.Attention(4, 4, 4, Rotary()), feed_forward, layers.RMSNorm(), layers.RMSNorm())
  return transformer.Transformer(VOCAB, WIDTH, stack.stacks([block] * LAYERS), layers.RMSNorm(), TIME, softcap=8.)


DECODER, EXPERTS = decoder(layers.FeedForward(8)), decoder(KINDS['deepseek'])
MULTI = prediction_heads.sequential(DECODER, 2)
T5 = encoder_decoder.t5(VOCAB, WIDTH, LAYERS, heads=4, head_size=4, hidden=8)
BERT = encoder.bert(VOCAB, WIDTH, LAYERS, heads=4, max_length=TIME)
REWARD = reward.Reward(DECODER)
EVERYWHERE = ('*',)
TRAINED = {   # model, objective, constants
    'decoder': (DECODER, next_token(), {}), 'experts': (EXPERTS, next_token(), {}),
    'adapters': (lora.Adapted(DECODER, 2, 4., EVERYWHERE), next_token(), {'base': DECODER}),
    'adapters of experts': (lora.Adapted(EXPERTS, 2, 4.), next_token(), {'base': EXPERTS}),
    'adapters, several tokens': (lora.Adapted(MULTI, 2, 4., ('embedding',)), multi_token(next_token()),
                                 {'base': MULTI}),
    'preferences': (DECODER, preference(dpo()), {}), 'reward': (REWARD, reward_objective(), {}),
    'distillation': (DECODER, distil(next_token(), EXPERTS.apply), {'teacher': EXPERTS}),
    'encoder-decoder': (T5, span_corruption(), {}), 'several tokens': (MULTI, multi_token(next_token()), {}),
    'masks': (BERT, masked(), {}), 'diffusion': (BERT, masked_diffusion(), {})}


def trained(name):
  """Returns a program of the loss of a small batch and its gradients, and the arguments of the program.

  It is the gradient of a step of training: where the mesh has stages, layers are a pipeline. Metrics are left out: a
  margin is a small difference of large sums, which rounding moves by a large part of it.
  """
  model, objective, constants = TRAINED[name]
  source = TIME if model is T5 else None
  columns = COLUMNS if name == 'preferences' else {}
  data = dataclasses.dataclass(frozen=True)(type('Columns', (Data,), {'columns': columns}))()
  run = dataclasses.replace(RUN, model=model, objective=objective, data=data)
  batch = small_batch(run, special(Bytes(objective.control), objective.control), ROWS, TIME, source)
  constants = {part: random_params(constant) for part, constant in constants.items()}

  def gradient(params, batch, constants):
    def mean_loss(params, batch, key):
      loss, weight, _ = objective.loss(model.apply, {**params, **constants}, batch, key)
      return loss / weight, ()
    return accumulate_gradients(mean_loss, params, batch, None, 1)

  mesh = jax.sharding.get_mesh()
  batch = batch if mesh.empty else sharding.shard_rows(batch, mesh)
  return jax.jit(gradient), (random_params(model), batch, constants)


def written(model, draft=None):
  prompts = ['ab', 'a longer', '']
  texts = generate.generate(model, random_params(model), Bytes(), prompts, generate.Sampling(2.), max_tokens=6,
                            draft=draft and draft())
  return np.stack([np.frombuffer(text.encode('utf8').ljust(64), np.uint8) for text in texts])


def filled():
  texts = unmask.generate(BERT, random_params(BERT), Bytes((MASK,)), ['ab', ''], unmask.Denoising(2), length=4)
  return np.stack([np.frombuffer(text.encode('utf8').ljust(64), np.uint8) for text in texts])


def texts_of(*lengths):
  rng = np.random.default_rng(0)
  return [rng.integers(0, VOCAB, n, dtype=np.int32) for n in lengths]


def read_activations():
  """Returns the activations of the small batch of a decoder, by name."""
  _, (params, batch, _) = trained('decoder')
  taps = tuple((name, context.read) for name in ('query', 'attended', 'up', 'output'))
  out = jax.jit(lambda params, batch: DECODER.apply(params, batch, taps=taps))(params, batch)
  return dict(out.readings)


COMPUTED = {
    'generation': functools.partial(written, DECODER), 'generation, experts': functools.partial(written, EXPERTS),
    'generation, encoder-decoder': functools.partial(written, T5),
    'drafts': functools.partial(written, MULTI, module_drafts.SelfSpeculation),
    'drafts of a lookup': functools.partial(written, DECODER, functools.partial(prompt_lookup.PromptLookup, 2)),
    'filled masks': filled,
    'scores': lambda: evaluate.log_probabilities(DECODER, random_params(DECODER), texts_of(9, 5)),
    'scores, experts': lambda: evaluate.log_probabilities(EXPERTS, random_params(EXPERTS), texts_of(9, 5)),
    'scores, encoder-decoder': lambda: evaluate.log_probabilities(T5, random_params(T5), texts_of(9, 5),
                                                                  texts_of(4, 8)),
    'rewards': lambda: rewards.rewards(REWARD, random_params(REWARD), texts_of(9, 5)),
    'activations': read_activations}


def result(name, mesh):
  with on(mesh):
    if name in COMPUTED:
      return jax.tree.map(np.asarray, COMPUTED[name]())
    program, arguments = trained(name)
    return jax.tree.map(np.asarray, program(*arguments))


def difference(actual, expected):
  """Returns the largest difference of two trees, relative to the largest number of an array."""
  return max(np.abs(np.float64(a) - b).max() / (np.abs(b).max() + 0.01)
             for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('name, meshes', [
    ('adapters of experts', ['fsdp:2,expert:4']),
    *(pytest.param(name, MESHES, marks=pytest.mark.long) for name in (*TRAINED, *COMPUTED))])
def test_numbers_are_those_of_one_device(name, meshes):
  expected = result(name, None)
  differences = [difference(result(name, mesh), expected) for mesh in meshes]
  print('|', ' | '.join([name, *(f'{value:.0e}' if value else '0' for value in differences)]), '|')
  assert max(differences) < 5e-6
