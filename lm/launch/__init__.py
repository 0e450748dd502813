"""Turns a function into a command-line program whose flags are the keyword-only parameters of the function.

An experiment is a function that returns a `train.Run`. `launch.run` trains that run:

  def experiment(*, layers: int = 12, optimizer: Optimizer = Optimizer(lr=1e-3)) -> train.Run:
    ...

  if __name__ == '__main__':
    launch.run(experiment)

`python script.py --layers=6 --lr=3e-4 --seed=1` then trains with these values, and `python script.py --help` lists all
flags. The default of a parameter is the default of its flag. A parameter whose type is a frozen dataclass, such as
`Optimizer` here, is a group: each of its fields is a flag (see `lm.signature`). `arguments` lists the types that a flag
may have. `launch.tool` runs a function that trains nothing, such as a script that scores text. `launch.Cluster` is a
group, with which a tool runs in several processes, as every run can.

A program ends with one of these exit codes: 0 for success, 1 for bad input or another error, 2 for bad flags, and 128
plus the number of the signal where a signal stopped it (130 for Ctrl-C, 143 for SIGTERM).
"""
from lm.launch.arguments import parse
from lm.launch.cluster import Cluster
from lm.launch.program import run, start, tool
from lm.signature import AnyText, Texts

__all__ = ['AnyText', 'Cluster', 'Texts', 'parse', 'run', 'start', 'tool']
