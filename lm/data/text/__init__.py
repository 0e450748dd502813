"""Where text comes from, and how it is cleaned and mixed."""
from lm.data.text.source import Source, sample, texts

__all__ = ['Source', 'sample', 'texts']
