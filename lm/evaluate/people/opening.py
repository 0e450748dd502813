"""A study begun from files of outputs, or continued from its database."""
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm.evaluate.people import system_outputs, vote_store
from lm.evaluate.people.study import Study
from lm.evaluate.people.system_outputs import Item
from lm.evaluate.people.vote_store import VoteStore


def open_study(database: pathlib.Path, outputs: Sequence[str] = (), settings: Mapping[str, Any] | None = None,
               raters: int | None = None, votes_per_item: int | None = None) -> VoteStore:
  """Continues the study in a database, or begins it there.

  `outputs` are files of outputs, as `system_outputs.named_files` reads them; to continue, none are needed. `settings`
  are fields of `Study` by name, where None is the default, or what the study has. Of a study that continues there may
  be more `raters` and `votes_per_item`; all else stays.

  Raises ValueError where the database holds another study, or something else; it is not changed then.
  """
  settings = {name: value for name, value in (settings or {}).items() if value is not None}
  files, store = system_outputs.named_files(outputs), vote_store.open_existing(database)
  if store is None:
    if not files:
      raise ValueError(f'{database} has no study yet; give --outputs=a.jsonl,b.jsonl to begin one')
    study = Study(tuple(files), system_outputs.read(files), **settings)
    raters = (votes_per_item or 1) if raters is None else raters
    return vote_store.create(database, study, raters, min(2, raters) if votes_per_item is None else votes_per_item)
  try:
    if set(files) == set(store.study.systems):
      files = {name: files[name] for name in store.study.systems}
    items = system_outputs.read(files) if files else store.study.items
    if difference := _difference(store.study, tuple(files) or store.study.systems, items, settings):
      raise ValueError(f'{database} holds another study: {difference}; give another --database, or the files and flags '
                       'of that study')
    if (raters, votes_per_item) != (None, None):
      store.extend(raters, votes_per_item)
  except BaseException:
    store.close()
    raise
  return store


def _difference(study: Study, systems: tuple[str, ...], items: Sequence[Item], settings: Mapping[str, Any]) -> str:
  """Returns in what a study is another one than that of these files and settings; '' if it is the same."""
  for name, value in settings.items():
    if getattr(study, name) != value:
      return f'{name} is {getattr(study, name)!r} there, and {value!r} here'
  if systems != study.systems:
    return f'the systems are {", ".join(study.systems)} there, and {", ".join(systems)} here'
  old, new = ({item.id: item for item in listed} for listed in (study.items, items))
  if old.keys() != new.keys():
    return f'it has {len(old)} items, of which these files have {len(old.keys() & new.keys())} by id'
  changed = next((id for id in old if old[id] != new[id]), None)
  return '' if changed is None else f'the prompt or a text of id {changed} is different'
