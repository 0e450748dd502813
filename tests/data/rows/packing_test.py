"""Records in rows: a model reads each dialogue of a packed row as it reads it alone."""
import jax
import numpy as np

from lm import sharding
from lm.data.batch import Batch, Dialogue, Pair, Special
from lm.data.rows.packed_records import Packed
from lm.models import transformer
from lm.objectives import preference

V, T = 16, 24


class Records(list):
  """Records in memory."""
  @property
  def positions(self):
    return np.array([sum(len(x.tokens) - 1 for x in record) for record in self])


def pairs(count: int) -> Records:
  rng = np.random.default_rng(0)

  def dialogue(prompt):
    tokens = np.r_[0, prompt, rng.integers(2, V, rng.integers(1, 6))].astype(np.int32)
    return Dialogue(tokens, np.arange(len(tokens)) > len(prompt))
  prompts = [rng.integers(2, V, rng.integers(0, 4)) for _ in range(count)]
  return Records(Pair(dialogue(prompt), dialogue(prompt)) for prompt in prompts)


def test_a_pair_is_read_as_its_dialogues_alone_with_learned_positions():
  records, model = pairs(6), transformer.gpt2(V, 16, 1, 2, T)
  batch = Packed(preference.preference(preference.dpo()), Special(0, 1, V, ()), T, 4, records=records, repeat=False)(0)
  rng = np.random.default_rng(1)
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype('f4'),
                          jax.eval_shape(model.init, jax.random.key(0)))
    scores = jax.jit(lambda batch: preference.reference(model.apply, params, batch)['reference'])
    packed = np.asarray(scores(batch._replace(weights=None)))
    dialogues = [x.tokens for pair in records for x in pair]
    rows = [np.stack([np.pad(x, (0, T - len(x))) for x in side])
            for side in ([x[:-1] for x in dialogues], [x[1:] for x in dialogues])]
    alone = np.asarray(scores(Batch(*rows)))
  count = 0
  for row, segments, tokens in zip(packed, batch.segments, batch.tokens):
    for segment in range(1, segments.max() + 1):
      span = segments == segment
      same = [i for i, x in enumerate(dialogues) if np.array_equal(x[:-1], tokens[span])
              and np.allclose(alone[i, :span.sum()], row[span], atol=1e-4)]
      assert same, (row[span], tokens[span])
      count += 1
  assert count == len(dialogues)
