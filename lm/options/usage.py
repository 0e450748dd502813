"""Which flags of a group are given, and whether they have an effect."""
import dataclasses
from collections.abc import Mapping
from typing import Any


def given(group: Any) -> dict[str, Any]:
  """The fields of a group that are not None, by name."""
  values = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
  return {name: value for name, value in values.items() if value is not None}


def check_used(flags: Mapping[str, Any], used: bool, by: str) -> None:
  """ValueError where a flag is given, not None, and has no effect; `by` are the flags that use it."""
  for name, value in flags.items():
    if value is not None and not used:
      raise ValueError(f'--{name}={value} has no effect without {by}; leave it out, or give that too')
