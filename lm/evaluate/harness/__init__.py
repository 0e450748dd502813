"""lm-evaluation-harness as a client: its tasks on our models, from its command line and from ours (extra `eval`)."""
from lm.evaluate.harness.adapter import client_class, register
from lm.evaluate.harness.tasks import evaluate, load_tasks

__all__ = ['client_class', 'register', 'evaluate', 'load_tasks']
