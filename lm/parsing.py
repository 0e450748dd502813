"""Text and JSON that others wrote: bytes that are not UTF-8, and nesting that is too deep to be read."""
import collections
import dataclasses
import json
from typing import Any


def json_value(text: str | bytes, **options: Any) -> Any:
  """As `json.loads`, whose only error is then ValueError: also where the text is nested too deep for its parser."""
  try:
    return json.loads(text, **options)
  except RecursionError:
    raise ValueError('its brackets are nested too deep to be read') from None


@dataclasses.dataclass(frozen=True)
class Decoder:
  """UTF-8 to text.

  Args:
    errors: what becomes of other bytes: 'strict' raises ValueError, 'replace' puts U+FFFD in their place, 'drop' leaves
      the document out.
  """
  errors: str = 'strict'

  def __post_init__(self):
    if self.errors not in ('strict', 'replace', 'drop'):
      raise ValueError(f"encoding_errors={self.errors!r} is none of 'strict', 'replace', 'drop'")

  def __call__(self, data: bytes, where: str, counts: collections.Counter) -> str | None:
    """The text, or None where it is left out; `counts` then says how many were, or were repaired."""
    try:
      return data.decode()
    except UnicodeDecodeError as error:
      if self.errors == 'strict':
        raise ValueError(f'{where}: byte {error.start} is not UTF-8; convert the file, or repair or leave '
                         'out such text by --encoding_errors=replace or drop') from None
    counts['invalid UTF-8 repaired' if self.errors == 'replace' else 'invalid UTF-8 dropped'] += 1
    return data.decode(errors='replace') if self.errors == 'replace' else None
