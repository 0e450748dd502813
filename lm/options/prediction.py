"""Flags of what is predicted."""
import dataclasses
import math
from typing import Any, Literal

from lm.data import tokenizers
from lm.models import prediction_heads, transformer
from lm.objectives import losses, multi_token
from lm.objectives import objective as objectives
from lm.objectives.infill import NAMES, infill
from lm.objectives.masked import masked
from lm.objectives.next_token import next_token
from lm.objectives.prefix import prefix
from lm.objectives.span_corruption import DECODER, span_corruption
from lm.objectives.ul2 import MODES, ul2
from lm.options.usage import check_used


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Objective.

  Args:
    objective: what is learned; see lm/objectives.
    denominator: what a loss is divided by, targets or sequences.
    label_smoothing: share of a target's probability that is spread over the vocabulary.
    z_loss: coefficient of the squared log of the softmax's denominator, such as 1e-4.
    noise: share of the tokens that masked and span_corruption hide, by default 0.15.
    mean_span: tokens of a hidden span of span_corruption, on average, by default 3.
    infill_rate: share of the pieces whose middle comes last, of infill, by default 0.5.
    control: names of the control tokens of the objective, where the tokenizer has others than ours, the mask; the
      sentinels (of ul2, then its three modes); or those before prefix, suffix and middle.
  """
  objective: Literal['next_token', 'prefix', 'masked', 'span_corruption', 'ul2', 'infill'] = 'next_token'
  denominator: Literal['token_mean', 'sequence_mean'] = 'token_mean'
  label_smoothing: float = 0.
  z_loss: float = 0.
  noise: float | None = None
  mean_span: float | None = None
  infill_rate: float | None = None
  control: tuple[str, ...] = ()

  def __post_init__(self):
    self._check()

  def make(self, length: int) -> objectives.Objective:
    """The objective, for rows of `length` positions."""
    noise = 0.15 if self.noise is None else self.noise
    mean_span = 3. if self.mean_span is None else self.mean_span
    losses_given = (losses.smoothing, self.label_smoothing), (losses.z_loss, self.z_loss)
    terms = [term(value) for term, value in losses_given if value]
    options: dict[str, Any] = {
        'denominator': getattr(objectives, self.denominator),
        'token_loss': losses.token_loss(losses.nll, *terms) if terms else objectives.cross_entropy}

    def sentinels(rate):   # of a row's positions, a span takes 1 / rate tokens and two sentinels
      return tokenizers.sentinels(max(32, math.ceil(length / (1 / rate + 2))))

    match self.objective:
      case 'prefix':
        return prefix(**options)
      case 'masked':
        return masked(noise, *self.control[:1], **options)
      case 'span_corruption':
        names = self.control or sentinels(noise / mean_span)
        return span_corruption(noise, mean_span, DECODER, names, **options)
      case 'ul2':
        return ul2(sentinels=self.control[:-3] or sentinels(0.5 / 3), modes=self.control[-3:] or MODES, **options)
      case 'infill':
        return infill(0.5 if self.infill_rate is None else self.infill_rate, names=self.control or NAMES, **options)
    return next_token(**options)

  def _check(self) -> None:
    """ValueError where a flag is given that the objective does not use, or means nothing."""
    name = self.objective
    if self.control and name in ('next_token', 'prefix'):
      raise ValueError(f'--control={",".join(self.control)} names tokens, of which --objective={name} needs none')
    check_used({'noise': self.noise}, name in ('masked', 'span_corruption'), '--objective=masked or span_corruption')
    check_used({'mean_span': self.mean_span}, name == 'span_corruption', '--objective=span_corruption')
    check_used({'infill_rate': self.infill_rate}, name == 'infill', '--objective=infill')
    if self.mean_span is not None and not self.mean_span >= 1:
      raise ValueError(f'--mean_span={self.mean_span} is not 1 token at least')


@dataclasses.dataclass(frozen=True)
class Ahead:
  """Prediction of several tokens.

  Args:
    predict_ahead: so many tokens further than the next are predicted too, by a module each, which can then draft text.
    ahead_modules: whether these are a chain that reads the tokens between, as in DeepSeek-V3 (the default), or stand
      side by side.
    ahead_weight: of the mean of their losses, by default 0.3.
  """
  predict_ahead: int = 0
  ahead_modules: Literal['sequential', 'parallel'] | None = None
  ahead_weight: float | None = None

  def applied(self, decoder: transformer.Transformer, prediction: Prediction, goal: objectives.Objective
              ) -> tuple[Any, objectives.Objective]:
    """The model with its modules, and the objective of both; what is given where nothing is predicted ahead."""
    check_used({'ahead_modules': self.ahead_modules, 'ahead_weight': self.ahead_weight}, self.predict_ahead > 0,
               '--predict_ahead')
    if not self.predict_ahead:
      return decoder, goal
    if prediction.objective != 'next_token':
      raise ValueError(f'--predict_ahead={self.predict_ahead} goes with --objective=next_token, not with '
                       f'{prediction.objective}')
    extend = prediction_heads.parallel if self.ahead_modules == 'parallel' else prediction_heads.sequential
    weight = 0.3 if self.ahead_weight is None else self.ahead_weight
    return extend(decoder, self.predict_ahead), multi_token.multi_token(goal, weight)
