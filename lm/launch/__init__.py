"""An experiment function -> a program with flags."""
from lm.launch.arguments import parse
from lm.launch.program import run, start, tool
from lm.signature import AnyText, Texts

__all__ = ['AnyText', 'Texts', 'parse', 'run', 'start', 'tool']
