"""Metrics of texts: against references, of their variety, and of programs that are executed.

A metric is an object `metric(candidates, references) -> list[Measure]`, where each candidate has a list of references.
"""
from lm.evaluate.texts.diversity import Distinct, Repetition, SelfBleu
from lm.evaluate.texts.exact import EditDistance, ExactMatch, LengthRatio
from lm.evaluate.texts.rouge import Rouge
from lm.evaluate.texts.sacre import Bleu, Chrf, Ter

__all__ = ['Distinct', 'Repetition', 'SelfBleu', 'EditDistance', 'ExactMatch', 'LengthRatio', 'Rouge', 'Bleu', 'Chrf',
           'Ter']
