"""Training: a `Run` says what is trained, and `train` trains it from where it was left."""
from lm.train.checks import check, check_vocabulary
from lm.train.feed import DataFeed
from lm.train.interfaces import Constants, Data, Evaluator, Feed, Model, OpenData
from lm.train.interrupt import Stopped
from lm.train.loop import NotFinite, Result, result_step
from lm.train.pending import Pending, after_opening, opened
from lm.train.run import (
  Run,
  State,
  abstract_batch,
  abstract_constants,
  abstract_state,
  begin,
  identity,
  init,
  load_constants,
  placed,
  rebuilt,
  with_constants,
)
from lm.train.start import train
from lm.train.step import make_step, step_of

__all__ = ['Constants', 'Data', 'DataFeed', 'Evaluator', 'Feed', 'Model', 'OpenData', 'Stopped', 'NotFinite',
           'Result', 'result_step', 'Pending', 'after_opening', 'opened', 'Run', 'State', 'abstract_batch',
           'abstract_constants', 'abstract_state', 'begin', 'check', 'check_vocabulary', 'identity', 'init',
           'load_constants', 'make_step', 'placed', 'rebuilt', 'step_of', 'with_constants', 'train']
