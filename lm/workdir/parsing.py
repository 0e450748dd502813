"""Reads text and JSON from untrusted files: bytes that are not UTF-8, surrogates, and brackets nested too deep."""
import collections
import dataclasses
import json
import pathlib
import re
from typing import Any

_LONE_SURROGATE = re.compile('[\ud800-\udfff]')   # the JSON parser has joined complete pairs into one character


def json_value(text: str | bytes, **options: Any) -> Any:
  """Like `json.loads`, but raises ValueError also where the text is nested too deep for the parser."""
  try:
    return json.loads(text, **options)
  except RecursionError:
    raise ValueError('its brackets are nested too deep to be read') from None


def read_object(path: pathlib.Path, unique: bool = False) -> dict[str, Any]:
  """Reads a JSON object from a file.

  Args:
    path: the file.
    unique: whether a name that is twice in an object is an error; otherwise its last value counts.

  Raises:
    ValueError: the file does not hold an object.
  """
  try:
    values = json_value(path.read_bytes(), object_pairs_hook=_unique if unique else None)
  except ValueError as error:
    raise ValueError(f'{path} cannot be read as JSON: {error}') from None
  if not isinstance(values, dict):
    raise ValueError(f'{path} holds no JSON object, {{...}}')
  return values


def read_object_if_any(path: pathlib.Path) -> dict[str, Any]:
  """Like `read_object`; returns an empty object where there is no file."""
  return read_object(path) if path.is_file() else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns an object of pairs from JSON. Raises ValueError if a name is there twice."""
  names = [name for name, _ in pairs]
  if repeated := [name for name in names if names.count(name) > 1]:
    raise ValueError(f'an object has {repeated[0]!r} twice; give each a name of its own')
  return dict(pairs)


@dataclasses.dataclass(frozen=True)
class TextDecoder:
  """Decodes UTF-8.

  Args:
    errors: how invalid bytes are treated: 'strict' raises ValueError, 'replace' puts U+FFFD in their place, 'drop'
      omits the document.
  """
  errors: str = 'strict'

  def __post_init__(self):
    if self.errors not in ('strict', 'replace', 'drop'):
      raise ValueError(f"encoding_errors={self.errors!r} is none of 'strict', 'replace', 'drop'; choose one of them")

  def __call__(self, data: bytes, where: str, counts: collections.Counter) -> str | None:
    """Returns the text, or None if it is dropped; `counts` counts the texts that were repaired or dropped."""
    try:
      return data.decode()
    except UnicodeDecodeError as error:
      if self.errors == 'strict':
        raise ValueError(f'{where}: byte {error.start} is not UTF-8; convert the file, or repair or drop such text '
                         'with --encoding_errors=replace or drop') from None
    return self._count(data.decode(errors='replace'), counts)

  def repair(self, text: str, counts: collections.Counter) -> str | None:
    """Repairs or drops a string from JSON that contains a lone surrogate, which an escape can write and UTF-8 cannot.

    'strict' returns the text as it is: cleaning may remove the surrogate, and otherwise the tokenizer refuses it.
    """
    if self.errors == 'strict' or not _LONE_SURROGATE.search(text):
      return text
    return self._count(_LONE_SURROGATE.sub('\ufffd', text), counts)

  def repair_json(self, text: str, value: Any, where: str, counts: collections.Counter) -> str | None:
    """Like `repair`, of a JSON document, `text`, with its parsed value; since it is not cleaned, 'strict' raises.

    Raises:
      ValueError: the document contains a lone surrogate and `errors` is 'strict'.
    """
    if r'\ud' not in text.lower():
      return text
    decoded = json.dumps(value, ensure_ascii=False)
    surrogate = _LONE_SURROGATE.search(decoded)
    if surrogate is None:
      return text
    if self.errors == 'strict':
      raise ValueError(f'{where}: {ascii(surrogate[0])} is half of a surrogate pair, which is no Unicode character; '
                       'repair or drop such text with --encoding_errors=replace or drop')
    return self.repair(decoded, counts)

  def _count(self, repaired: str, counts: collections.Counter) -> str | None:
    counts['invalid UTF-8 repaired' if self.errors == 'replace' else 'invalid UTF-8 dropped'] += 1
    return repaired if self.errors == 'replace' else None
