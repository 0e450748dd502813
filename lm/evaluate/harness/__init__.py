"""lm-evaluation-harness as a client: its tasks on our models, from its command line and from ours (extra `eval`)."""
from lm.evaluate.harness.adapter import client_class
from lm.evaluate.harness.command_line import register
from lm.evaluate.harness.task_evaluation import Harness
from lm.evaluate.harness.tasks import evaluate, task_manager

__all__ = ['client_class', 'register', 'Harness', 'evaluate', 'task_manager']
