"""Metrics of texts: against references, of their variety, and of programs that are executed.

A metric is an object `metric(candidates, references) -> list[Measure]`, where each candidate has a list of references.
"""
from lm.evaluate.texts.diversity import Distinct, Repetition, SelfBleu
from lm.evaluate.texts.exact import EditDistance, ExactMatch, LengthRatio, SlotAccuracy
from lm.evaluate.texts.pass_at_k import PassAtK, Problem, problem
from lm.evaluate.texts.program_sandbox import Sandbox
from lm.evaluate.texts.rouge import Rouge
from lm.evaluate.texts.sacre import Bleu, Chrf, Ter
from lm.evaluate.texts.selection import NAMES, WITHOUT_REFERENCES, Settings, check_names

__all__ = ['Distinct', 'Repetition', 'SelfBleu', 'EditDistance', 'ExactMatch', 'LengthRatio', 'SlotAccuracy', 'PassAtK',
           'Problem', 'problem', 'Sandbox', 'Rouge', 'Bleu', 'Chrf', 'Ter', 'NAMES', 'WITHOUT_REFERENCES', 'Settings',
           'check_names']
