"""Text and JSON that others wrote: bytes that are not UTF-8, and nesting that is too deep to be read."""
import collections
import dataclasses
import json
import re
from typing import Any

_HALF = re.compile('[\ud800-\udfff]')   # of a surrogate pair: whole ones are one character by now


def json_value(text: str | bytes, **options: Any) -> Any:
  """As `json.loads`, whose only error is then ValueError: also where the text is nested too deep for its parser."""
  try:
    return json.loads(text, **options)
  except RecursionError:
    raise ValueError('its brackets are nested too deep to be read') from None


@dataclasses.dataclass(frozen=True)
class TextDecoder:
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
    return self._mended(data.decode(errors='replace'), counts)

  def whole(self, text: str, counts: collections.Counter) -> str | None:
    """Text out of JSON, whose escapes may spell half of a surrogate pair: that is no UTF-8 either.

    'strict' leaves it to the cleaning, and to the tokenizer, which refuses what is left of it.
    """
    if self.errors == 'strict' or not _HALF.search(text):
      return text
    return self._mended(_HALF.sub('\ufffd', text), counts)

  def record(self, text: str, value: Any, where: str, counts: collections.Counter) -> str | None:
    """JSON, `text`, whose value is not cleaned: as `whole`, but 'strict' raises ValueError."""
    if r'\ud' not in text.lower() or not _HALF.search(spelled := json.dumps(value, ensure_ascii=False)):
      return text
    if self.errors == 'strict':
      raise ValueError(f'{where}: {ascii(_HALF.search(spelled)[0])} is half of a surrogate pair, no Unicode; repair or '
                       'leave out such text by --encoding_errors=replace or drop')
    return self.whole(spelled, counts)

  def _mended(self, repaired: str, counts: collections.Counter) -> str | None:
    counts['invalid UTF-8 repaired' if self.errors == 'replace' else 'invalid UTF-8 dropped'] += 1
    return repaired if self.errors == 'replace' else None
