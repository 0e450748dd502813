"""The script of a small experiment."""

SCRIPT = '''
import dataclasses
from typing import Literal

from lm import optim
from lm.optim import schedules
from lm import train
from lm.data import dataset
from lm.data.text.source import Source
from lm.objectives.next_token import next_token
from lm.objectives.prefix import prefix
from lm.data.tokenizers.folder import Bytes
from helpers.runs import TEXTS, Bigram

TOKENIZER = Bytes()

def experiment(*, lr: float = 0.03, width: int = 8, steps: int = 6, batch: int = 8, corpus: str = 'a',
               optimizer: Literal['adam', 'sgd'] = 'adam', objective: Literal['next_token', 'prefix'] = 'next_token',
               encoder: bool = False, tags: tuple[str, ...] = (), vocab: int = TOKENIZER.vocab_size) -> train.Run:
  documents = [text + corpus for text in TEXTS]
  data = dataset.Text(Source('numbers', {'train': documents, 'validation': documents[:9]}, corpus), TOKENIZER, 16, ())
  model = (type('Encoder', (Bigram,), {'causal': False}) if encoder else Causal)(width, vocab=vocab)
  rate = schedules.warmup_constant(lr, steps, 1)
  return train.Run(model, {'next_token': next_token, 'prefix': prefix}[objective](), data,
                   {'adam': optim.adam, 'sgd': optim.sgd}[optimizer](rate), steps, batch, evaluate_every=2)

@dataclasses.dataclass(frozen=True)
class Causal(Bigram):
  causal = True
'''
