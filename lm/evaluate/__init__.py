"""What a trained model is worth: scores of texts, rewards, and what file compressors make of the same text."""
from lm.evaluate.annotate import Annotated
from lm.evaluate.compression import compress
from lm.evaluate.rewards import Judge
from lm.evaluate.score import log_probabilities, pseudo_log_probabilities

__all__ = ['Annotated', 'compress', 'Judge', 'log_probabilities', 'pseudo_log_probabilities']
