"""Text from a model."""
from lm.generate.completion import Draft, random_streams
from lm.generate.engine import Engine, State, Tokens
from lm.generate.sampling import Sampling, Settings, keep_min_p, keep_top_k, keep_top_p, penalize, process, settings
from lm.generate.text import DEFAULT, PLAIN, generate, room, stream, tokens
from lm.generate.text_stream import TextStream, with_bos

__all__ = ['Draft', 'random_streams', 'Engine', 'State', 'Tokens', 'Sampling', 'Settings', 'keep_min_p', 'keep_top_k',
           'keep_top_p', 'penalize', 'process', 'settings', 'DEFAULT', 'PLAIN', 'generate', 'room', 'stream', 'tokens',
           'TextStream', 'with_bos']
