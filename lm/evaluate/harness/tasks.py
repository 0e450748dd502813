"""Tasks of lm-evaluation-harness, run on a client, with intervals of their metrics over documents.

The harness gives what each document adds to a metric. Means, perplexities and bits per byte are functions of sums of
that, and become measures. For what is not, such as BLEU over a corpus, the harness's own number is a note.
"""
import contextlib
import difflib
import logging
import math
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.text import source
from lm.evaluate import measures
from lm.evaluate.measures import Measure
from lm.evaluate.report import Result


def load_tasks(names: Sequence[str], include_path: str | None = None) -> dict[str, Any]:
  """Returns the tasks and groups of these names, as the harness's `TaskManager.load` does.

  With `include_path`, a folder of tasks, those of the harness are looked up only if a name is not of that folder: to
  list them takes ten seconds.

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
    return manager.load(list(names))


def evaluate(client: Any, loaded: Mapping[str, Any], num_fewshot: int | None = None, limit: int | None = None,
             apply_chat_template: bool = False, system_instruction: str | None = None, max_tokens: int | None = None,
             seed: int = 1234) -> Result:
  """Runs loaded tasks on a client, and returns a measure for each task, metric and filter.

  Args:
    client: a model of the harness.
    loaded: what `load_tasks` returns.
    num_fewshot: examples before each document; None for as many as the task says.
    limit: the first so many documents of each task; None for all.
    apply_chat_template: whether prompts are messages of a chat.
    system_instruction: what the system says in front of a prompt.
    max_tokens: the largest number of tokens that is written, whatever a task says.
    seed: of the choice of examples.
  """
  simple_evaluate = source.require('lm_eval', 'eval').simple_evaluate
  built = [*loaded['groups'].values(), *(task for name, task in loaded['tasks'].items()
                                         if not _is_grouped(name, loaded['groups']))]
  with _quiet(), _same_random_state():
    results = simple_evaluate(
        client, tasks=built, num_fewshot=num_fewshot, limit=limit, apply_chat_template=apply_chat_template,
        system_instruction=system_instruction, gen_kwargs=max_tokens and {'max_gen_toks': max_tokens},
        fewshot_random_seed=seed, torch_random_seed=None, bootstrap_iters=1000)
  chat = f'|chat:{"yes" if apply_chat_template else "no"}' + ('|system:yes' if system_instruction else '')
  all_measures, notes = [], []
  for name, task in sorted(loaded['tasks'].items()):
    signature = (f'task:{name}|version:{results["versions"][name]}|fewshot:{results["n-shot"][name]}|'
                 f'seed:{seed}{chat}|lm_eval:{source.require("lm_eval", "eval").__version__}')
    for key, values in _values(results['samples'][name]).items():
      metric, filtered = key
      measure = _measure(task, key, values, f'{signature}|filter:{filtered}')
      title = f'{name}/{metric}' if filtered == 'none' else f'{name}/{metric}/{filtered}'
      numbers = results['results'][name]
      value, error = numbers[f'{metric},{filtered}'], numbers[f'{metric}_stderr,{filtered}']
      if measure is not None:
        all_measures.append(measure._replace(name=title))
      note = '' if measure is not None else '; it is no function of sums over documents, so it has no interval'
      notes.append(f'{title} of lm-evaluation-harness: {_number(value)}, standard error {_number(error)}{note}')
  for name, group in sorted(loaded['groups'].items()):
    notes += [f'{name}/{key.split(",")[0]} of lm-evaluation-harness: {_number(value)}, over the tasks of the group'
              for key, value in results.get('groups', {}).get(name, {}).items()
              if isinstance(value, float) and '_stderr' not in key]
  return Result(all_measures, notes=notes)


def _is_grouped(name: str, groups: Mapping[str, Any]) -> bool:
  return any(task.task_name == name for group in groups.values() for task in group.get_all_tasks())


def _number(value: Any) -> str:
  return f'{value:.6g}' if isinstance(value, int | float) else str(value)


def _values(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
  """Returns the values of documents by (metric, filter)."""
  values: dict[tuple[str, str], list[Any]] = {}
  for sample in sorted(samples, key=lambda sample: sample['doc_id']):
    for metric in sample['metrics']:
      values.setdefault((metric, sample['filter']), []).append(sample[metric])
  return values


def _measure(task: Any, key: tuple[str, str], values: Sequence[Any], signature: str) -> Measure | None:
  """Returns the measure of a metric from its values for documents; None if it is no function of sums."""
  metric, _ = key
  aggregation = getattr(task.aggregation().get(metric), '__name__', 'mean')
  value = _FUNCTIONS.get(aggregation)
  try:
    rows = np.array(values, float)
  except (TypeError, ValueError):   # texts, or lists of several lengths
    return None
  if value is None or rows.ndim != (2 if aggregation in _WEIGHTED else 1):
    return None
  if aggregation not in _WEIGHTED:
    rows = np.stack([rows, np.ones(len(rows))], axis=1)
  higher = task.higher_is_better().get(metric)
  better = '' if higher is None else 'higher' if higher else 'lower'
  return Measure(metric, rows, value, better, signature)


def _perplexity(sums: np.ndarray) -> np.ndarray:
  return np.exp(-measures.ratio(sums))


def _bits(sums: np.ndarray) -> np.ndarray:
  return -measures.ratio(sums) / math.log(2)


# By the name of the harness's function, which aggregates values, or pairs of a value and its weight.
_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'mean': measures.ratio, 'perplexity': _perplexity, 'weighted_mean': measures.ratio,
    'weighted_perplexity': _perplexity, 'bits_per_byte': _bits}
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
def _same_random_state() -> Iterator[None]:
  """Restores the random states of Python and NumPy, which the harness seeds for all."""
  python, numpy = random.getstate(), np.random.get_state()
  try:
    yield
  finally:
    random.setstate(python)
    np.random.set_state(numpy)
