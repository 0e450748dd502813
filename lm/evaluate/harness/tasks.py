"""Tasks of lm-evaluation-harness, run on a client, with intervals of their metrics over documents.

The harness gives what each document adds to a metric. Means, perplexities and bits per byte are functions of sums of
that, and become measures. For what is not, such as BLEU over a corpus, the harness's own number is a note.
"""
import contextlib
import difflib
import functools
import logging
import os
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.text import source
from lm.evaluate import measures
from lm.evaluate.measures import Measure
from lm.evaluate.report import Result


@functools.cache
def task_manager(names: tuple[str, ...], include_path: str | None = None) -> Any:
  """Returns the harness's manager of tasks, whose `load` opens these tasks and groups.

  With `include_path`, a folder of tasks, those of the harness are listed only if a name is not of that folder, since
  that takes ten seconds.

  Raises:
    ValueError: no task has one of the names; the message has the nearest one.
    ImportError: lm-evaluation-harness is missing.
  """
  manager_class = source.require('lm_eval.tasks', 'eval').TaskManager
  if include_path is not None and not pathlib.Path(include_path).is_dir():
    raise ValueError(f'include_path={include_path!r} is no folder; give the folder with the YAML files of the tasks')
  with _quiet():
    manager = manager_class(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and not {*names} <= {*manager.all_tasks}:
      manager = manager_class(include_path=include_path)
  for name in names:
    if name not in manager.all_tasks:
      nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0)
      where = '' if include_path is None else f' and of {include_path}'
      raise ValueError(f'there is no task {name!r} among those of lm-evaluation-harness{where}; the nearest is '
                       f'{nearest[0]!r}')
  return manager


def metric_names(names: tuple[str, ...], include_path: str | None = None) -> list[str]:
  """Returns the names of the measures that `evaluate` may return.

  Of a task that computes its metrics by functions of its own, these are only known when it has been run; 'TASK/' then
  stands for all of them. Raises as `task_manager`.
  """
  manager, result = task_manager(names, include_path), []
  with _quiet(), _seeded():
    loaded = manager.load(list(names))['tasks']
  for name, task in sorted(loaded.items()):
    is_class = type(task).__name__ != 'ConfigurableTask'
    if is_class or task.get_config('process_results') or not {*task.aggregation()} <= _OF_HARNESS:
      result.append(f'{name}/')
    else:
      result += [_title(name, metric, filtered.name) for filtered in task._filters for metric in task.aggregation()
                 if _aggregation(task, metric) in _FUNCTIONS]
  return result


def evaluate(client: Any, names: tuple[str, ...], include_path: str | None = None, num_fewshot: int | None = None,
             limit: int | None = None, apply_chat_template: bool = False, system_instruction: str | None = None,
             max_tokens: int | None = None, seed: int = 1234) -> Result:
  """Runs tasks on a client, and returns a measure for each task, metric and filter.

  Args:
    client: a model of the harness.
    names: tasks and groups of tasks.
    include_path: a folder with further tasks, as in `task_manager`.
    num_fewshot: examples before each document; None for as many as the task says. Tasks that say 0 keep it.
    limit: the first so many documents of each task; None for all.
    apply_chat_template: whether prompts are messages of a chat.
    system_instruction: what the system says in front of a prompt.
    max_tokens: the largest number of tokens that is written, whatever a task says.
    seed: of the choice of examples.

  Raises:
    ValueError: as `task_manager`.
    ImportError: as `task_manager`.
  """
  manager, library = task_manager(names, include_path), source.require('lm_eval', 'eval')
  with _quiet(), _seeded(), _one_process():
    loaded = manager.load(list(names))
    fixed = [name for name, task in loaded['tasks'].items() if task.get_config('num_fewshot') == 0]
    for task in loaded['tasks'].values():
      if max_tokens is not None and task.get_config('output_type') == 'generate_until':
        task.set_config('generation_kwargs', {'max_gen_toks': max_tokens}, update=True)
      if task.get_config('num_fewshot') != 0:
        task.set_config('num_fewshot', task.get_config('num_fewshot') or 0 if num_fewshot is None else num_fewshot)
      task.set_fewshot_seed(seed)
    # `simple_evaluate` would list all tasks of the harness again, and the packages that are installed: 20 s.
    results = library.evaluate(client, loaded, limit=limit, apply_chat_template=apply_chat_template,
                               system_instruction=system_instruction, fewshot_as_multiturn=apply_chat_template,
                               bootstrap_iters=1000)
  result = _result(loaded, results, f'seed:{seed}|chat:{"yes" if apply_chat_template else "no"}|'
                   f'{"system:yes|" if system_instruction else ""}lm_eval:{library.__version__}')
  notes = [f'{name} has no examples before a document, as it says itself' for name in fixed if num_fewshot]
  return result._replace(notes=[*result.notes, *notes, *client.notes])


