"""A reward model scores whole dialogues, by the loss of Bradley and Terry."""
import jax
import numpy as np
import pytest
from helpers.meshes import on
from helpers.preferences import T, packed, pairs, tiny
from helpers.slow import slow

from lm import sharding
from lm.data.batch import Batch
from lm.models import reward
from lm.objectives import preference


@pytest.mark.parametrize('shape', ['fsdp:1', *slow('fsdp:4,tensor:2')])
def test_a_reward_is_of_the_whole_dialogue_and_the_loss_is_of_bradley_and_terry(shape):
  records, goal, model = pairs(), preference.reward(0.1), reward.Reward(tiny())
  batch = packed(records, goal)(0)
  with on(shape):
    params = jax.jit(lambda: jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0))))()
    loss, count, sums = jax.jit(lambda p, b: goal.loss(model.apply, p, b, None))(params, batch)
    alone = [x.tokens for pair in records for x in pair] + [np.zeros(1, np.int32)] * 2
    # One answer per row; causal, so padding has no effect.
    rows = Batch(np.stack([np.pad(x, (0, T - len(x))) for x in alone]))
    hidden = np.asarray(jax.jit(model.decoder.apply)(params['decoder'], rows).hidden, np.float64)
  ends = np.stack([row[len(x) - 1] for row, x in zip(hidden, alone)])
  scores = (ends @ np.asarray(params['score'], np.float64))[:-2].reshape(-1, 2)
  difference = scores[:, 0] - scores[:, 1]
  assert count == len(records)
  assert float(loss) == pytest.approx((np.log1p(np.exp(-difference)) + 0.1 * scores.sum(1) ** 2).sum(), rel=1e-4)
  right = float(sums['preference/accuracy'][0])
  assert right == (difference > 0).sum() == float(sums['correct']) and 0 < right < len(records)
  assert float(sums['preference/margin'][0]) == pytest.approx(difference.sum(), rel=1e-4, abs=1e-4)


def test_a_reward_model_starts_from_a_decoder():
  model = reward.Reward(tiny())
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    decoder_params = jax.jit(lambda: model.decoder.init(jax.random.key(5)))()
    params = model.start(lambda decoder: decoder_params)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert jax.tree.structure(params) == jax.tree.structure(shapes)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params['decoder'], decoder_params)))
