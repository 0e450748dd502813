"""The outputs of systems, read from files and matched by id: what people compare."""
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lm import paths
from lm.evaluate.texts import text_files


class Item(NamedTuple):
  """One thing that every system wrote a text for; `texts` are in the order of the systems."""
  id: str
  prompt: str
  texts: tuple[str, ...]


def named_files(outputs: Sequence[str]) -> dict[str, pathlib.Path]:
  """Returns the file of each system, by name, from `file` or `name=file`; a file alone names its system by its stem.

  Raises ValueError where two systems have the same name, or a file is given by its URL.
  """
  files: dict[str, pathlib.Path] = {}
  for output in outputs:
    name, equals, path = output.partition('=')
    file = paths.local(path if equals else output)
    name = name.strip() if equals else file.stem
    if not name or name in files:
      raise ValueError(f'{output!r} gives a system the name {name!r}, which is empty or of another system already; '
                       'write name=file')
    files[name] = file
  return files


def read(files: Mapping[str, pathlib.Path]) -> tuple[Item, ...]:
  """Returns the items of the files, in the order of the first.

  Files and their texts are as in `text_files`, and JSON lines may have a `prompt`. Ids are matched, whatever the order;
  files without ids must have the same number of outputs.

  Raises ValueError, which names the file and the line or the id, for what does not fit together.
  """
  records, texts = {}, {}
  for name, path in files.items():
    records[name] = text_files.read(path)
    texts[name] = _texts(records[name])
  first = next(iter(records.values()))
  places = {name: text_files.places(first, of_system) for name, of_system in records.items()}
  items = []
  for i in range(len(first.lines)):
    prompts = {prompt: name for name, of_system in records.items()
               if (prompt := of_system.lines[places[name][i]].get('prompt')) is not None}
    if len(prompts) > 1:
      one, another, *_ = prompts.values()
      raise ValueError(f'{files[one]} and {files[another]} have different prompts for id {first.name(i)}; outputs are '
                       'compared for the same prompt')
    items.append(Item(first.name(i), next(iter(prompts), ''), tuple(texts[name][places[name][i]] for name in records)))
  return tuple(items)


def _texts(records: text_files.Records) -> list[str]:
  """Returns the text of each line. Raises ValueError where people cannot judge it, or its prompt is no text."""
  texts = text_files.texts(records)
  for i, (text, record) in enumerate(zip(texts, records.lines)):
    prompt = record.get('prompt')
    if not text.strip():
      raise ValueError(f'{records.where(i)} has an empty text, which people cannot judge; leave the item out of all '
                       'files, or write what the empty output stands for')
    if not isinstance(prompt, str | None):
      raise ValueError(f'{records.where(i)} has the prompt {prompt!r}; a prompt is a text')
    if re.search('[\ud800-\udfff]', f'{records.name(i)} {prompt} {text}'):
      raise ValueError(f'{records.path} line {records.numbers[i]} has half of a surrogate pair, such as \\ud800, which '
                       'is no character; correct the text')
  return texts
