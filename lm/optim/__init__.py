"""Optimizers, learning rates, and averages of parameters."""
from lm.optim.averaging import averaged, averages, evaluated
from lm.optim.groups import Optimizer, bound
from lm.optim.optimizers import (
  Rate,
  adafactor,
  adam,
  adamw,
  adan,
  advanced,
  chain,
  hutchinson,
  learning_rate,
  lion,
  muon,
  nadamw,
  random_signs,
  rmsprop,
  schedule_free,
  sgd,
  soap,
  sophia,
)
from lm.optim.wrappers import balanced, penalised

__all__ = ['averaged', 'averages', 'evaluated', 'Optimizer', 'Rate', 'adafactor', 'adam', 'adamw', 'adan', 'advanced',
           'balanced', 'bound', 'chain', 'hutchinson', 'learning_rate', 'lion', 'muon', 'nadamw', 'penalised',
           'random_signs', 'rmsprop', 'schedule_free', 'sgd', 'soap', 'sophia']
