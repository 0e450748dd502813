"""The measures of an evaluation on disk, with what each document adds, so that systems can be compared later."""
import collections
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lm.evaluate.measures import Measure
from lm.evaluate.report import Result
from lm.workdir import atomic, rebuild


class StoredMeasure(NamedTuple):
  """A measure, and the names of the documents of its rows."""
  measure: Measure
  documents: list[str]


def file_of(folder: pathlib.Path, evaluation: str) -> pathlib.Path:
  """Returns the file for the measures of an evaluation in a folder of results."""
  return folder / f'{evaluation}.rows.npz'


def write(file: pathlib.Path, result: Result, key: Any) -> None:
  """Writes the measures of a result whose rows are of its documents, as a whole or not at all.

  `key` is JSON that says which settings, documents and model they are of; its entries `evaluation` and `model` are
  those of the settings in results.json. Measures whose value is a function that cannot be stored, such as one of a
  script, are left out.
  """
  descriptions, rows = [], {}
  for measure in result.measures:
    value = rebuild.stored(measure.value)
    if len(measure.rows) == len(result.documents) and not rebuild.outside(value):
      rows[f'rows{len(descriptions)}'] = measure.rows
      descriptions.append({**measure._asdict(), 'rows': None, 'value': value})
  content = io.BytesIO()
  np.savez_compressed(content, descriptions=json.dumps(descriptions), documents=json.dumps(list(result.documents)),
                      key=json.dumps(key), **rows)
  atomic.write(file, content.getvalue())


def key_of(file: pathlib.Path) -> Any:
  """Returns the key of the measures of a file; None in a file of an earlier version, which has none."""
  with np.load(file) as stored:
    return json.loads(str(stored['key'])) if 'key' in stored else None


def read(folder: pathlib.Path) -> dict[str, StoredMeasure]:
  """Returns the measures of a folder of results, by evaluation/metric: of the evaluations that results.json has.

  Raises FileNotFoundError where the folder has none, and ValueError where they are of another version of the package,
  or of other settings than those in results.json.
  """
  file, measures = folder / 'results.json', {}
  content = json.loads(file.read_text()) if file.is_file() else {'results': {}}
  for evaluation in content['results']:
    file = file_of(folder, evaluation)
    if not file.is_file():
      continue
    key, settings = key_of(file) or {}, content['settings']
    own = settings.get('evaluations', {}).get(evaluation), settings.get('model')
    if not key or (key['evaluation'], key['model']) != own:
      raise ValueError(f'{file} is not of the settings in results.json, since an evaluation was stopped, or is of an '
                       'earlier version; run the same evaluation again')
    with np.load(file) as stored:
      documents = json.loads(str(stored['documents']))
      for i, description in enumerate(json.loads(str(stored['descriptions']))):
        try:
          value = rebuild.rebuilt(description['value'])
        except rebuild.Unknown as error:
          raise ValueError(f'{file} cannot be read: {error}; delete it and evaluate again') from None
        measure = Measure(**{**description, 'rows': stored[f'rows{i}'], 'value': value})
        measures[f'{evaluation}/{measure.name}'] = StoredMeasure(measure, documents)
  if not measures:
    raise FileNotFoundError(f'{folder} has no results with what each document adds; write them with '
                            'experiments/evaluate.py')
  return measures


def paired(systems: Mapping[str, Mapping[str, StoredMeasure]]) -> dict[str, dict[str, Measure]]:
  """Returns the measures of systems with their documents in one order, by system and name; those that not all have
  are left out.

  Raises ValueError where an evaluation has other documents for one system than for the first, or systems share none.
  """
  first, *others = systems
  names = [name for name in systems[first] if all(name in systems[other] for other in others)]
  if not names:
    raise ValueError(f'{first} and {", ".join(others)} have no evaluation in common; {first} has '
                     f'{", ".join(systems[first])}')
  for name in names:
    documents = collections.Counter(systems[first][name].documents)
    for other in others:
      own = collections.Counter(systems[other][name].documents)
      if own != documents:
        raise ValueError(f'{name}: {(documents - own).total()} of {documents.total()} documents of {first} are not in '
                         f'{other}, which has {(own - documents).total()} others; evaluate both on the same documents')
  in_order = lambda one: one.measure._replace(rows=one.measure.rows[np.argsort(one.documents, kind='stable')])
  return {system: {name: in_order(measures[name])._replace(name=name) for name in names}
          for system, measures in systems.items()}
