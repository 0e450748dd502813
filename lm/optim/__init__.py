"""Optimizers, learning rates, and averages of parameters."""
from lm.optim.averaging import averaged, averages, evaluated
from lm.optim.optimizers import (
  Rate,
  adafactor,
  adam,
  adamw,
  adan,
  advanced,
  balanced,
  chain,
  hutchinson,
  learning_rate,
  lion,
  muon,
  nadamw,
  penalised,
  random_signs,
  rmsprop,
  schedule_free,
  sgd,
  soap,
  sophia,
)

__all__ = ['averaged', 'averages', 'evaluated', 'Rate', 'adafactor', 'adam', 'adamw', 'adan', 'advanced', 'balanced',
           'chain', 'hutchinson', 'learning_rate', 'lion', 'muon', 'nadamw', 'penalised', 'random_signs', 'rmsprop',
           'schedule_free', 'sgd', 'soap', 'sophia']
