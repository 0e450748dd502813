"""A batch, or a part of it, that is one row for each device: every objective, every kind of model, on meshes."""
import dataclasses

import jax
import numpy as np
import pytest
from train_test import RUN, Bigram, Data, on

from lm import noise, sharding, train
from lm.data.batches import KINDS, Batch
from lm.models import attention, encoder, encoder_decoder, latent, moe, multi_token, reward, rotary, stack, transformer
from lm.models import layers as parts
from lm.objectives import (
  diffusion,
  distillation,
  infill,
  masked,
  next_token,
  objective,
  preference,
  prefix,
  span_corruption,
  supervised,
  ul2,
  unlikelihood,
)
from lm.objectives import multi_token as further

VOCAB, LENGTH = 64, 16
DECODER = transformer.llama(VOCAB, 8, 1, heads=2, hidden=8, max_length=LENGTH)
TOP = distillation.TopK(2, VOCAB)


def decoder(mixer, feed_forward):
  block = parts.Block(mixer, feed_forward, parts.RMSNorm(), parts.RMSNorm())
  return transformer.Transformer(VOCAB, 8, stack.stacks([block]), parts.RMSNorm(), LENGTH)


EXPERTS = decoder(latent.LatentAttention(2, 4, 4, 4, 4, 4),
                  moe.Experts(moe.SigmoidGroupRouter(2, groups=2, top_groups=1), 4, 8))
INTERLEAVED = decoder(attention.Attention(2, 2, 4, rotary.Rotary(interleaved=True)), parts.FeedForward(8))
T5 = encoder_decoder.t5(VOCAB, 8, 1, heads=2, head_size=4, hidden=8)
BERT = encoder.bert(VOCAB, 8, 1, heads=2, max_length=LENGTH)
TEACHER = train.Constants('teacher', DECODER, None)

CASES = {
    'next_token': (DECODER, next_token.next_token()), 'experts': (EXPERTS, next_token.next_token()),
    'interleaved': (INTERLEAVED, next_token.next_token()), 'prefix': (DECODER, prefix.prefix()),
    'sequence_mean': (DECODER, next_token.next_token(objective.sequence_mean)), 'masked': (BERT, masked.masked()),
    'spans': (DECODER, span_corruption.span_corruption(layout=span_corruption.DECODER)), 'ul2': (DECODER, ul2.ul2()),
    't5': (T5, span_corruption.span_corruption()), 'infill': (DECODER, infill.infill()),
    'diffusion': (BERT, diffusion.masked_diffusion()), 'supervised': (DECODER, supervised.supervised()),
    'multi_token': (multi_token.sequential(DECODER, 2), further.multi_token(next_token.next_token())),
    'unlikelihood': (DECODER, unlikelihood.unlikelihood(next_token.next_token())),
    'distil': (DECODER, distillation.distil(next_token.next_token(), DECODER.apply)),
    'distil_stored': (DECODER, distillation.distil_stored(next_token.next_token(), TOP)),
    'dpo': (DECODER, preference.preference(preference.dpo())), 'kto': (DECODER, preference.kto()),
    'reward': (reward.Reward(DECODER), preference.reward())}
COLUMNS = {'dpo': preference.COLUMNS, 'kto': preference.COLUMNS, 'distil_stored': TOP.columns}


def configured(name, **changes) -> train.Run:
  model, made = CASES[name]
  members = {'kind': made.needs, 'columns': COLUMNS.get(name, {}), 'source_length': 8 if name == 't5' else None}
  data = dataclasses.dataclass(frozen=True)(type('Columns', (Data,), members))()
  constants = (TEACHER,) if name == 'distil' else ()
  return dataclasses.replace(RUN, model=model, objective=made, data=data, constants=constants, **changes)


def test_the_cases_are_of_every_kind_of_data():
  assert {made.needs for _, made in CASES.values()} == set(KINDS)


@pytest.mark.parametrize('name, mesh, accumulate', [
    *((name, '1x1', 1) for name in CASES), *((name, '2x1', 2) for name in ('next_token', 'experts', 'dpo')),
    ('experts', '1x2', 1)])
def test_one_row_is_trained_by_any_objective(name, mesh, accumulate):
  with jax.set_mesh(on(mesh)):
    train.check(configured(name, batch=accumulate * on(mesh).shape['data'], accumulate=accumulate), on(mesh))


@pytest.mark.parametrize('mesh', ['1x1', '1x2', '2x1'])
def test_parts_of_one_row_add_up_to_the_batch(mesh):
  run = dataclasses.replace(RUN, model=Bigram(dropout=0., vocab=VOCAB), batch=4)
  rng = np.random.default_rng(0)
  batch = Batch(*rng.integers(0, VOCAB, (2, 4, LENGTH)).astype('i4'), rng.uniform(0.5, 2, (4, LENGTH)).astype('f4'))
  losses = []
  with jax.set_mesh(on(mesh)):
    rows = sharding.shard_rows(batch, on(mesh))
    for accumulate in (1, 4 // on(mesh).shape['data']):
      state, step = jax.jit(lambda: train.init(run))(), train.make_step(dataclasses.replace(run, accumulate=accumulate))
      for _ in range(2):
        state, metrics = step(state, rows)
        losses += [float(metrics['loss']), float(metrics['grad_norm'])]
  assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)


def test_the_noise_scale_reads_one_row():
  with jax.set_mesh(on('1x1')):
    gradient = noise.gradient_of(DECODER.apply, next_token.next_token(), {})
    shapes = jax.eval_shape(gradient, jax.eval_shape(DECODER.init, jax.random.key(0)),
                            train.abstract_batch(configured('next_token', batch=1), on('1x1')))
  assert shapes[1].shape == ()
