"""Flags of low-rank adapters, which are trained in place of the parameters of a model."""
import dataclasses

from lm import lora, train
from lm.options.usage import check_used


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters.

  Args:
    lora_rank: rank of adapters, which are trained in place of the parameters that training starts from; 0 for none.
    lora_alpha: adapters are multiplied by alpha / rank; none for twice the rank.
  """
  lora_rank: int = 0
  lora_alpha: float | None = None

  def adapt(self, run: train.Run) -> train.Run:
    """Returns the run with adapters; the run itself where the rank is 0."""
    check_used({'lora_alpha': self.lora_alpha}, self.lora_rank > 0, '--lora_rank')
    return lora.adapt(run, self.lora_rank, self.lora_alpha)
