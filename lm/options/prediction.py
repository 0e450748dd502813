"""Flags of the training objective."""
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
    objective: training objective, see lm/objectives.
    denominator: number that the sum of losses is divided by, targets or sequences.
    label_smoothing: share of a target's probability that is spread over the vocabulary.
    z_loss: coefficient of the squared log of the softmax's denominator, such as 1e-4.
    noise: share of the tokens that masked and span_corruption hide, by default 0.15.
    mean_span: mean number of tokens of a span that span_corruption hides, by default 3.
    infill_rate: share of the pieces whose middle infill moves to the end, by default 0.5.
    control: names of the objective's control tokens in a tokenizer that has other names, the mask; the sentinels (of
      ul2, then its three modes); or the tokens before prefix, suffix and middle.
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
    """Returns the objective for rows of `length` positions."""
    noise = 0.15 if self.noise is None else self.noise
    mean_span = 3. if self.mean_span is None else self.mean_span
    terms = []
    if self.label_smoothing:
      terms.append(losses.smoothing(self.label_smoothing))
    if self.z_loss:
      terms.append(losses.z_loss(self.z_loss))
    options: dict[str, Any] = {
        'denominator': getattr(objectives, self.denominator),
        'token_loss': losses.token_loss(losses.nll, *terms) if terms else objectives.cross_entropy}

    def sentinels(rate):   # a span takes 1 / rate tokens and two sentinels of a row's positions
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
    """Raises ValueError where a flag has a value that the objective does not use, or that is out of range."""
    name = self.objective
    if self.control and name in ('next_token', 'prefix'):
      raise ValueError(f'--control={",".join(self.control)} names control tokens, and --objective={name} has none; '
                       'leave it out')
    check_used({'noise': self.noise}, name in ('masked', 'span_corruption'), '--objective=masked or span_corruption')
    check_used({'mean_span': self.mean_span}, name == 'span_corruption', '--objective=span_corruption')
    check_used({'infill_rate': self.infill_rate}, name == 'infill', '--objective=infill')
    if self.mean_span is not None and not self.mean_span >= 1:
      raise ValueError(f'--mean_span={self.mean_span} is less than 1 token; give 1 or more')


@dataclasses.dataclass(frozen=True)
class Ahead:
  """Prediction of several tokens.

  Args:
    predict_ahead: number of tokens after the next that are predicted too, by a module each, which can then draft text.
    ahead_modules: whether the modules form a chain that reads the tokens between, as in DeepSeek-V3 (the default), or
      stand side by side.
    ahead_weight: weight of the mean of their losses, by default 0.3.
  """
  predict_ahead: int = 0
  ahead_modules: Literal['sequential', 'parallel'] | None = None
  ahead_weight: float | None = None

  def apply(self, decoder: transformer.Transformer, prediction: Prediction, goal: objectives.Objective
              ) -> tuple[Any, objectives.Objective]:
    """Returns the model with these modules and its objective; the arguments where --predict_ahead is 0.

    Raises:
      ValueError: flags contradict one another, or have no effect.
    """
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
