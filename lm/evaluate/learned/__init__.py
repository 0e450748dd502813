"""Metrics that a neural network computes: BLEURT, and BERTScore.

A metric is an object `metric(candidates, references) -> list[Measure]`, where each candidate has a list of references.
"""
from lm.evaluate.learned.bert_score import BertScore
from lm.evaluate.learned.bleurt import Bleurt

__all__ = ['BertScore', 'Bleurt']
