"""Score text under a trained run: per-token log-probabilities, loss, perplexity, bits per byte.

  python experiments/score.py --workdir=runs/quickstart --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --split=validation
"""
import pathlib

import jax
import numpy as np

from lm import evaluate, launch, sharding, trained


def score(*, workdir: pathlib.Path = pathlib.Path('runs/quickstart'), text: str | None = None,
          file: pathlib.Path | None = None, split: str | None = None, context: int = 0, best: bool = False) -> None:
  """Scores a text, or a split of the run's data.

  Args:
    workdir: of the run.
    text: what to score.
    file: a text file to score.
    split: train or validation.
    context: positions before each window of a split that are read again, for context.
    best: take the best checkpoint by validation loss, not the newest.
  """
  if sum(given is not None for given in (text, file, split)) != 1:
    raise ValueError('give one of --text, --file and --split')
  with jax.set_mesh(sharding.make_mesh()):
    loaded = trained.load(workdir, best)
    if split is None:
      show(loaded, text if file is None else file.read_text())
      return
    run, mesh = loaded.run, jax.sharding.get_mesh()
    data = run.data.open(workdir)
    if split not in data.stores:
      raise ValueError(f'--split={split} is none of {", ".join(data.stores)}')
    step = evaluate.make_step(loaded.model.apply, run.objective, loaded.tokenizer.byte_lengths())
    batches = data.batches(split, run.objective.example, run.batch, seed=None, repeat=False, context=context)
    for name, value in evaluate.evaluate(step, loaded.params, batches, mesh).items():
      print(f'{name:14} {value:.4f}')


def show(loaded: trained.Trained, text: str) -> None:
  """Prints a line a token, and the sums."""
  if not text:
    raise ValueError('there is no text to score: it is empty')
  ids = loaded.tokenizer.encode(text)
  scores = evaluate.log_probabilities(loaded.model, loaded.params, np.concatenate([[loaded.tokenizer.bos_id], ids]))
  print('log p     token')
  for token, value in zip(ids, scores):
    print(f'{value:8.4f}  {loaded.tokenizer.decode([token])!r}')
  nll, size = -float(np.sum(scores, dtype=np.float64)), len(text.encode())
  loss = nll / len(ids)
  print(f'\n{len(ids)} tokens, {size} bytes: loss {loss:.4f} nats a token, perplexity {np.exp(loss):.2f}, '
        f'{nll / np.log(2) / size:.4f} bits a byte')


if __name__ == '__main__':
  launch.tool(score)
