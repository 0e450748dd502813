"""Reports of an evaluation: a table, JSON, and figures. Every number has its interval."""
import importlib.metadata
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lm.evaluate.measures import Measure, intervals
from lm.workdir import atomic, figures

PACKAGES = ('jax', 'numpy', 'sacrebleu', 'rouge-score', 'lm_eval')


class Curve(NamedTuple):
  """A measure for several values of x, which are numbers or the names of ranges."""
  name: str
  x: str       # what x is, for the axis
  y: str
  points: Sequence[tuple[float | str, Measure]]
  diagonal: bool = False   # whether y = x is drawn, to compare with


class Result(NamedTuple):
  """What one evaluation measured."""
  measures: Sequence[Measure]
  curves: Sequence[Curve] = ()
  notes: Sequence[str] = ()     # lines for the reader, such as how many documents were too long
  documents: Sequence[str] = ()   # names of the documents of the rows, which are the same for any model
  outputs: Sequence[Mapping[str, Any]] = ()   # what a model wrote, with `id`, `prompt`, `text` and `references`


def entries(measures: Sequence[Measure], confidence: float = 0.95) -> list[dict[str, Any]]:
  """Returns the JSON of each measure; an infinite or undefined number is null, which every reader of JSON takes."""
  return [{**{name: value if math.isfinite(value) else None for name, value in interval._asdict().items()},
           'documents': len(measure.rows), 'better': measure.better, 'signature': measure.signature}
          for measure, interval in zip(measures, intervals(measures, confidence))]


def to_json(result: Result, confidence: float = 0.95) -> dict[str, Any]:
  """Returns the JSON of a result: `metrics` by name, `curves` with a list of points by name, and `notes`."""
  points = iter(entries([measure for curve in result.curves for _, measure in curve.points], confidence))
  curves = {curve.name: {'x': curve.x, 'y': curve.y, 'diagonal': curve.diagonal,
                         'points': [{'at': x, **next(points)} for x, _ in curve.points]} for curve in result.curves}
  metrics = {measure.name: entry for measure, entry in zip(result.measures, entries(result.measures, confidence))}
  return {'metrics': metrics, 'curves': curves, 'notes': list(result.notes)}


def versions() -> dict[str, str]:
  """Returns the versions of the packages that numbers depend on, and the platform."""
  installed = {}
  for package in PACKAGES:
    try:
      installed[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {**installed, 'platform': jax.default_backend()}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a table of the metrics of each evaluation, with signatures as footnotes; see `to_json` for `results`."""
  lines, signatures = [], []
  width = max((len(f'{name}/{metric}') for name, result in results.items() for metric in result['metrics']), default=6)
  lines.append(f'{"metric":{width}}  {"value":>10}  {"interval":>22}  documents')
  for name, result in results.items():
    for metric, numbers in result['metrics'].items():
      signature = numbers['signature']
      if signature and signature not in signatures:
        signatures.append(signature)
      footnote = f'  ({signatures.index(signature) + 1})' if signature else ''
      better = {'higher': 'higher is better', 'lower': 'lower is better', '': ''}[numbers['better']]
      lines.append(f'{name + "/" + metric:{width}}  {number(numbers["value"]):>10}  '
                   f'{"[" + number(numbers["low"]) + ", " + number(numbers["high"]) + "]":>22}  '
                   f'{numbers["documents"]:9,}  {better}{footnote}')
  lines += [f'({i}) {signature}' for i, signature in enumerate(signatures, 1)]
  lines += [f'{name}: {note}' for name, result in results.items() for note in result['notes']]
  return '\n'.join(line.rstrip() for line in lines)


def number(value: float | None) -> str:
  """Returns a number for a table, with about four digits; a dash where there is none."""
  if value is None:
    return '-'
  if abs(value) >= 1e9:
    return f'{value:.3e}'
  return f'{value:,.0f}' if abs(value) >= 10_000 else f'{value:.4g}' if abs(value) >= 1000 else f'{value:.4f}'


def write(folder: pathlib.Path, settings: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes results.json and results.txt into a folder, each as a whole or not at all."""
  content = {'settings': settings, 'versions': versions(), 'results': results}
  atomic.write(folder / 'results.json', json.dumps(content, indent=1, allow_nan=False) + '\n')
  atomic.write(folder / 'results.txt', table(results) + '\n')


def write_outputs(file: pathlib.Path, outputs: Sequence[Mapping[str, Any]]) -> None:
  """Writes JSON lines."""
  atomic.write(file, ''.join(json.dumps(output, ensure_ascii=False) + '\n' for output in outputs))


def draw(folder: pathlib.Path, results: Mapping[str, Mapping[str, Any]]) -> list[pathlib.Path]:
  """Draws a figure of each kind of curve, with a line for each evaluation; returns the files."""
  names = dict.fromkeys(curve for result in results.values() for curve in result['curves'])
  files = []
  for name in names:
    lines = {evaluation: result['curves'][name] for evaluation, result in results.items() if name in result['curves']}
    file = folder / f'{name}.png'
    if figures.intervals(lines, file):
      files.append(file)
  return files
