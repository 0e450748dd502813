"""Flags of an optimizer and of its learning rate."""
import dataclasses
from typing import Any, Literal

from lm import optim
from lm.optim import averaging, groups, schedules
from lm.options.usage import check_used

ScheduleName = Literal['cosine', 'linear', 'constant', 'inverse_sqrt', 'stable_decay', 'one_cycle', 'steps']
OptimizerName = Literal['adamw', 'adam', 'nadamw', 'rmsprop', 'sgd', 'adafactor', 'lion', 'adan', 'muon', 'soap',
                        'sophia', 'schedule_free']


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Optimizer and learning rate.

  Args:
    optimizer: name of the optimizer, see lm/optim.
    lr: the highest learning rate; with muon, that of the matrices in blocks.
    schedule: learning rate after the warm-up.
    warmup: steps of linear warm-up, none for 100, or a tenth of the steps where that is less; one_cycle has none.
    cooldown: last steps of stable_decay and one_cycle, in which the rate falls; none for a fifth of the steps.
    milestones: steps at which the rate of --schedule=steps drops.
    drop: factor of the rate at each of the milestones, by default 0.1.
    weight_decay: decoupled weight decay; none for the default of the optimizer, mostly 0.1.
    decay: patterns of parameters that decay, such as blocks/*; by default all that the model does not declare as
      vectors (with muon, the matrices of its layers).
    rates: factors of the rate of some parameters as pattern=factor, such as embedding=4,*norm/*=0.5.
    embedding_rate: factor of the rate of the embedding; with muon, of all parameters but the matrices in blocks.
    l1: coefficient of the sum of the absolute values of the parameters that decay, in the gradient.
    l2: coefficient of half the sum of their squares, in the gradient too.
    average: decay of an exponential moving average of the parameters, which is then evaluated; 0 for none.
    clip: bound on the global norm of the gradient.
  """
  optimizer: OptimizerName = 'adamw'
  lr: float = 1e-3
  schedule: ScheduleName = 'cosine'
  warmup: int | None = None
  cooldown: int | None = None
  milestones: tuple[int, ...] = ()
  drop: float | None = None
  weight_decay: float | None = None
  decay: tuple[str, ...] = ()
  rates: tuple[str, ...] = ()
  embedding_rate: float | None = None
  l1: float = 0.
  l2: float = 0.
  average: float = 0.
  clip: float | None = 1.

  def make(self, steps: int, warmup: int, updates: groups.Factors = ()) -> optim.Optimizer:
    """Returns the optimizer.

    Args:
      steps: the steps of the run.
      warmup: the steps of warm-up where --warmup is none.
      updates: factors of the rate of some parameters, without weight decay, see `groups.Rates`.

    Raises:
      ValueError: flags contradict one another, or have no effect.
    """
    rate: optim.Rate = self.rate(steps, warmup)
    factors = groups.parse_factors(self.rates)
    if self.embedding_rate is not None and self.optimizer != 'muon':
      factors = (*factors, ('embedding', self.embedding_rate))
    if factors or updates:
      rate = groups.Rates(rate, factors, updates)
    options: dict[str, Any] = {'clip': self.clip}
    if self.weight_decay is not None:
      options['weight_decay'] = self.weight_decay
    if self.decay:
      options['decays'] = groups.matching(*self.decay)
    if self.optimizer == 'adam' and len(options) > 1:
      raise ValueError('--optimizer=adam has no weight decay; leave out --weight_decay and --decay, or take adamw')
    if self.embedding_rate is not None and self.optimizer == 'muon':
      options['other_rate'] = self.embedding_rate
    optimizer = getattr(optim, self.optimizer)(rate, **options)
    if self.l1 or self.l2:
      optimizer = optim.with_penalty(optimizer, self.l1, self.l2, options.get('decays', groups.decay_mask))
    return averaging.with_average(optimizer, self.average) if self.average else optimizer

  def rate(self, steps: int, warmup: int) -> schedules.Schedule:
    """Returns the schedule of the learning rate. Arguments and errors are those of `make`."""
    name = self.schedule
    if self.cooldown is not None and name not in ('stable_decay', 'one_cycle'):
      raise ValueError(f'--cooldown={self.cooldown} is for --schedule=stable_decay and one_cycle, not for {name}')
    if bool(self.milestones) != (name == 'steps'):
      raise ValueError(f'--milestones={",".join(map(str, self.milestones))} and --schedule={name} do not fit together; '
                       'give milestones with --schedule=steps, and with no other schedule')
    check_used({'drop': self.drop}, name == 'steps', '--schedule=steps')
    check_used({'warmup': self.warmup}, name != 'one_cycle', 'a --schedule other than one_cycle')
    drop = 0.1 if self.drop is None else self.drop
    if not 0 < drop < 1:
      raise ValueError(f'--drop={drop} is not between 0 and 1; give the factor of the rate at each milestone')
    cooldown = steps // 5 if self.cooldown is None else self.cooldown
    warmup = warmup if self.warmup is None else self.warmup
    match name:
      case 'stable_decay':
        return schedules.warmup_stable_decay(self.lr, steps, warmup, cooldown)
      case 'one_cycle':
        return schedules.one_cycle(self.lr, steps, cooldown)
      case 'steps':
        return schedules.warmup_piecewise(self.lr, steps, warmup, self.milestones, drop)
    return getattr(schedules, f'warmup_{name}')(self.lr, steps, warmup)


# Small models learn fastest with this rate for the matrices, and four times that for other parameters.
MUON = Optimizer(optimizer='muon', lr=0.015, schedule='linear', embedding_rate=4.)
