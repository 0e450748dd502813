"""Says whether systems differ, or chance explains their scores: a paired test on the same documents, corrected.

  python experiments/compare_outputs.py --outputs=a.jsonl,b.jsonl,c.jsonl --references=references.jsonl
  python experiments/compare_outputs.py --outputs=old=a.txt,new=b.txt --references=references.txt --metrics=chrf,rouge
  python experiments/compare_outputs.py --results=runs/small/evaluation,runs/large/evaluation

Each system is compared with the first. Files are as for score_texts.py, and folders are what evaluate.py writes.
"""
import json
import pathlib

from lm import launch
from lm.evaluate import significance, stored_measures, texts
from lm.evaluate.measures import Measure
from lm.evaluate.people import system_outputs
from lm.evaluate.texts import text_files
from lm.workdir import atomic


def compare_outputs(*, outputs: tuple[str, ...] = (), references: tuple[pathlib.Path, ...] = (),
                    results: tuple[str, ...] = (), metrics: tuple[str, ...] = (),
                    settings: texts.Settings = texts.Settings(), confidence: float = 0.95,
                    out: pathlib.Path | None = None) -> None:
  """Compares systems with the first one, by each metric.

  Args:
    outputs: a file of texts for each system, as file or name=file.
    references: files with references of the texts; none where the lines of the first system have them.
    results: a folder of results for each system, as folder or name=folder, in place of --outputs.
    metrics: which metrics to compare; none for bleu, chrf and rouge of texts, or all that results have.
    confidence: how sure a verdict has to be that it is not due to chance, over all comparisons.
    out: a JSON file for the comparisons.
  """
  systems = outputs or results
  if bool(outputs) == bool(results) or len(systems) < 2:
    raise ValueError(f'--outputs has {len(outputs)} systems and --results {len(results)}; give two or more to one of '
                     'them, and none to the other')
  if not 0 < confidence < 1:
    raise ValueError(f'--confidence={confidence} is no probability between 0 and 1, such as 0.95')
  if results and (references or settings != texts.Settings()):
    raise ValueError('--references and settings of metrics are for --outputs; --results has its metrics already')
  if out:
    out.parent.mkdir(parents=True, exist_ok=True)
  named = system_outputs.named_files([one if '=' in one else f'{label(pathlib.Path(one))}={one}' for one in systems])
  measured = of_outputs(named, references, metrics, settings) if outputs else of_results(named, metrics)
  baseline = next(iter(named))
  comparisons = significance.compare_all(measured, baseline, confidence)
  print(significance.table(comparisons, baseline))
  if out:
    content = {name: [one.to_json() for one in several] for name, several in comparisons.items()}
    atomic.write(out, json.dumps({'baseline': baseline, 'comparisons': content}, indent=1, allow_nan=False) + '\n')


def label(path: pathlib.Path) -> str:
  """Returns the name of a system: that of its file, or of the run that has a folder of results."""
  return path.parent.name if path.name == 'evaluation' and path.parent.name else path.name.split('.')[0]


def of_outputs(files: dict[str, pathlib.Path], references: tuple[pathlib.Path, ...], metrics: tuple[str, ...],
               settings: texts.Settings) -> dict[str, dict[str, Measure]]:
  """Returns the measures of texts by system and metric, with the texts in the order of the first file."""
  metrics = metrics or ('bleu', 'chrf', 'rouge')
  texts.check_names(metrics)
  settings.check(metrics)
  settings.check_packages(metrics)
  records = {name: text_files.read(file) for name, file in files.items()}
  first = next(iter(records.values()))
  text_files.check_unique(first)
  several = None
  if references or not set(metrics) <= set(texts.WITHOUT_REFERENCES):
    several = text_files.matched(first, [text_files.read(file) for file in references])
  measured = {}
  for name, own in records.items():
    print(f'{name}: scoring {len(own.lines):,} texts', flush=True)
    lines = text_files.texts(own)
    candidates = [lines[i] for i in text_files.places(first, own)]
    measured[name] = {one.name: one for metric in metrics for one in settings.scores(metric, candidates, several)}
  return measured


def of_results(folders: dict[str, pathlib.Path], metrics: tuple[str, ...]) -> dict[str, dict[str, Measure]]:
  """Returns the measures of folders of results by system and evaluation/metric, of the metrics that are named."""
  measured = stored_measures.paired({name: stored_measures.read(folder) for name, folder in folders.items()})
  names = list(next(iter(measured.values())))
  for metric in metrics:
    if not any(metric in (name, name.split('/')[-1]) for name in names):
      raise ValueError(f'--metrics has {metric!r}, which the results do not; they have {", ".join(names)}')
  chosen = [name for name in names if not metrics or {name, name.split('/')[-1]} & set(metrics)]
  return {system: {name: measures[name] for name in chosen} for system, measures in measured.items()}


if __name__ == '__main__':
  launch.tool(compare_outputs)
