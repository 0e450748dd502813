"""Groups of flags that several experiments share, each of which makes a part of a run. See `lm.signature`."""
from lm.options.architecture import Shape
from lm.options.budget_flags import Budget, Cadence
from lm.options.computation import Computation
from lm.options.corpus import Corpus
from lm.options.learned_metrics import LearnedMetrics
from lm.options.low_rank import Lora
from lm.options.optimisation import MUON, Optimizer
from lm.options.prediction import Ahead, Prediction
from lm.options.records_flags import Records
from lm.options.regularisation import Augmentations, Regularisation
from lm.options.sizes import NAMED, Size
from lm.options.vocabulary import Vocabulary
from lm.options.warmup import Warmup
from lm.options.writing import BestOf, Drafts, Drawing, Extent, Form, PromptsFile, Search, ServedDrafts

__all__ = ['Shape', 'Budget', 'Cadence', 'Computation', 'Corpus', 'LearnedMetrics', 'Lora', 'MUON', 'Optimizer',
           'Ahead', 'Prediction', 'Records', 'Augmentations', 'Regularisation', 'NAMED', 'Size', 'Vocabulary',
           'Warmup', 'BestOf', 'Drafts', 'Drawing', 'Extent', 'Form', 'PromptsFile', 'Search',
           'ServedDrafts']
