"""Classifies texts by scoring: each class has a verbaliser, some words whose probability after the text is computed."""
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm import generate
from lm.evaluate import continuations


def log_probabilities(model: Any, params: Any, tokenizer: Any, contexts: Sequence[str], verbalisers: Sequence[str]
                      ) -> np.ndarray:
  """Returns log p(verbaliser | context) in nats, [contexts, verbalisers], on the current mesh.

  If a context and the longest verbaliser are longer than the model reads at once, only the end of the context is read.

  Raises ValueError if a verbaliser is empty, or two have the same tokens.
  """
  words = [np.int32(tokenizer.encode(text)) for text in verbalisers]
  if min(map(len, words)) == 0 or len({ids.tobytes() for ids in words}) < len(words):
    raise ValueError(f'the verbalisers {list(verbalisers)} have to be different texts, none of them empty')
  room = model.max_length + 1 - max(map(len, words))
  befores = [generate.with_bos(np.int32(tokenizer.encode(text)), tokenizer, True)[-room:] for text in contexts]
  rows = [np.concatenate([before, ids]) for before in befores for ids in words]
  starts = [len(before) for before in befores for _ in words]
  predicted = continuations.predictions(model, params, rows, starts)
  return np.array([one.log_p.sum(dtype=np.float64) for one in predicted]).reshape(len(contexts), len(words))
