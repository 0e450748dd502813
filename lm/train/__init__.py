"""Training: a `Run` describes what is trained, and `train` trains it from the newest checkpoint in its workdir."""
from lm.train.checks import check, check_vocabulary
from lm.train.feed import DataFeed
from lm.train.guard import GoBack, Skip
from lm.train.interfaces import Constants, Data, Evaluator, Feed, Model, OpenData
from lm.train.interrupt import Stopped
from lm.train.not_finite import NotFinite
from lm.train.pending import Pending, after_opening, build
from lm.train.result import Result, result_step
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
  run_from_json,
  with_constants,
  with_shardings,
)
from lm.train.start import Start, train
from lm.train.step import make_step, step_function

__all__ = ['Constants', 'Data', 'DataFeed', 'Evaluator', 'Feed', 'GoBack', 'Model', 'NotFinite', 'OpenData', 'Pending',
           'Result', 'Run', 'Skip', 'Start', 'State', 'Stopped', 'abstract_batch', 'abstract_constants',
           'abstract_state',
           'after_opening', 'begin', 'build', 'check', 'check_vocabulary', 'identity', 'init', 'load_constants',
           'make_step', 'result_step', 'run_from_json', 'step_function', 'train', 'with_constants', 'with_shardings']
