"""Text from a model."""
from lm.generate.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, penalize, process
from lm.generate.text import DEFAULT, PLAIN, generate, room, stream, streams, tokens

__all__ = ['Sampling', 'keep_min_p', 'keep_top_k', 'keep_top_p', 'penalize', 'process', 'DEFAULT', 'PLAIN',
           'generate', 'room', 'stream', 'streams', 'tokens']