def _result(loaded: Mapping[str, Any], results: Mapping[str, Any], settings: str) -> Result:
  """Returns the measures of results of the harness, and notes with its own numbers and standard errors."""
  all_measures, notes = [], []
  for name, task in sorted(loaded['tasks'].items()):
    signature = f'task:{name}|version:{results["versions"][name]}|fewshot:{results["n-shot"][name]}|{settings}'
    samples = results['samples'][name]
    for (metric, filtered), values in _values(samples).items():
      measure = _measure(task, metric, values, list(_documents(samples)), f'{signature}|filter:{filtered}')
      title = _title(name, metric, filtered)
      numbers = results['results'][name]
      value, error = numbers[f'{metric},{filtered}'], numbers[f'{metric}_stderr,{filtered}']
      if measure is not None:
        all_measures.append(measure._replace(name=title))
      reason = '' if measure is not None else '; it is no function of sums over documents, so it has no interval'
      notes.append(f'{title} of lm-evaluation-harness: {_number(value)}, standard error {_number(error)}{reason}')
      if missing := len(_documents(samples)) - len(values):
        notes.append(f'{title}: the task gives {missing:,} of {len(_documents(samples)):,} documents no value, and '
                     'they count for nothing')
  for name in sorted(loaded['groups']):
    notes += [f'{name}/{key.split(",")[0]} of lm-evaluation-harness: {_number(value)}, over the tasks of the group'
              for key, value in results.get('groups', {}).get(name, {}).items()
              if isinstance(value, float) and '_stderr' not in key]
  names = list(loaded['tasks']) if len(loaded['tasks']) == 1 else []   # several tasks have different documents
  documents = [digest for name in names for digest in _documents(results['samples'][name]).values()]
  return Result(all_measures, notes=notes, documents=documents)


def _title(task: str, metric: str, filtered: str) -> str:
  return f'{task}/{metric}' if filtered == 'none' else f'{task}/{metric}/{filtered}'


def _number(value: Any) -> str:
  return f'{value:.6g}' if isinstance(value, int | float) else str(value)


def _documents(samples: Sequence[Mapping[str, Any]]) -> dict[int, str]:
  """Returns the hash of each document by its id, in the order of ids."""
  return dict(sorted({sample['doc_id']: sample['doc_hash'] for sample in samples}.items()))


def _values(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, Any]]:
  """Returns the values by (metric, filter), each by the id of its document; a task may give a document none."""
  values: dict[tuple[str, str], dict[int, Any]] = {}
  for sample in samples:
    for metric in sample['metrics']:
      values.setdefault((metric, sample['filter']), {})[sample['doc_id']] = sample[metric]
  return values


def _aggregation(task: Any, metric: str) -> str:
  """Returns the name of the function that aggregates a metric; 'mean' where the task names none."""
  return getattr(task.aggregation().get(metric), '__name__', 'mean')


def _measure(task: Any, metric: str, values: Mapping[int, Any], documents: Sequence[int], signature: str
             ) -> Measure | None:
  """Returns the measure of a metric from its values by document, with a row for each of `documents`.

  Documents without a value add nothing. Returns None if the metric is no function of sums.
  """
  aggregation = _aggregation(task, metric)
  value = _FUNCTIONS.get(aggregation)
  try:
    numbers = np.array(list(values.values()), float)
  except (TypeError, ValueError):   # texts, or lists of several lengths
    return None
  if value is None or numbers.ndim != (2 if aggregation in _WEIGHTED else 1):
    return None
  rows = np.zeros((len(documents), 2))
  rows[np.searchsorted(documents, list(values))] = (
      numbers if aggregation in _WEIGHTED else np.stack([numbers, np.ones(len(numbers))], axis=1))
  higher = task.higher_is_better().get(metric)
  better = '' if higher is None else 'higher' if higher else 'lower'
  return Measure(metric, rows, value, better, signature)


# By the name of the harness's function, which aggregates values, or pairs of a value and its weight.
_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'mean': measures.ratio, 'perplexity': measures.perplexity, 'weighted_mean': measures.ratio,
    'weighted_perplexity': measures.perplexity, 'bits_per_byte': measures.bits}
# Metrics that the harness itself computes, each under its own name.
_OF_HARNESS = {'acc', 'acc_norm', 'acc_bytes', 'acc_mutual_info', 'exact_match', 'perplexity', 'word_perplexity',
               'byte_perplexity', 'bits_per_byte', 'f1', 'mcc', 'brier_score', 'likelihood', 'bleu', 'chrf', 'ter'}
_WEIGHTED = 'weighted_mean', 'weighted_perplexity', 'bits_per_byte'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides what the harness logs and is no warning of its own about results."""
  logger = logging.getLogger('lm_eval')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
  """Seeds Python and NumPy as the harness does by default, and restores their random states afterwards."""
  python, numpy = random.getstate(), np.random.get_state()
  random.seed(0)
  np.random.seed(1234)
  try:
    yield
  finally:
    random.setstate(python)
    np.random.set_state(numpy)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
  """Lets the harness draw its bootstrap samples here: a fork of a process with the threads of JAX may hang."""
  before = os.environ.get('DISABLE_MULTIPROC')
  os.environ['DISABLE_MULTIPROC'] = '1'
  try:
    yield
  finally:
    del os.environ['DISABLE_MULTIPROC']
    if before is not None:
      os.environ['DISABLE_MULTIPROC'] = before
