"""Held-out text whose spans or masked tokens a model fills in, printed beside what was there."""
import jax
import numpy as np

from lm import generate, sharding, train
from lm.data.batch import Batch
from lm.objectives import span_corruption


def fill_spans(run: train.Run, result: train.Result, snippets: np.ndarray) -> None:
  """Prints what the model writes in place of T5's spans, greedily, in held-out snippets [S, T]."""
  tokens, rng, control = result.data.tokenizer, np.random.default_rng(0), run.objective.control
  modes = control[-3:] if len(run.objective.forms) > 1 else ()
  ids = np.int32([tokens.control_id(name) for name in control[:len(control) - len(modes)]])
  begin = np.int32([tokens.control_id(name) for name in modes[:1]])   # the regular mode
  pairs = [span_corruption.corrupt(snippet, span_corruption.noise_mask(len(snippet), 0.15, 3., rng),
                                   ids) for snippet in snippets]
  written = generate.tokens(run.model, result.params, tokens, [np.append(begin, source) for source, _ in pairs],
                            generate.Sampling(0.), max_tokens=48)

  def by_sentinel(targets):
    parts = np.split(targets, np.flatnonzero(np.isin(targets, ids)))[1:]
    return {int(part[0]): part[1:].tolist() for part in parts}

  right = []
  for n, ((source, targets), ours) in enumerate(zip(pairs, written)):
    hidden, answers = by_sentinel(targets), by_sentinel(ours)
    right += [answers.get(i) == span for i, span in hidden.items()]
    if n < 3:
      shown = [f'[[{tokens.decode(answers.get(i, []))}|{tokens.decode(hidden[i])}]]' if i in hidden
               else tokens.decode([i]) for i in source.tolist()]
      print('\n---', ''.join(shown))
  print(f'\n[[written|was]]; {np.mean(right):.1%} of {len(right)} spans are as they were')


def fill_masks(run: train.Run, result: train.Result, snippets: np.ndarray) -> None:
  """Prints what the model takes for the likeliest where tokens are masked, 15 % of each snippet [S, T]."""
  tokens, hidden = result.data.tokenizer, np.random.default_rng(0).random(snippets.shape) < 0.15
  batch = Batch(np.where(hidden, np.int32(tokens.control_id(run.objective.control[0])), snippets))

  @jax.jit
  def likeliest(params, batch):
    outputs = run.model.apply(params, jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch))
    return sharding.constrain(jax.numpy.argmax(sharding.constrain(outputs.head(outputs.hidden), 'B--'), -1), '--')

  predictions = np.asarray(likeliest(result.params, batch))
  for row, was, masks in list(zip(predictions.tolist(), snippets.tolist(), hidden))[:3]:
    print('\n---', ''.join(f'[[{tokens.decode([a])}|{tokens.decode([b])}]]' if mask else tokens.decode([b])
                           for a, b, mask in zip(row, was, masks)))
  print(f'\n[[likeliest|was]]; {np.mean((predictions == snippets)[hidden]):.1%} of {hidden.sum()} tokens of '
        f'{len(snippets)} held-out snippets are as they were')
