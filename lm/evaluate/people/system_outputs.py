"""The outputs of systems, read from files and matched by id: what people compare."""
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lm.evaluate.texts import text_files


class Item(NamedTuple):
  """One thing that every system wrote a text for; `texts` are in the order of the systems."""
  id: str
  prompt: str
  texts: tuple[str, ...]


class _Record(NamedTuple):
  prompt: str | None
  text: str


def named_files(outputs: Sequence[str]) -> dict[str, pathlib.Path]:
  """Returns the file of each system, by name, from `file` or `name=file`; a file alone names its system by its stem.

  Raises ValueError where two systems have the same name.
  """
  files: dict[str, pathlib.Path] = {}
  for output in outputs:
    name, equals, path = output.partition('=')
    file = pathlib.Path(path if equals else output).expanduser()
    name = name.strip() if equals else file.stem
    if not name or name in files:
      raise ValueError(f'{output!r} gives a system the name {name!r}, which is empty or of another system already; '
                       'write name=file')
    files[name] = file
  return files


def read(files: Mapping[str, pathlib.Path]) -> tuple[Item, ...]:
  """Returns the items of the files, in the order of the first.

  A file whose name ends in .jsonl has JSON lines with `text` (or `candidate`), and optionally `id` and `prompt`; any
  other is plain text, one output a line. Ids are matched, whatever the order; files without ids must have the same
  number of outputs.

  Raises ValueError, which names the file and the line or the id, for what does not fit together.
  """
  records = {name: _read_file(path) for name, path in files.items()}
  first, *others = records
  first_records = records[first]
  if not first_records:
    raise ValueError(f'{files[first]} is empty: there is nothing to compare')
  for name in others:
    for owner, lacking in ((first, name), (name, first)):
      ids = records[owner].keys() - records[lacking].keys()
      if ids:
        some = ', '.join(sorted(map(str, ids), key=lambda id: (len(id), id))[:3])
        raise ValueError(f'{files[lacking]} has {len(records[lacking])} outputs and lacks {len(ids)} that '
                         f'{files[owner]} has (ids {some}{", ..." if len(ids) > 3 else ""}); every system needs an '
                         'output for every item')
  items = []
  for id in first_records:
    prompts = {record.prompt: name for name, other in records.items() if (record := other[id]).prompt is not None}
    if len(prompts) > 1:
      one, another, *_ = prompts.values()
      raise ValueError(f'{files[one]} and {files[another]} have different prompts for id {id}; outputs are compared '
                       'for the same prompt')
    items.append(Item(str(id), next(iter(prompts), ''), tuple(other[id].text for other in records.values())))
  return tuple(items)


def _read_file(path: pathlib.Path) -> dict[str, _Record]:
  """Returns the records of a file, by id; by the number of the line where the file has no ids."""
  try:
    lines = path.read_text('utf-8-sig').split('\n')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8') from None
  plain = path.suffix != '.jsonl'
  if lines[-1] == '':
    lines.pop()
  records: dict[str, _Record] = {}
  has_ids = None
  for number, line in enumerate(lines, 1):
    if not line.strip() and not plain:
      continue
    where = f'{path} line {number}'
    id, record = (None, _Record(None, line.removesuffix('\r'))) if plain else _parse(line, where)
    if not record.text.strip():
      raise ValueError(f'{where}{"" if id is None else f" (id {id})"} has an empty text, which people cannot judge; '
                       'leave the item out of all files, or write what the empty output stands for')
    if has_ids not in (None, id is not None):
      raise ValueError(f'{where} has {"an" if id is not None else "no"} id, unlike the lines before; give every line '
                       'an id, or none')
    has_ids = id is not None
    id = str(number if id is None else id)
    if id in records:
      raise ValueError(f'{where} has the id {id} again; an id stands once in a file')
    records[id] = record
  return records


def _parse(line: str, where: str) -> tuple[str | int | None, _Record]:
  fields = text_files.json_object(line, where)
  text = fields.get('text', fields.get('candidate'))
  if not isinstance(text, str):
    raise ValueError(f'{where} has no text: a line is {{"id": ..., "prompt": ..., "text": "..."}}, of which only text '
                     'is required')
  id, prompt = fields.get('id'), fields.get('prompt')
  if re.search('[\ud800-\udfff]', f'{id} {prompt} {text}'):
    raise ValueError(f'{where} has half of a surrogate pair, such as \\ud800, which is no character; correct the text')
  if not isinstance(id, str | int | None) or not isinstance(prompt, str | None):
    raise ValueError(f'{where} has the id {id!r} and the prompt {prompt!r}; an id is a text or a whole number, a '
                     'prompt a text')
  return id, _Record(prompt, text)
