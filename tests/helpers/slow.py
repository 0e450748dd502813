"""Parametrisations of which some cases are slow."""
import pytest


def slow(*cases):
  """The cases of a parametrisation, marked slow; a tuple has a value for each argument."""
  return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
