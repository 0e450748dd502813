"""Which flags of a group have an explicit value, and whether that has an effect."""
import dataclasses
from collections.abc import Mapping
from typing import Any


def explicit_values(group: Any) -> dict[str, Any]:
  """Returns the fields of a group that are not None, by name."""
  values = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
  return {name: value for name, value in values.items() if value is not None}


def check_used(flags: Mapping[str, Any], used: bool, by: str) -> None:
  """Raises ValueError where flags are not None and not used; `by` names the flags that would use them."""
  if used:
    return
  for name, value in flags.items():
    if value is not None:
      raise ValueError(f'--{name}={value} has no effect without {by}; leave it out, or give that too')
