"""The workdir of a run: checkpoints, logs, figures and records of how it was started."""
from lm.workdir.checkpoint import Checkpoints, stored_facts
from lm.workdir.describe import differences, fingerprint
from lm.workdir.mismatch import Mismatch
from lm.workdir.track import Phases, Tracker, read_metrics

__all__ = ['Checkpoints', 'Mismatch', 'stored_facts', 'differences', 'fingerprint', 'Phases', 'Tracker',
           'read_metrics']
