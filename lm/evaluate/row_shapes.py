"""Shapes of batches of texts, each text in a row of its own.

The width of a row and the number of rows in its batch follow from the length of the text alone. Programs for other
shapes round differently, so that a text that always meets the same one has the same result to the last bit, whatever
is computed beside it.
"""
from collections.abc import Iterator, Sequence

from lm import sharding


def width(length: int, most: int | None = None) -> int:
  """Returns the width of a row for `length` tokens: 32, 48, 64, 96, 128, ..., so that few programs are compiled."""
  size = max(32, 1 << (length - 1).bit_length())
  if size > 32 and length <= 3 * size // 4:
    size = 3 * size // 4
  return size if most is None else min(size, most)


def rows(shape: tuple[int, ...]) -> int:
  """Returns how many rows a batch has, of which each has the widths `shape`, such as of a text and of its source.

  They are enough positions for efficient matrix products, and split evenly over the mesh.
  """
  positions = 256 if sharding.platform() == 'cpu' else 8192
  return sharding.padded_rows(max(positions // max(shape), 1))


def groups(shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
  """Yields (places, shape): which of `shapes` make the rows of a batch. They are alike, and at most `rows(shape)`."""
  places: dict[tuple[int, ...], list[int]] = {}
  for place, shape in enumerate(shapes):
    places.setdefault(shape, []).append(place)
  for shape, group in sorted(places.items()):
    for first in range(0, len(group), rows(shape)):
      yield group[first:first + rows(shape)], shape
