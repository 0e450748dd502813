"""BERTScore (Zhang et al. 2020, arXiv:1904.09675): tokens of two texts, matched by their hidden states in an encoder.

Precision is the mean over the candidate's tokens of the largest cosine similarity with a token of the reference, and
recall the same with the texts exchanged. The numbers are those of the package bert-score, with one exception: there, a
row that is padded in a batch has a largest similarity of at least 0; here, padding counts for nothing.
"""
import collections
import csv
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.data import tokenizers
from lm.evaluate import measures, row_shapes
from lm.evaluate.learned import text_rows
from lm.evaluate.measures import Measure
from lm.evaluate.texts import scored_pairs
from lm.evaluate.texts.scored_pairs import References
from lm.models import stack
from lm.models.encoder import Bidirectional

NAMES = 'precision', 'recall', 'f1'
CHUNK = 1024   # candidates whose hidden states are in memory at once


def read_baseline(path: pathlib.Path, layer: int) -> np.ndarray:
  """Returns the baseline of a layer, [3], from a file of bert-score: lines `LAYER,P,R,F` below a header."""
  with open(path, encoding='utf-8', newline='') as file:
    values = {row['LAYER']: [float(row[name]) for name in 'PRF'] for row in csv.DictReader(file)}
  if str(layer) not in values:
    raise ValueError(f'{path} has no baseline of layer {layer}, only of {", ".join(values) or "none"}')
  return np.array(values[str(layer)])


def first_layers(model: Bidirectional, params: Any, count: int | None) -> tuple[Bidirectional, Any]:
  """Returns an encoder with the first `count` layers of another. Raises ValueError if it does not have as many."""
  layers = len(model.layers)
  if count is None or count == layers:
    return model, params
  if not 1 <= count <= layers:
    raise ValueError(f'layer={count} is not between 1 and {layers}, the layers of the encoder')
  if len(model.blocks) != 1 or len(model.blocks[0].pattern) != 1:
    raise ValueError('the layers of the encoder differ, and only the last one can be taken; leave out the layer')
  blocks = jax.tree.map(lambda x: x[:count], params['blocks'])
  return model.clone(blocks=stack.stacks(model.layers[:count])), {**params, 'blocks': blocks}


def idf(documents: Sequence[np.ndarray]) -> collections.defaultdict[int, float]:
  """Returns log((n + 1) / (m + 1)) by token, where m of the n documents have the token."""
  counts = collections.Counter(token for document in documents for token in {*document.tolist()})
  weights = collections.defaultdict(lambda: math.log(len(documents) + 1))
  return collections.defaultdict(weights.default_factory, {
      token: math.log((len(documents) + 1) / (count + 1)) for token, count in counts.items()})


