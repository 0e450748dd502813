"""What a run leaves on disk: checkpoints, logs, figures, records of what was run; and files written whole."""
from lm.workdir.checkpoint import Checkpoints, Mismatch, stored_facts
from lm.workdir.describe import differences, fingerprint
from lm.workdir.track import Phases, Tracker, read_metrics

__all__ = ['Checkpoints', 'Mismatch', 'stored_facts', 'differences', 'fingerprint', 'Phases', 'Tracker',
           'read_metrics']
