"""Shapes of batches are few, wide enough, and follow from the length of a text alone."""
import itertools

import numpy as np
from helpers import meshes

from lm.evaluate import row_shapes


def test_widths_are_few_and_wide_enough():
  widths = [row_shapes.width(n, 512) for n in range(1, 513)]
  assert all(size >= n for n, size in enumerate(widths, 1))
  assert sorted({*widths}) == [32, 48, 64, 96, 128, 192, 256, 384, 512]
  assert row_shapes.width(40, 40) == 40 and row_shapes.width(513) == 768


def test_groups_have_each_place_once_and_rows_for_all_devices():
  shapes = [(int(a), int(b)) for a, b in np.random.default_rng(0).choice([32, 48, 256], (100, 2))]
  with meshes.on('fsdp:8'):
    groups = list(row_shapes.groups(shapes))
    rows = {shape: row_shapes.rows(shape) for shape in shapes}
  assert sorted(itertools.chain(*(places for places, _ in groups))) == list(range(100))
  for places, shape in groups:
    assert {shapes[place] for place in places} == {shape} and len(places) <= rows[shape]
  assert rows[32, 32] == 8 and rows[256, 32] == 8   # eight rows of 32 are 256 positions; each device has a row
  with meshes.on('fsdp:1'):
    assert row_shapes.rows((256, 32)) == 1
