"""Prints the scores of texts and splits under an opened model: of each token, of each text, and their sums."""
import codecs
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import sharding
from lm.data.rows.packed_records import check_left_out
from lm.data.text.source import Documents
from lm.data.tokenizers.folder import mask_id
from lm.evaluate.score import Predicted, predictions, pseudo_predictions
from lm.train import validation

Loaded = Any   # an opened run or Hugging Face model, with `model`, `params` and `tokenizer`


def without_empty(texts: Documents, key: str, allow_left_out: bool) -> Sequence[str]:
  """Returns the texts that are not empty, and prints how many are empty. Raises ValueError if too many are."""
  empty = [i for i, text in enumerate(texts) if not text]
  if len(empty) == len(texts):
    raise ValueError(f'none of {len(texts):,} texts has anything to score under --key={key}; give another --key')
  report_left_out('texts', texts, empty, 'as they are empty', f'see whether --key={key} is the field with the text',
                  allow_left_out)
  places = sorted({*range(len(texts))} - {*empty})
  return Documents(lambda: places, lambda i: texts[i], texts.place)


def report_left_out(what: str, texts: Documents, places: Sequence[int], why: str, advice: str, allowed: bool
                    ) -> None:
  """Prints the number of records that are left out, and the place of the first.

  Raises ValueError if they are half of the records or more, unless `allowed` is true.
  """
  if len(places):
    line = f'{len(places):,} of {len(texts):,} {what} are left out, {why}; the first is {texts.place(places[0])}'
    print(check_left_out(line, len(places) / len(texts), advice, allowed))


def read_text(file: pathlib.Path) -> str:
  """Returns the text of a file, with its line ends. Raises ValueError if it is not UTF-8."""
  data = file.read_bytes()
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    name = 'UTF-16' if utf16 else 'ENCODING'
    raise ValueError(f'{file} is no UTF-8 (byte {data[error.start]:#04x} at {error.start:,})'
                     f'{", but UTF-16" if utf16 else ""}: convert it with iconv -f {name} -t UTF-8') from None


def check_flags(model: Any, has_source: bool, bos: bool | None) -> None:
  """Raises ValueError if flags do not fit the kind of model; prints what the scores of an encoder are."""
  if model.reads_source and not has_source:
    raise ValueError('an encoder-decoder scores a text given its source: give --source (of --jsonl, --source_key)')
  if has_source and not model.reads_source:
    raise ValueError('--source and --source_key are for an encoder-decoder, such as T5, which this model is not')
  if bos is not None and (model.reads_source or not model.causal):
    raise ValueError(f'--{"" if bos else "no"}bos is for decoders; this model scores the first token too')
  if not model.causal:
    print('pseudo-log-likelihood: each token is masked in turn and predicted from all others')


def check_lengths(loaded: Loaded, texts: Sequence[str]) -> None:
  """Raises ValueError if a text is longer than the model can read at once after bos."""
  for begin in range(0, len(texts), 256):
    for i, ids in enumerate(loaded.tokenizer.encode_batch(texts[begin:begin + 256]), begin + 1):
      if len(ids) > loaded.model.max_length:
        raise ValueError(f'text {i} of {len(texts)} has {len(ids):,} tokens, and the model reads '
                         f'{loaded.model.max_length:,} at once: score a part of it, or give --windows, by which each '
                         'token is given at least half of that before it')


def begins(loaded: Loaded, bos: bool | None) -> bool:
  """Returns whether a text is scored after bos, and prints it for a decoder."""
  tokenizer = loaded.tokenizer
  if loaded.model.causal and not loaded.model.reads_source:
    whose = 'as the tokenizer does' if bos is None else 'as asked for'
    bos = tokenizer.adds_bos if bos is None else bos
    name = next(name for name in tokenizer.control_names if tokenizer.control_id(name) == tokenizer.bos_id)
    print(f'{name} is put in front of a text, {whose}' if bos else
          f'no {name} is put in front of a text, {whose}: its first token is not scored')
  return bos is not False


class Scored(NamedTuple):
  """A text under a model."""
  tokens: list[int]      # that are scored
  predicted: Predicted   # of each of them
  size: int              # UTF-8 bytes that they stand for

  @property
  def scores(self) -> np.ndarray:
    """Log-probability of each token."""
    return self.predicted.log_p


