"""One run for each objective and each kind of model."""
import dataclasses

from helpers.runs import RUN, Data

from lm import train
from lm.models import (
  attention,
  encoder,
  encoder_decoder,
  latent,
  moe,
  prediction_heads,
  reward,
  rotary,
  stack,
  transformer,
)
from lm.models import layers as parts
from lm.objectives import (
  diffusion,
  distillation,
  infill,
  masked,
  multi_token,
  next_token,
  objective,
  preference,
  prefix,
  rating,
  span_corruption,
  supervised,
  ul2,
  unlikelihood,
)

VOCAB, LENGTH = 64, 16

DECODER = transformer.llama(VOCAB, 8, 1, heads=2, hidden=8, max_length=LENGTH)

TOP = distillation.TopK(2, VOCAB)


def decoder(mixer, feed_forward):
  """Returns a decoder of one block with these parts."""
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
    'multi_token': (prediction_heads.sequential(DECODER, 2), multi_token.multi_token(next_token.next_token())),
    'unlikelihood': (DECODER, unlikelihood.unlikelihood(next_token.next_token())),
    'distil': (DECODER, distillation.distil(next_token.next_token(), DECODER.apply)),
    'distil_stored': (DECODER, distillation.distil_stored(next_token.next_token(), TOP)),
    'dpo': (DECODER, preference.preference(preference.dpo())), 'kto': (DECODER, preference.kto()),
    'reward': (reward.Reward(DECODER), preference.reward()), 'rating': (encoder.scorer(BERT), rating.rating())}

COLUMNS = {'dpo': preference.COLUMNS, 'kto': preference.COLUMNS, 'distil_stored': TOP.columns}


def configured(name, **changes) -> train.Run:
  """Returns the run of a case, on data with the kind of record and the columns that its objective needs."""
  model, goal = CASES[name]
  members = {'kind': goal.needs, 'columns': COLUMNS.get(name, {}), 'source_length': 8 if name == 't5' else None}
  data = dataclasses.dataclass(frozen=True)(type('Columns', (Data,), members))()
  constants = (TEACHER,) if name == 'distil' else ()
  return dataclasses.replace(RUN, model=model, objective=goal, data=data, constants=constants, **changes)