@jax.jit
def _largest(first: jax.Array, second: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the largest cosine similarity of each vector of `first` [P, T, D] in `second` [P, S, D], and vice versa.

  `exists` [P, T, S] says which pairs of vectors exist.
  """
  unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (first, second)]
  similarity = jnp.einsum('ptd,psd->pts', *unit, preferred_element_type=jnp.float32)
  similarity = jnp.where(exists, similarity, -jnp.inf)
  return similarity.max(2), similarity.max(1)


def matches(pairs: Sequence[tuple[int, int]], states: Sequence[np.ndarray], weights: Sequence[np.ndarray]
            ) -> np.ndarray:
  """Returns precision, recall and F1 of each pair (candidate, reference), [n, 3], as places in `states` [T, D]."""
  result = np.zeros((len(pairs), 3))
  lengths = [len(state) for state in states]
  by_shape: dict[tuple[int, int], list[int]] = {}
  for i, places in enumerate(pairs):
    shape = tuple(row_shapes.width(lengths[place]) for place in places)
    by_shape.setdefault(shape, []).append(i)
  for shape, members in by_shape.items():
    count = max(1, 65_536 // max(shape))
    for start in range(0, len(members), count):
      chosen = members[start:start + count]
      sides, exist = [], []
      for side, size in enumerate(shape):
        padded = np.ones((len(chosen), size, states[0].shape[1]), np.float32)
        mask = np.zeros((len(chosen), size), bool)
        for row, i in enumerate(chosen):
          state = states[pairs[i][side]]
          padded[row, :len(state)], mask[row, :len(state)] = state, True
        sides.append(padded)
        exist.append(mask)
      largest = _largest(*sides, exist[0][:, :, None] & exist[1][:, None])
      for side, best in enumerate(map(np.asarray, largest)):
        for row, i in enumerate(chosen):
          weight = weights[pairs[i][side]]
          is_empty = min(lengths[place] for place in pairs[i]) <= 2   # [CLS] and [SEP] alone: bert-score gives 0
          if not is_empty and weight.sum():
            result[i, side] = best[row, :len(weight)] @ weight / weight.sum()
  sums = result[:, 0] + result[:, 1]
  result[:, 2] = np.divide(2 * result[:, 0] * result[:, 1], sums, out=np.zeros(len(pairs)), where=sums != 0)
  return result


@dataclasses.dataclass(frozen=True, eq=False)
class BertScore:
  """Precision, recall and F1 of BERTScore, means over candidates; of several references, the best counts for each.

  Args:
    model: an encoder, such as BERT.
    params: its parameters.
    tokenizer: its tokenizer, whose bos and eos are [CLS] and [SEP].
    name: the name of the model, for the signature.
    layer: the layer whose output is compared, from 1; none for the last.
    use_idf: weight tokens by their inverse document frequency in the references.
    baseline: a file of baselines of bert-score, with which scores are rescaled; none does not rescale.
  """
  model: Bidirectional
  params: Any = dataclasses.field(repr=False)
  tokenizer: tokenizers.Tokenizer
  name: str = ''
  layer: int | None = None
  use_idf: bool = False
  baseline: pathlib.Path | None = None

  def __post_init__(self):
    if not isinstance(self.model, Bidirectional):
      raise ValueError(f'BERTScore compares hidden states of an encoder, such as BERT, and {self.name or "this"} is '
                       f'of class {type(self.model).__name__}; take another model')

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    scored_pairs.check('bert_score', candidates, references)
    flat = [text.strip() for several in references for text in several]
    texts = list(dict.fromkeys([*(text.strip() for text in candidates), *flat]))
    encoded = dict(zip(texts, map(self._encode, self.tokenizer.encode_batch(texts))))
    weight = self._weight([encoded[text] for text in flat])
    best = np.concatenate([self._best(candidates[i:i + CHUNK], references[i:i + CHUNK], encoded, weight)
                           for i in range(0, len(candidates), CHUNK)])
    layer = self.layer or len(self.model.layers)
    if self.baseline is not None:
      baseline = read_baseline(self.baseline, layer)
      best = (best - baseline) / (1 - baseline)
    signature = (f'bert_score model:{self.name} layer:{layer} idf:{"yes" if self.use_idf else "no"} '
                 f'rescaled:{"no" if self.baseline is None else self.baseline.name} '
                 f'refs:{scored_pairs.count(references)} (best)')
    return [measures.mean(f'bert_score_{name}', best[:, i], 'higher', signature) for i, name in enumerate(NAMES)]

  def note(self, candidates: Sequence[str], references: References) -> str | None:
    """Returns a line that says how many texts are cut; None without any."""
    most = self.model.max_length
    sizes = text_rows.sizes(self.tokenizer, [text.strip() for text in candidates],
                            [[text.strip() for text in several] for several in references])
    cut = [size > most - 2 for size in sizes.values()]
    return (f'bert_score reads {most} tokens of a text with [CLS] and [SEP], and {sum(cut):,} of {len(cut):,} '
            'different texts are longer: they lose their ends' if any(cut) else None)

  @functools.cached_property   # a new one for each chunk would be compiled anew
  def _first_layers(self) -> tuple[Bidirectional, Any]:
    return first_layers(self.model, self.params, self.layer)

  def _encode(self, ids: np.ndarray) -> np.ndarray:
    room = self.model.max_length - 2
    return np.concatenate([[self.tokenizer.bos_id], ids[:room], [self.tokenizer.eos_id]]).astype(np.int32)

  def _weight(self, references: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from tokens to their weights; that of [CLS] and [SEP] is zero."""
    if self.use_idf:
      table = idf(references)
      return lambda tokens: np.array([table[token] for token in tokens.tolist()])
    control = self.tokenizer.bos_id, self.tokenizer.eos_id
    return lambda tokens: (~np.isin(tokens, control)).astype(float)

  def _best(self, candidates: Sequence[str], references: References, encoded: Mapping[str, np.ndarray],
            weight: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns precision, recall and F1 of each candidate, [n, 3], each the best over its references."""
    flat = [text.strip() for several in references for text in several]
    place = {text: i for i, text in enumerate(dict.fromkeys([*(text.strip() for text in candidates), *flat]))}
    tokens = [encoded[text] for text in place]
    owner = np.repeat(np.arange(len(candidates)), [len(several) for several in references])
    pairs = [(place[candidates[i].strip()], place[text]) for i, text in zip(owner, flat)]
    values = matches(pairs, self._states(tokens), [weight(each) for each in tokens])
    best = np.full((len(candidates), 3), -np.inf)
    np.maximum.at(best, owner, values)
    return best

  def _states(self, encoded: Sequence[np.ndarray]) -> list[np.ndarray]:
    model, params = self._first_layers
    states: list[Any] = [None] * len(encoded)
    rows = [text_rows.Text(tokens, np.zeros_like(tokens)) for tokens in encoded]
    function = functools.partial(text_rows.hidden, model.apply, params)
    for places, values in text_rows.compute('bert_score', function, rows, model.max_length):
      for row, i in enumerate(places):
        states[i] = values[row, :len(encoded[i])]
    return states
