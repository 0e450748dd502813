"""Score text under a trained run or a Hugging Face model: log-probability of each token, loss, perplexity, bits a byte.

  python experiments/score.py --model=gpt2 --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --split=validation
  python experiments/score.py --model=gpt2 --jsonl='texts/*.jsonl'
"""
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lm import evaluate, launch, pretrained, sharding, trained
from lm.data import corpora


def score(*, workdir: pathlib.Path = pathlib.Path('runs/quickstart'), model: str | None = None,
          text: str | None = None, file: pathlib.Path | None = None, jsonl: str | None = None, key: str = 'text',
          split: str | None = None, context: int = 0, bos: bool = True, best: bool = False,
          mesh: str | None = None) -> None:
  """Scores a text token by token, texts line by line, or a split of the run's data as a whole.

  Args:
    workdir: of the run.
    model: a Hugging Face folder, an imported one or an id on the hub, in place of a run.
    text: what to score.
    file: a text file to score.
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern; a line is a text.
    key: the field of a line that holds the text.
    split: train or validation.
    context: positions before each window of a split that are read again, for context.
    bos: begin the text as a document begins; without it, as in transformers' loss, the first token is not scored.
    mesh: the devices as DATAxMODEL; none puts all of them on data.
    best: take the best checkpoint by validation loss, not the newest.
  """
  if sum(given is not None for given in (text, file, jsonl, split)) != 1:
    raise ValueError('give one of --text, --file, --jsonl and --split')
  if model and split is not None:
    raise ValueError('--split is of a run; score a --text, a --file or a --jsonl under a --model')
  texts = None if jsonl is None else corpora.jsonl(jsonl, key, validation=0.).splits['train']
  if file is not None:
    text = file.read_text('utf-8', errors='replace')
  with jax.set_mesh(devices := sharding.make_mesh(mesh)):
    loaded = pretrained.load_decoder(model) if model else trained.load(workdir, best)
    if texts is not None:
      show_all(loaded, texts, bos)
      return
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


def tokens_of(tokenizer: Any, text: str, bos: bool) -> np.ndarray:
  ids = np.asarray(tokenizer.encode(text))
  return np.concatenate([[tokenizer.bos_id], ids]) if bos else ids


def size_of(tokenizer: Any, text: str, tokens: np.ndarray, bos: bool) -> int:
  """UTF-8 bytes of what is scored."""
  return len(text.encode()) - (0 if bos else len(tokenizer.decode(tokens[:1].tolist()).encode()))


def show(loaded: trained.Trained | pretrained.Pretrained, text: str, bos: bool) -> None:
  """Prints a line a token, and the sums."""
  if not text:
    raise ValueError('there is no text to score: it is empty')
  tokens = tokens_of(loaded.tokenizer, text, bos)
  if len(tokens) < 2:
    raise ValueError(f'--nobos leaves nothing to score in a text of {len(tokens)} token')
  scores = evaluate.log_probabilities(loaded.model, loaded.params, [tokens])[0]
  print('log p     token')
  for token, value in zip(tokens[1:].tolist(), scores):
    print(f'{value:8.4f}  {loaded.tokenizer.decode([token])!r}')
  print(f'\n{told([scores], size_of(loaded.tokenizer, text, tokens, bos))}')


def show_all(loaded: trained.Trained | pretrained.Pretrained, texts: Sequence[str], bos: bool) -> None:
  """Prints a line a text, and the sums; a few hundred texts at a time."""
  everything, whole = [], 0
  print('  tokens    loss  bits a byte  text')
  for begin in range(0, len(texts), 256):
    some = texts[begin:begin + 256]
    tokens = [tokens_of(loaded.tokenizer, text, bos) for text in some]
    scores = evaluate.log_probabilities(loaded.model, loaded.params, tokens)
    for text, ids, found in zip(some, tokens, scores):
      size, nll = size_of(loaded.tokenizer, text, ids, bos), -float(np.sum(found, dtype=np.float64))
      print(f'{len(found):8,} {nll / max(len(found), 1):7.4f} {nll / np.log(2) / max(size, 1):12.4f}  {text[:60]!r}')
      whole += size
    everything += scores
  print(f'\n{len(texts):,} texts: {told(everything, whole)}')


def told(scores: Sequence[np.ndarray], size: int) -> str:
  count, nll = sum(map(len, scores)), -sum(float(np.sum(found, dtype=np.float64)) for found in scores)
  loss = nll / max(count, 1)
  return (f'{count:,} tokens, {size:,} bytes: loss {loss:.4f} nats a token, perplexity {np.exp(loss):.2f}, '
          f'{nll / np.log(2) / max(size, 1):.4f} bits a byte')


if __name__ == '__main__':
  launch.tool(score)
