"""Sources of text, cleaning and mixing."""
from lm.data.text.source import Source, sample, texts

__all__ = ['Source', 'sample', 'texts']
