"""Optimizers, learning rates, and averages of parameters."""
from lm.optim.averaging import evaluation_params, has_average, with_average
from lm.optim.groups import Optimizer, bind
from lm.optim.optimizers import (
  Rate,
  adafactor,
  adam,
  adamw,
  adan,
  advance,
  chain,
  learning_rate,
  lion,
  muon,
  nadamw,
  rmsprop,
  schedule_free,
  sgd,
  soap,
)
from lm.optim.second_order import hutchinson, random_signs, sophia
from lm.optim.wrappers import with_penalty, with_router_balance

__all__ = ['Optimizer', 'Rate', 'adafactor', 'adam', 'adamw', 'adan', 'advance', 'bind', 'chain', 'evaluation_params',
           'has_average', 'hutchinson', 'learning_rate', 'lion', 'muon', 'nadamw', 'random_signs', 'rmsprop',
           'schedule_free', 'sgd', 'soap', 'sophia', 'with_average', 'with_penalty', 'with_router_balance']
