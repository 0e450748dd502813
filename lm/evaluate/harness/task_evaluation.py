"""Tasks of lm-evaluation-harness as an evaluation of a suite."""
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.evaluate.evaluations import NO_PROGRESS, Progress, Subject
from lm.evaluate.harness.adapter import client_class
from lm.evaluate.harness.tasks import evaluate, metric_names, task_manager
from lm.evaluate.report import Result


@dataclasses.dataclass(frozen=True)
class Harness:
  """Tasks of lm-evaluation-harness; see `harness`.

  Args:
    tasks: names of tasks or groups of the harness, or of the folder `include_path`.
    include_path: a folder with further tasks, which are YAML files.
    num_fewshot: examples before each document; none for as many as the task says.
    limit: the first so many documents of each task are read; none for all.
    apply_chat_template: whether prompts are messages of a chat.
    system_instruction: what the system says in front of each prompt.
    max_tokens: the largest number of tokens that is written for a request; none for that of the task.
    seed: of the choice of examples.
  """
  tasks: tuple[str, ...]
  include_path: str | None = None
  num_fewshot: int | None = None
  limit: int | None = None
  apply_chat_template: bool = False
  system_instruction: str | None = None
  max_tokens: int | None = None
  seed: int = 1234

  def __post_init__(self):
    if not self.tasks or not all(self.tasks):
      raise ValueError(f'tasks={self.tasks} has no task or an empty name; give names of tasks')
    if self.num_fewshot is not None and self.num_fewshot < 0:
      raise ValueError(f'num_fewshot={self.num_fewshot} is below 0')
    for name in 'limit', 'max_tokens':
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is below 1')

  def check_packages(self) -> None:
    """Raises ImportError, which says what to install, without lm-evaluation-harness."""
    client_class()

  def digest(self, subject: Subject) -> str:
    """Returns a hash of the folder of tasks, and of the version of the harness.

    Raises ValueError where a task does not exist, with the nearest name, or the model does not fit; ImportError
    without the harness.
    """
    client = self._client(subject)
    task_manager(self.tasks, self.include_path)
    if self.apply_chat_template:
      client.chat_template(True)
    state = hashlib.blake2b(importlib.metadata.version('lm_eval').encode(), digest_size=16)
    for file in sorted(pathlib.Path(self.include_path).rglob('*')) if self.include_path else ():
      if file.is_file() and '__pycache__' not in file.parts:
        state.update(f'{file.name} {file.stat().st_size} '.encode() + file.read_bytes())
    return state.hexdigest()

  def metric_names(self) -> list[str]:
    """Returns the names of the measures, as `tasks.metric_names`."""
    return metric_names(self.tasks, self.include_path)

  def __call__(self, subject: Subject, progress: Progress = NO_PROGRESS) -> Result:
    stored = progress.load()
    answers = {} if stored is None else dict(json.loads(row) for row in stored)

    def save(answers: Mapping[str, Any]) -> None:
      progress.save(np.array([json.dumps(item) for item in answers.items()]))
    client = self._client(subject, answers, save, progress.show)
    return evaluate(client, self.tasks, self.include_path, self.num_fewshot, self.limit, self.apply_chat_template,
                    self.system_instruction, self.max_tokens, self.seed)

  def _client(self, subject: Subject, *settings: Any) -> Any:
    return client_class()(subject.model, subject.params, subject.tokenizer, subject.template, subject.mark, *settings)
