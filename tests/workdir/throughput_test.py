import types

import pytest

from lm.workdir import throughput


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


def test_throughput_leaves_out_compilation_and_pauses_and_the_eta_follows():
  clock = Clock()
  speed = throughput.Throughput(lambda step: 1000 * step, total_steps=100, window=4, clock=clock)
  clock.now += 60  # compilation
  speed.update(1)
  assert speed.tokens_per_second is None and speed.eta is None
  for step in range(2, 11):
    clock.now += 0.5
    speed.update(step)
  assert speed.tokens_per_second == pytest.approx(2000) and speed.eta == pytest.approx(45)
  for step in range(11, 15):  # slower: the window forgets
    clock.now += 2
    speed.update(step)
  assert speed.tokens_per_second == pytest.approx(500) and speed.eta == pytest.approx(86 * 2)
  with speed.pause():
    clock.now += 12.5  # as long as the training since step 1
  speed.update(14)
  assert speed.eta == pytest.approx(86 * 2 * 2)


def device(kind, cores=None):
  return types.SimpleNamespace(device_kind=kind, **({'num_cores': cores} if cores else {}))


def test_mfu_against_published_chips_and_never_a_guess():
  # Peak of a whole chip, PFLOP/s: a v3 chip is two devices of one core, a v4 chip one device of two, v7x two of one.
  for chip, peak in [([device('TPU v3', 1)] * 2, 0.123), ([device('TPU v4', 2)], 0.275),
                     ([device('TPU v4', 1)] * 2, 0.275),
                     ([device('TPU v5 lite', 1)], 0.197), ([device('TPU7x', 1)] * 2, 2.307),
                     ([device('NVIDIA H100 80GB HBM3')], 0.989)]:
    assert throughput.mfu(6e9, 1e5, chip) == pytest.approx(6e14 / (peak * 1e15))
  unknown = [device('cpu'), device('TPU v9', 1), device('NVIDIA A100-SXM4-40GB MIG 1g.5gb'), device('NVIDIA H20')]
  assert all(throughput.mfu(6e9, 1e5, [d]) is None for d in unknown) and throughput.mfu(6e9, 1e5, []) is None
  assert throughput.mfu(6e9, 1e5, [device('NVIDIA H200'), device('cpu')]) is None
