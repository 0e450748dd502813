"""Text to batches."""
from lm.data.batch import Batch, Dialogue, Example, Form, Pair, Rated, Special
from lm.data.batches import Batches
from lm.data.chat.dialogues import Dialogues
from lm.data.dataset import Text
from lm.data.store_reader import Store
from lm.data.text.source import Source, texts

__all__ = ['Batch', 'Batches', 'Dialogue', 'Example', 'Form', 'Pair', 'Rated', 'Special', 'Dialogues', 'Text',
           'Store', 'Source', 'texts']
