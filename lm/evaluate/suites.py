"""Suites: named evaluations, read from a JSON file, which run on a trained model or during training.

  {"likelihood": {"books": {"text": "books/*.txt", "window": 512, "stride": 256}, "held-out": {}}}

The first level has the kinds of evaluations, which are the fields of `Suite`; the second has names of evaluations of
that kind, each with its settings, which are the fields of the class of that kind.
"""
import contextlib
import dataclasses
import difflib
import io
import json
import pathlib
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lm.evaluate import report, stored_measures
from lm.evaluate.evaluations import Likelihood, Progress, Subject
from lm.evaluate.harness import Harness
from lm.evaluate.measures import intervals
from lm.evaluate.text_generation import Generation
from lm.sharding import hosts
from lm.workdir import atomic, describe, locks, parsing


@dataclasses.dataclass(frozen=True)
class Suite:
  """Evaluations by name, of each kind."""
  likelihood: Mapping[str, Likelihood] = dataclasses.field(default_factory=dict)
  generation: Mapping[str, Generation] = dataclasses.field(default_factory=dict)
  harness: Mapping[str, Harness] = dataclasses.field(default_factory=dict)

  def evaluations(self) -> Iterator[tuple[str, Any]]:
    """Yields (name, evaluation)."""
    for field in dataclasses.fields(self):
      yield from getattr(self, field.name).items()


def read(file: pathlib.Path) -> Suite:
  """Reads a suite. Raises ValueError, which names the file and the nearest name, where it is none."""
  content = parsing.read_object(file, unique=True)
  kinds = {name: typing.get_args(hint)[1] for name, hint in typing.get_type_hints(Suite).items()}
  by_kind = _object(content, f'{file}', kinds)
  fields, names = {}, set()
  for kind, evaluations in by_kind.items():
    for name, settings in _object(evaluations, f'{file}: {kind}').items():
      if name in names or not name or '/' in name or name == 'results':
        raise ValueError(f'{file}: an evaluation is called {name!r}, which is empty, has a /, is the name of the file '
                         'of all results or is there twice; give each a name of its own')
      names.add(name)
      fields.setdefault(kind, {})[name] = _evaluation(kinds[kind], settings, f'{file}: {kind}/{name}')
  if not names:
    raise ValueError(f'{file} has no evaluation; its first level has one of {", ".join(kinds)}')
  return Suite(**fields)


def _object(value: Any, where: str, allowed: Mapping[str, Any] | None = None) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise ValueError(f'{where} is {json.dumps(value)[:50]}, and what is needed is an object, {{...}}')
  for name in value:
    if allowed is not None and name not in allowed:
      nearest = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0)
      raise ValueError(f'{where} has {name!r}, which is not known here; the nearest is {nearest[0]!r}')
  return value


def _evaluation(kind: type, settings: Any, where: str) -> Any:
  hints = typing.get_type_hints(kind)
  values = {name: tuple(value) if isinstance(value, list) else value
            for name, value in _object(settings, where, hints).items()}
  for name, value in values.items():
    if not _is_of_type(value, hints[name]):
      type_name = str(getattr(hints[name], '__name__', hints[name])).replace('None', 'null')
      raise ValueError(f'{where} has {name}={json.dumps(settings[name])}, and what is needed is {type_name}')
  try:
    return kind(**values)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{where}: {error}') from None