def scored(loaded: Loaded, texts: Sequence[str], sources: Sequence[str] | None, bos: bool, window: int | None = None,
           stride: int | None = None) -> list[Scored]:
  """Returns the scores of each text, given its source if there are sources, after bos if `bos` is true.

  See `score.predictions` for windows. An encoder has none.
  """
  model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
  begin, end, encoded = [tokenizer.bos_id] * bos, [tokenizer.eos_id], tokenizer.encode_batch(texts)
  ids = [np.int32([*begin, *text_ids]) for text_ids in encoded]
  if not model.causal:
    ids = [np.int32([*text_ids, *end]) for text_ids in ids]
    predicted = pseudo_predictions(model, params, ids, mask_id(tokenizer))
  elif sources is not None:
    ids = [np.int32([*text_ids, *end]) for text_ids in ids]
    source_ids = [np.int32([*one, *end]) for one in tokenizer.encode_batch(sources)]
    predicted = predictions(model, params, ids, source_ids, window, stride)
  else:
    predicted = predictions(model, params, ids, None, window, stride)
  sizes = [int(tokenizer.sizes(text, text_ids)[not bos:].sum()) if len(text_ids) else 0
           for text, text_ids in zip(texts, encoded)]
  return [Scored(text_ids[1:1 + len(one.log_p)].tolist(), one, size)
          for text_ids, one, size in zip(ids, predicted, sizes)]


def show(loaded: Loaded, texts: Sequence[str], sources: Sequence[str] | None,
         bos: bool) -> None:
  """Prints a line for each token of a single text, and the sums."""
  text_scores, = scored(loaded, texts, sources, bos)
  if not text_scores.tokens:
    raise ValueError('there is nothing to score in the text: it has one token, and no bos before it; give --bos')
  names = {loaded.tokenizer.control_id(name): name for name in loaded.tokenizer.control_names}
  print('log p     token')
  for token, value in zip(text_scores.tokens, text_scores.scores):
    print(f'{value:8.4f}  {names.get(token) or loaded.tokenizer.decode([token])!r}')
  print(f'\n{summary([text_scores.scores], text_scores.size)}')


def show_all(loaded: Loaded, texts: Sequence[str], sources: Sequence[str] | None,
             bos: bool) -> None:
  """Prints a line for each text, and the sums. It scores a few hundred texts at a time."""
  all_scores, total_size = [], 0
  print('  tokens    loss  bits a byte  text')
  for begin in range(0, len(texts), 256):
    part = slice(begin, begin + 256)
    for text, score in zip(texts[part], scored(loaded, texts[part], sources and sources[part], bos)):
      scores, size = score.scores, score.size
      nll, count = -float(np.sum(scores, dtype=np.float64)), len(scores)
      loss = f'{nll / count:7.4f} {nll / np.log(2) / max(size, 1):12.4f}' if count else f'{"-":>7} {"-":>12}'
      print(f'{count:8,} {loss}  {text[:60]!r}')
      all_scores.append(scores)
      total_size += size
  if not sum(map(len, all_scores)):
    raise ValueError('there is nothing to score: each text has one token, and no bos before it; give --bos')
  print(f'\n{len(texts):,} texts: {summary(all_scores, total_size)}')


def summary(scores: Sequence[np.ndarray], size: int) -> str:
  """Returns the sums as text: tokens, bytes, loss, perplexity and bits a byte of texts of `size` bytes in all."""
  count, nll = sum(map(len, scores)), -sum(float(np.sum(values, dtype=np.float64)) for values in scores)
  loss = nll / max(count, 1)
  return (f'{count:,} tokens, {size:,} bytes: loss {loss:.4f} nats a token, perplexity {np.exp(loss):.2f}, '
          f'{nll / np.log(2) / max(size, 1):.4f} bits a byte')


def show_split(loaded: Loaded, split: str, context: int, mesh: jax.sharding.Mesh) -> None:
  """Prints the metrics of a run's own objective over a whole split of its data.

  Each window also reads the `context` positions before it. Raises ValueError if the data has no such split.
  """
  run, rows = loaded.run, sharding.padded_rows(loaded.run.batch)
  data = loaded.open_data()
  if split not in data.stores:
    raise ValueError(f'--split={split} is none of {", ".join(data.stores)}')
  step = validation.make_step(loaded.model.apply, run.objective, loaded.tokenizer)
  # Only documents have a context. Stored columns belong to the rows of seed 0, as in training.
  order = {'seed': None, 'context': context} if context else {'seed': 0}
  batches = data.batches(split, run.objective, rows, repeat=False, **order)
  print(f'{split}: {validation.describe_batches(batches)}')
  for name, value in validation.evaluate(step, loaded.params, batches, mesh).items():
    print(f'{name:14} {value:.4f}')
