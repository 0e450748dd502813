"""Documents and dialogues in rows of fixed length."""
from lm.data.rows.packed_documents import Stream
from lm.data.rows.packed_records import Packed
from lm.data.rows.stages import Schedule, Stage, Staged

__all__ = ['Packed', 'Schedule', 'Stage', 'Staged', 'Stream']