def _is_of_type(value: Any, hint: Any) -> bool:
  arguments = typing.get_args(hint)
  if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
    return any(_is_of_type(value, option) for option in arguments)
  if typing.get_origin(hint) is tuple:
    return isinstance(value, tuple) and all(_is_of_type(item, arguments[0]) for item in value)
  if typing.get_origin(hint) is typing.Literal:
    return value in arguments
  if hint is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def run(suite: Suite, subject: Subject, identity: Any, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Evaluates, prints a line for each evaluation, and writes results.json, results.txt and figures into `folder`.

  The rows of documents are written beside them, from which results of several systems are compared.

  Evaluations that `folder` has already, of the same settings, documents and model, as `identity` says, are not
  repeated, and one that was stopped goes on where it was. While another process evaluates into `folder`, this one
  waits.

  Raises ValueError, before anything is measured, where an evaluation does not fit the model or has no documents.
  """
  settings = {name: _settings(evaluation) for name, evaluation in suite.evaluations()}
  digests = check(suite, subject)
  folder.mkdir(parents=True, exist_ok=True)
  with _locked(folder):
    results = {}
    for name, evaluation in suite.evaluations():
      key = {'evaluation': settings[name], 'documents': digests[name], 'model': identity}
      results[name] = _result(name, evaluation, subject, key, folder)
    report.write(folder, {'model': identity, 'evaluations': settings}, results)
    report.draw(folder, results)
  return results


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Lets one evaluation after another write into a folder; process 0 holds the lock for all processes of one."""
  waiting = f'waiting for the process that evaluates into {folder}; give another folder (--out) to evaluate now'
  with locks.hold(folder, waiting, print) if jax.process_index() == 0 else contextlib.nullcontext():
    hosts.from_process_0(None)   # the others read what is in the folder after process 0 has the lock
    yield


def _result(name: str, evaluation: Any, subject: Subject, key: Any, folder: pathlib.Path) -> dict[str, Any]:
  """Returns the result of an evaluation of this key as JSON: that of the folder, or a new one, which is written."""
  file, rows = folder / f'{name}.json', stored_measures.file_of(folder, name)
  # The rows are written first; after a kill in between, they may be of another key than the result.
  if file.is_file() and rows.is_file() and stored_measures.key_of(rows) == key:
    content = json.loads(file.read_text())
    if content.get('key') == key:
      print(f'{name}: measured before, and read from {file}')
      return content['result']
  print(f'{name}: evaluating', flush=True)
  partial = folder / f'{name}.partial'
  measured = evaluation(subject, _progress(name, partial, key))
  stored_measures.write(rows, measured, key)
  if measured.outputs:
    report.write_outputs(folder / f'{name}.jsonl', measured.outputs)
  result = report.to_json(measured)
  atomic.write(file, json.dumps({'key': key, 'result': result}, allow_nan=False))
  shutil.rmtree(partial, ignore_errors=True)
  return result


def check(suite: Suite, subject: Subject) -> dict[str, str]:
  """Returns a hash of what each evaluation reads; raises ValueError, with its name, where one cannot be measured."""
  digests = {}
  for name, evaluation in suite.evaluations():
    try:
      digests[name] = evaluation.digest(subject)
    except (ValueError, OSError) as error:
      raise ValueError(f'{name}: {error}') from error
  return digests


def _settings(evaluation: Any) -> Any:
  return json.loads(json.dumps(describe.describe(evaluation)))


def _progress(name: str, folder: pathlib.Path, key: Any) -> Progress:
  """Returns a progress with a file for the new rows of each save, named by the number of rows before them."""
  text, saved = json.dumps(key, sort_keys=True), 0

  def load() -> np.ndarray | None:
    nonlocal saved
    parts = []
    while (file := folder / f'{saved}.npz').is_file():
      with np.load(file) as part:
        if str(part['key']) != text or not len(part['rows']):
          break
        parts.append(part['rows'])
      saved += len(parts[-1])
    return np.concatenate(parts) if parts else None

  def save(rows: np.ndarray) -> None:
    nonlocal saved
    content = io.BytesIO()
    np.savez(content, rows=rows[saved:], key=text)
    folder.mkdir(exist_ok=True)
    atomic.write(folder / f'{saved}.npz', content.getvalue())
    saved = len(rows)

  def show(count: int, total: int) -> None:
    print(f'{name}: {count:,} of {total:,}', flush=True)
  return Progress(load, save, show)


_ENDS = '', '/low', '/high'   # of the logged names of a metric and the ends of its interval


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """For `train.Run.evaluators`: the evaluations of a suite, whose file is read when training begins.

  The metrics are `NAME/metric`, and the ends of their intervals `NAME/metric/low` and `NAME/metric/high`.
  """
  file: pathlib.Path

  def __call__(self, run: Any, data: Any, mesh: jax.sharding.Mesh) -> Callable[[Any, int], dict[str, float]]:
    """Returns the evaluator of a run, which declares its metrics. Raises as `read` and `check`."""
    del mesh
    suite = read(self.file)
    subject = Subject(run.model, None, data.tokenizer, lambda: data.documents('validation'), run.objective.prompt,
                      run.data.template)
    settings = {name: _settings(evaluation) for name, evaluation in suite.evaluations()}
    return _OpenEvaluator(suite, subject, describe.digest([settings, check(suite, subject)]))


@dataclasses.dataclass(frozen=True)
class _OpenEvaluator:
  """The evaluator of a suite for one run."""
  suite: Suite
  subject: Subject
  fingerprint: str   # of the settings of the evaluations, and of what they read

  def __call__(self, params: Any, step: int) -> dict[str, float]:
    del step
    metrics = {}
    for name, evaluation in self.suite.evaluations():
      measured = evaluation(self.subject._replace(params=params)).measures
      for measure, numbers in zip(measured, intervals(measured)):
        metrics |= {f'{name}/{measure.name}{end}': number for end, number in zip(_ENDS, numbers)}
    return metrics

  def metric_names(self) -> list[str]:
    """Returns the names of the metrics; one that ends in / stands for all names that begin with it."""
    return [f'{name}/{metric}{end}' for name, evaluation in self.suite.evaluations()
            for metric in evaluation.metric_names() for end in (('',) if metric.endswith('/') else _ENDS)]
