"""Prints held-out text in which a model fills in spans or masked tokens, beside the original ones."""
from typing import Any

import jax
import numpy as np

from lm import generate, sharding, train
from lm.data.batch import Batch
from lm.objectives import span_corruption


def fill_spans(run: train.Run, result: train.Result, snippets: np.ndarray) -> None:
  """Prints the spans that the model writes greedily in place of T5's spans, in held-out snippets [S, T]."""
  tokenizer, rng, control = result.data.tokenizer, np.random.default_rng(0), run.objective.control
  modes = control[-3:] if len(run.objective.forms) > 1 else ()
  sentinels = np.int32([tokenizer.control_id(name) for name in control[:len(control) - len(modes)]])
  begin = np.int32([tokenizer.control_id(name) for name in modes[:1]])   # the regular mode
  pairs = [span_corruption.corrupt(snippet, span_corruption.noise_mask(len(snippet), 0.15, 3., rng), sentinels)
           for snippet in snippets]
  outputs = generate.tokens(run.model, result.params, tokenizer, [np.append(begin, source) for source, _ in pairs],
                            generate.Sampling(0.), max_tokens=48)

  def by_sentinel(ids):
    parts = np.split(ids, np.flatnonzero(np.isin(ids, sentinels)))[1:]
    return {int(part[0]): part[1:].tolist() for part in parts}

  is_right = []
  for n, ((source, targets), output) in enumerate(zip(pairs, outputs)):
    originals, predictions = by_sentinel(targets), by_sentinel(output)
    is_right += [predictions.get(i) == span for i, span in originals.items()]
    if n < 3:
      pieces = [_compared(tokenizer, predictions.get(i, []), originals[i]) if i in originals
                else tokenizer.decode([i]) for i in source.tolist()]
      print('\n---', ''.join(pieces))
  print(f'\n[[written|was]]; {np.mean(is_right):.1%} of {len(is_right)} spans are as they were')


def fill_masks(run: train.Run, result: train.Result, snippets: np.ndarray) -> None:
  """Prints the likeliest tokens where 15 % of the tokens of each snippet [S, T] are masked."""
  tokenizer, is_masked = result.data.tokenizer, np.random.default_rng(0).random(snippets.shape) < 0.15
  batch = Batch(np.where(is_masked, np.int32(tokenizer.control_id(run.objective.control[0])), snippets))

  @jax.jit
  @sharding.whole_rows()
  def likeliest(params, batch):
    outputs = run.model.apply(params, jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch))
    return sharding.constrain(jax.numpy.argmax(sharding.whole_logits(outputs.head, outputs.hidden), -1), '--')

  predictions = np.asarray(likeliest(result.params, batch))
  for predicted, original, masks in list(zip(predictions.tolist(), snippets.tolist(), is_masked))[:3]:
    pieces = [_compared(tokenizer, [a], [b]) if mask else tokenizer.decode([b])
              for a, b, mask in zip(predicted, original, masks)]
    print('\n---', ''.join(pieces))
  print(f'\n[[likeliest|was]]; {np.mean((predictions == snippets)[is_masked]):.1%} of {is_masked.sum()} tokens of '
        f'{len(snippets)} held-out snippets are as they were')


def _compared(tokenizer: Any, predicted: list[int], original: list[int]) -> str:
  return f'[[{tokenizer.decode(predicted)}|{tokenizer.decode(original)}]]'
