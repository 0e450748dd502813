"""Score text under a trained run or a Hugging Face model: log-probability of each token, loss, perplexity, bits a byte.

  python experiments/score.py --model=gpt2 --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --split=validation
"""
import pathlib

import jax
import numpy as np

from lm import evaluate, launch, pretrained, sharding, trained


def score(*, workdir: pathlib.Path = pathlib.Path('runs/quickstart'), model: str | None = None,
          text: str | None = None, file: pathlib.Path | None = None, split: str | None = None, context: int = 0,
          bos: bool = True, best: bool = False, mesh: str | None = None) -> None:
  """Scores a text, or a split of the run's data.

  Args:
    workdir: of the run.
    model: a Hugging Face folder, an imported one or an id on the hub, in place of a run.
    text: what to score.
    file: a text file to score.
    split: train or validation.
    context: positions before each window of a split that are read again, for context.
    bos: begin the text as a document begins; without it, as in transformers' loss, the first token is not scored.
    mesh: the devices as DATAxMODEL; none puts all of them on data.
    best: take the best checkpoint by validation loss, not the newest.
  """
  if sum(given is not None for given in (text, file, split)) != 1:
    raise ValueError('give one of --text, --file and --split')
  if model and split is not None:
    raise ValueError('--split is of a run; score a --text or a --file under a --model')
  if file is not None:
    text = file.read_text('utf-8', errors='replace')
  with jax.set_mesh(devices := sharding.make_mesh(mesh)):
    loaded = pretrained.load(model) if model else trained.load(workdir, best)
    if split is None:
      show(loaded, text, bos)
      return
    run, rows = loaded.run, -(-loaded.run.batch // devices.shape['data']) * devices.shape['data']
    data = run.data.open(workdir)
    if split not in data.stores:
      raise ValueError(f'--split={split} is none of {", ".join(data.stores)}')
    step = evaluate.make_step(loaded.model.apply, run.objective, loaded.tokenizer.byte_lengths())
    batches = data.batches(split, run.objective.example, rows, seed=None, repeat=False, context=context)
    for name, value in evaluate.evaluate(step, loaded.params, batches, devices).items():
      print(f'{name:14} {value:.4f}')


def show(loaded: trained.Trained | pretrained.Pretrained, text: str, bos: bool) -> None:
  """Prints a line a token, and the sums."""
  if not text:
    raise ValueError('there is no text to score: it is empty')
  ids = loaded.tokenizer.encode(text)
  if not bos and len(ids) < 2:
    raise ValueError(f'--nobos leaves nothing to score in a text of {len(ids)} token')
  tokens = np.concatenate([[loaded.tokenizer.bos_id], ids]) if bos else np.asarray(ids)
  scores = evaluate.log_probabilities(loaded.model, loaded.params, tokens)
  print('log p     token')
  for token, value in zip(tokens[1:].tolist(), scores):
    print(f'{value:8.4f}  {loaded.tokenizer.decode([token])!r}')
  nll, size = -float(np.sum(scores, dtype=np.float64)), len(text.encode())
  size -= 0 if bos else len(loaded.tokenizer.decode(tokens[:1].tolist()).encode())
  loss = nll / len(scores)
  print(f'\n{len(scores)} tokens, {size} bytes: loss {loss:.4f} nats a token, perplexity {np.exp(loss):.2f}, '
        f'{nll / np.log(2) / size:.4f} bits a byte')


if __name__ == '__main__':
  launch.tool(score)
