"""Flags of adapters that are trained in place of a model's own parameters."""
import dataclasses

from lm import lora, train
from lm.options.usage import check_used


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters.

  Args:
    lora_rank: of adapters that are trained in place of all parameters, on those of the model that is started from; 0
      for none.
    lora_alpha: adapters are scaled by it over the rank; none for twice the rank.
  """
  lora_rank: int = 0
  lora_alpha: float | None = None

  def adapt(self, run: train.Run) -> train.Run:
    """The run with adapters, or itself where the rank is 0."""
    check_used({'lora_alpha': self.lora_alpha}, self.lora_rank > 0, '--lora_rank')
    return lora.adapt(run, self.lora_rank, self.lora_alpha)
