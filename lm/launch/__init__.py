"""An experiment function -> a program with flags."""
from lm.launch.arguments import AnyText, Texts, parse
from lm.launch.program import run, start, tool

__all__ = ['AnyText', 'Texts', 'parse', 'run', 'start', 'tool']
