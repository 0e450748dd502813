"""How much sooner one run reaches the loss of another."""
import pytest

from lm.studies import speed_up


def test_the_speed_up_is_the_ratio_of_compute_to_the_final_loss_of_the_other():
  slow = [(x, 4 - 2 * x) for x in (0.25, 0.5, 0.75, 1.)]      # ends at 2
  fast = [(x, 4 - 4 * x) for x in (0.25, 0.5, 0.75, 1.)]      # reaches 2 at a half
  assert speed_up.reached(fast, 2.) == 0.5 and speed_up.reached(fast, 2.5) == pytest.approx(0.375)
  assert speed_up.reached(slow, 1.9) is None and speed_up.reached(slow, 4.) == 0.25
  result = speed_up.speed_up([fast] * 3, [slow] * 3)
  assert result == pytest.approx((2., 2., 2.))
  assert speed_up.speed_up([slow] * 3, [fast] * 3) == pytest.approx((0.5, 0.5, 0.5))
  mixed = speed_up.speed_up([fast, slow], [slow, fast])
  assert mixed.value == pytest.approx(1) and mixed.low < 1 < mixed.high and mixed.low * mixed.high == pytest.approx(1)
  assert speed_up.speed_up([slow[-1:]], [fast]) is None
