"""Score text under a trained run or a Hugging Face model: log-probability of each token, loss, perplexity, bits a byte.

  python experiments/score.py --model=gpt2 --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --split=validation
  python experiments/score.py --model=gpt2 --jsonl='texts/*.jsonl'
  python experiments/score.py --model=google-t5/t5-small --source="translate English to German: Hello" --text="Hallo"

Of a masked encoder (BERT) it is the pseudo-log-likelihood: each token is masked in turn.
"""
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm import evaluate, launch, pretrained, sharding, trained
from lm.data import corpora
from lm.models import encoder, encoder_decoder


def score(*, workdir: pathlib.Path = pathlib.Path('runs/quickstart'), model: str | None = None,
          text: str | None = None, source: str | None = None, file: pathlib.Path | None = None,
          jsonl: str | None = None, key: str = 'text', split: str | None = None, context: int = 0, bos: bool = True,
          best: bool = False, mesh: str | None = None) -> None:
  """Scores a text token by token, texts line by line, or a split of the run's data as a whole.

  Args:
    workdir: of the run.
    model: a Hugging Face folder, an imported one or an id on the hub, in place of a run.
    text: what to score.
    source: what the text answers, for an encoder-decoder such as T5.
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
  kind = pretrained.open_model(pretrained.locate(model)) if model else None
  if isinstance(kind, encoder_decoder.EncoderDecoder) != (source is not None):
    raise ValueError(f'--source={source} is for an encoder-decoder, such as T5; leave it out' if source is not None else
                     f'--model={model} is an encoder-decoder: give it a --source, and with --text what to score')
  texts = None if jsonl is None else corpora.jsonl(jsonl, key, validation=0.).splits['train']
  if file is not None:
    text = file.read_text('utf-8', errors='replace')
  with jax.set_mesh(devices := sharding.make_mesh(mesh)):
    loaded = pretrained.load(model) if model else trained.load(workdir, best)
    if texts is not None:
      show_all(loaded, texts, bos)
      return
    if split is None:
      show(loaded, text, source, bos)
      return
    run, rows = loaded.run, -(-loaded.run.batch // devices.shape['data']) * devices.shape['data']
    data = run.data.open(workdir)
    if split not in data.stores:
      raise ValueError(f'--split={split} is none of {", ".join(data.stores)}')
    step = evaluate.make_step(loaded.model.apply, run.objective, loaded.tokenizer.byte_lengths())
    batches = data.batches(split, run.objective.example, rows, seed=None, repeat=False, context=context)
    for name, value in evaluate.evaluate(step, loaded.params, batches, devices).items():
      print(f'{name:14} {value:.4f}')


class Scored(NamedTuple):
  tokens: np.ndarray
  scores: np.ndarray   # log-probabilities, in nats
  size: int            # UTF-8 bytes

  @property
  def nll(self) -> float:
    return -float(np.sum(self.scores, dtype=np.float64))


def scored(loaded: trained.Trained | pretrained.Pretrained, texts: Sequence[str], source: str | None, bos: bool
           ) -> list[Scored]:
  """Of each text, the tokens that are scored."""
  model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
  encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(texts)]
  sizes = [len(text.encode()) for text in texts]
  begin, end = np.int32([tokenizer.bos_id]), np.int32([tokenizer.eos_id])
  if isinstance(model, encoder.Encoder):
    mask = tokenizer.control_id('[MASK]')
    found = evaluate.pseudo_log_probabilities(model, params, [np.r_[begin, ids, end] for ids in encoded], mask)
  elif isinstance(model, encoder_decoder.EncoderDecoder):
    encoded, sources = [np.r_[ids, end] for ids in encoded], [np.r_[tokenizer.encode(source), end]] * len(texts)
    found = evaluate.log_probabilities_given(model, params, sources, [np.r_[loaded.begin, ids] for ids in encoded])
  elif bos:
    found = evaluate.log_probabilities(model, params, [np.r_[begin, ids] for ids in encoded])
  else:
    found = evaluate.log_probabilities(model, params, encoded)
    sizes = [size - len(tokenizer.decode(ids[:1].tolist()).encode()) for size, ids in zip(sizes, encoded)]
    encoded = [ids[1:] for ids in encoded]
  return [Scored(*one) for one in zip(encoded, found, sizes)]


def show(loaded: trained.Trained | pretrained.Pretrained, text: str, source: str | None, bos: bool) -> None:
  """Prints a line a token, and the sums."""
  if not text:
    raise ValueError('there is no text to score: it is empty')
  [found] = scored(loaded, [text], source, bos)
  if not len(found.scores):
    raise ValueError('--nobos leaves nothing to score in a text of one token')
  print('log p     token')
  for token, value in zip(found.tokens.tolist(), found.scores):
    print(f'{value:8.4f}  {loaded.tokenizer.decode([token])!r}')
  print(f'\n{told([found])}')


def show_all(loaded: trained.Trained | pretrained.Pretrained, texts: Sequence[str], bos: bool) -> None:
  """Prints a line a text, and the sums; a few hundred texts at a time."""
  everything = []
  print('  tokens    loss  bits a byte  text')
  for begin in range(0, len(texts), 256):
    some = texts[begin:begin + 256]
    for text, one in zip(some, scored(loaded, some, None, bos)):
      print(f'{len(one.scores):8,} {one.nll / max(len(one.scores), 1):7.4f} '
            f'{one.nll / np.log(2) / max(one.size, 1):12.4f}  {text[:60]!r}')
      everything.append(one)
  print(f'\n{len(texts):,} texts: {told(everything)}')


def told(found: Sequence[Scored]) -> str:
  count, size, nll = (sum(values) for values in zip(*((len(one.scores), one.size, one.nll) for one in found)))
  loss = nll / max(count, 1)
  return (f'{count:,} tokens, {size:,} bytes: loss {loss:.4f} nats a token, perplexity {np.exp(loss):.2f}, '
          f'{nll / np.log(2) / max(size, 1):.4f} bits a byte')


if __name__ == '__main__':
  launch.tool(score)
