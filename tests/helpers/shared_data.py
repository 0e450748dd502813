"""Published data that lies beside a checkout, in shared/data, and is no part of it."""
import pathlib

import pytest


def folder(name: str) -> pathlib.Path:
  """Returns the folder of a data set, above this checkout; skips the test where there is none."""
  for parent in pathlib.Path(__file__).parents[2:6]:
    if (path := parent / 'shared/data' / name).is_dir():
      return path
  pytest.skip(f'needs shared/data/{name} in a folder above the checkout')
