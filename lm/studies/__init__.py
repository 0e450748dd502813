"""Many runs: comparisons of them, sweeps over flags, and laws of scaling."""
from lm.studies.costs import cost, equal
from lm.studies.runs import curve, go
from lm.studies.search import Study
from lm.studies.variants import Arm, arms, experiment

__all__ = ['cost', 'equal', 'Arm', 'arms', 'experiment', 'curve', 'go', 'Study']
