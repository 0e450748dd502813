"""Documents and dialogues in rows of fixed length."""
from lm.data.rows.packing import Packed
from lm.data.rows.stages import Schedule, Stage, Staged
from lm.data.rows.stream import Stream

__all__ = ['Packed', 'Schedule', 'Stage', 'Staged', 'Stream']
