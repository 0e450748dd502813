"""Texts and their references, read from files and matched."""
import gzip
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.workdir.parsing import json_value

_TEXT, _REFERENCES = ('text', 'candidate', 'completion'), ('references', 'reference', 'text', 'candidate')


class Records(NamedTuple):
  """The lines of a file: what each says, its number, and its id; `ids` is None where no line has one."""
  path: pathlib.Path
  lines: list[dict[str, Any]]   # a line of plain text is {'text': line}
  numbers: list[int]            # from 1; empty lines between JSON lines are left out
  ids: list[str] | None = None

  def where(self, i: int) -> str:
    return f'{self.path} line {self.numbers[i]}' + ('' if self.ids is None else f' (id {self.ids[i]})')

  def name(self, i: int) -> str:
    """Returns the id of a line, or its number in a file without ids."""
    return str(self.numbers[i]) if self.ids is None else self.ids[i]


def content(path: pathlib.Path) -> str:
  """Returns the text of a file, decompressed where its name ends in .gz. Raises ValueError for what is no UTF-8."""
  data = path.read_bytes()
  try:
    return (gzip.decompress(data) if path.suffix == '.gz' else data).decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is no text in UTF-8: {error}; convert it') from None
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f'{path} cannot be decompressed: {error}; copy or compress it again') from None


def read(path: pathlib.Path) -> Records:
  """Reads JSON lines, where the name ends in .jsonl or .jsonl.gz, or plain text, of which each line is a text.

  Raises ValueError, with the line, for what is no UTF-8, no JSON object, or has an id on some lines alone; and for a
  file without lines, or of JSON under another name.
  """
  lines = content(path).removesuffix('\n').split('\n')
  if lines == ['']:
    raise ValueError(f'{path} is empty')
  if '.jsonl' not in path.suffixes[-2:]:
    if lines[0].startswith('{"'):
      raise ValueError(f'{path} has JSON, and the name of a file of JSON lines ends in .jsonl; rename it')
    return Records(path, [{'text': line.removesuffix('\r')} for line in lines], list(range(1, len(lines) + 1)))
  numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
  records = [json_object(lines[number - 1], f'{path} line {number}') for number in numbers]
  ids = [record.get('id', record.get('task_id')) for record in records]
  if not ids:
    raise ValueError(f'{path} is empty')
  if all(id is None for id in ids):
    return Records(path, records, numbers)
  for number, id in zip(numbers, ids):
    if not isinstance(id, str | int):
      raise ValueError(f'{path} line {number} has the id {json.dumps(id)}, and others have one; give each line an id, '
                       'a text or a whole number, or none')
  return Records(path, records, numbers, [str(id) for id in ids])


def read_named(files: Sequence[pathlib.Path]) -> dict[str, Records]:
  """Returns what is in each file, by its name without what is after the first dot. ValueError for one given twice."""
  names = [file.name.split('.')[0] for file in files]
  if len(set(names)) < len(names):   # such as a/outputs.jsonl and b/outputs.jsonl, of which files in --out are named
    names = [str(file).strip('/').replace('/', '-') for file in files]
  if len(set(names)) < len(names):
    raise ValueError(f'--candidates={",".join(map(str, files))} has a file twice; give each once')
  return {name: read(file) for name, file in zip(names, files)}


def json_object(line: str, where: str) -> dict[str, Any]:
  """Returns the object in a line of JSON. Raises ValueError, which names the place `where`, if there is none."""
  try:
    record = json_value(line)
  except ValueError as error:
    raise ValueError(f'{where} is not JSON: {error}') from None
  if not isinstance(record, dict):
    raise ValueError(f'{where} is {line[:50]}, and what is needed is an object, {{"id": ..., "text": ...}}')
  return record


def texts(records: Records) -> list[str]:
  """Returns the text of each line. Raises ValueError for a line without one, or where none has a character."""
  result = [_value(record, _TEXT, records.where(i)) for i, record in enumerate(records.lines)]
  for i, text in enumerate(result):
    if not isinstance(text, str):
      raise ValueError(f'{records.where(i)} has a text that is {json.dumps(text)[:50]}; one string is needed')
  if not any(text.strip() for text in result):
    raise ValueError(f'all {len(result)} texts of {records.path} are empty')
  return result


