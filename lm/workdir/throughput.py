"""Training speed: tokens per second, the time to the end, and model FLOPs utilisation (MFU)."""
import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Dense bf16 peak in FLOP/s, per TensorCore of a TPU (a device has `num_cores` of them) and per GPU, by the exact name
# of the device. A slice of a GPU (MIG) or an unlisted variant has another name: it gets no MFU rather than a wrong one.
# Sources: Cloud TPU documentation, NVIDIA data sheets.
_TPU_CORE_PEAK = {
    'TPU v2': 22.5e12, 'TPU v3': 61.5e12, 'TPU v4': 137.5e12,
    'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5': 229.5e12, 'TPU v5p': 229.5e12,
    'TPU v6 lite': 918e12, 'TPU v6e': 918e12, 'TPU7x': 1153.5e12,
}  # yapf: disable
_GPU_PEAK = {
    'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA A100-PCIE-40GB': 312e12, 'NVIDIA A100 80GB PCIe': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H100 NVL': 835e12,
    'NVIDIA H200': 989e12, 'NVIDIA H200 NVL': 835e12, 'NVIDIA B200': 2250e12,
}  # yapf: disable


def peak_flops(device: Any) -> float | None:
  """Returns the dense bf16 peak of a JAX device in FLOP/s; None if it is unknown, as for a CPU."""
  if device.device_kind in _TPU_CORE_PEAK:
    return device.num_cores * _TPU_CORE_PEAK[device.device_kind]
  return _GPU_PEAK.get(device.device_kind)


def mfu(flops_per_token: float, tokens_per_second: float, devices: Sequence[Any]) -> float | None:
  """Returns model FLOPs utilisation (Chowdhery et al. 2022) of all devices, in [0, 1]; None if a peak is unknown."""
  peaks = [peak_flops(device) for device in devices]
  return flops_per_token * tokens_per_second / sum(peaks) if peaks and all(peaks) else None


class Throughput:
  """Measures training speed over the last `window` updates.

  The first update only starts the clock, so that compilation does not count. `tokens_before(step)` returns how many
  tokens a run has read when it reaches a step.
  """

  def __init__(self, tokens_before: Callable[[int], int], total_steps: int, window: int = 20,
               clock: Callable[[], float] = time.monotonic):
    self._tokens, self._total, self._clock = tokens_before, total_steps, clock
    self._marks: collections.deque[tuple[int, float]] = collections.deque(maxlen=window + 1)   # (step, seconds)
    self._start, self._paused = None, 0.0

  def update(self, step: int) -> None:
    now = self._clock()
    self._start = now if self._start is None else self._start
    self._marks.append((step, now - self._paused))

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Excludes the time inside (evaluation, checkpoints) from training; the ETA assumes a constant share of it."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += 0.0 if self._start is None else self._clock() - start

  def skip(self, steps: int) -> None:
    """Excludes `steps` steps, which the run skips, from the speed."""
    self._marks = collections.deque(((step + steps, now) for step, now in self._marks), self._marks.maxlen)

  @property
  def tokens_per_second(self) -> float | None:
    """The measured speed; None before two updates."""
    if len(self._marks) < 2:
      return None
    (first, start), (last, end) = self._marks[0], self._marks[-1]
    return (self._tokens(last) - self._tokens(first)) / max(end - start, 1e-9)

  @property
  def eta(self) -> float | None:
    """Seconds to the last step at the measured speed, with pauses in proportion; None before two updates."""
    speed = self.tokens_per_second
    if not speed:
      return None
    step, training_time = self._marks[-1]
    paused = self._paused / max(training_time - self._start, 1e-9)
    return (self._tokens(self._total) - self._tokens(step)) / speed * (1 + paused)
