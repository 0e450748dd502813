"""Evaluation of trained models: log-probabilities of texts, rewards, and file compressors as a baseline."""
from lm.evaluate.annotate import Annotated
from lm.evaluate.compression import compress
from lm.evaluate.rewards import Judge
from lm.evaluate.score import log_probabilities, pseudo_log_probabilities

__all__ = ['Annotated', 'compress', 'Judge', 'log_probabilities', 'pseudo_log_probabilities']