def _value(record: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
  name = next((name for name in names if name in record), None)
  if name is None:
    raise ValueError(f'{where} has none of the fields {", ".join(names)}, and has {", ".join(record) or "nothing"}')
  return record[name]


def _references(records: Records) -> list[list[str]]:
  """Returns the references of each line, of which plain text has one."""
  result = []
  for i, record in enumerate(records.lines):
    value = _value(record, _REFERENCES, records.where(i))
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not several or not all(isinstance(one, str) for one in several):
      raise ValueError(f'{records.where(i)} has the references {json.dumps(value)[:50]}; a text, or a list with one or '
                       'more texts, is needed')
    result.append(several)
  return result


def matched(candidates: Records, references: Sequence[Records]) -> list[list[str]]:
  """Returns the references of each candidate: those of all files, by id, or line by line in files without ids.

  Without a file, the candidates' own lines have them.
  An empty line of the second and further files of plain text is no reference. Raises ValueError where counts differ,
  or an id is there twice or lacks in one of the files.
  """
  if not references:
    if not all('references' in line or 'reference' in line for line in candidates.lines):
      raise ValueError(f'{candidates.path} has lines without references; give a file with references')
    return _references(candidates)
  result: list[list[str]] = [[] for _ in candidates.lines]
  for number, records in enumerate(references):
    own = _references(records)
    for place, i in enumerate(places(candidates, records)):
      several = own[i]
      result[place] += several if number == 0 or candidates.ids or several != [''] else []
  return result


def places(candidates: Records, others: Records) -> list[int]:
  """Returns where the line of each candidate is in another file. Raises ValueError as `matched`."""
  if candidates.ids is None or others.ids is None:
    if len(candidates.lines) != len(others.lines):
      raise ValueError(f'{candidates.path} has {len(candidates.lines)} texts and {others.path} has '
                       f'{len(others.lines)}; without ids they are matched line by line, so give as many')
    return list(range(len(others.lines)))
  for records in candidates, others:
    check_unique(records)
  by_id = {id: i for i, id in enumerate(others.ids)}
  for owner, lacking in ((candidates, others), (others, candidates)):
    present = set(lacking.ids)
    ids = [id for id in owner.ids if id not in present]
    if ids:
      raise ValueError(f'{lacking.path} lacks {len(ids)} of the {len(owner.ids)} ids of {owner.path}: '
                       f'{", ".join(ids[:3])}{", ..." if len(ids) > 3 else ""}; give the same ids')
  return [by_id[id] for id in candidates.ids]


def check_unique(records: Records) -> None:
  """Raises ValueError where two lines have the same id."""
  first: dict[str, int] = {}
  for i, id in enumerate(records.ids or ()):
    if id in first:
      raise ValueError(f'{records.path} has the id {id} on two lines, {records.numbers[first[id]]} and '
                       f'{records.numbers[i]}; an id is there once')
    first[id] = i


def by_problem(candidates: Records, problems: Records) -> list[list[str]]:
  """Returns the programs for each problem; several lines with its id are several programs. ValueError as `matched`."""
  programs = texts(candidates)
  if candidates.ids is None or problems.ids is None:
    return [[programs[i]] for i in places(candidates, problems)]
  check_unique(problems)
  result: dict[str, list[str]] = {id: [] for id in problems.ids}
  for id, program in zip(candidates.ids, programs):
    if id not in result:
      raise ValueError(f'{candidates.path} has a program for {id}, which {problems.path} does not have')
    result[id].append(program)
  missing = [id for id, several in result.items() if not several]
  if missing:
    raise ValueError(f'{candidates.path} has no program for {len(missing)} of the {len(result)} problems of '
                     f'{problems.path}: {", ".join(missing[:3])}')
  return list(result.values())
