"""Scores of texts and of splits under an opened model, printed: by token, by text, and in sum."""
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
from lm.evaluate.score import log_probabilities, pseudo_log_probabilities
from lm.train import validation

Loaded = Any   # a run or a Hugging Face model that was opened: its model, params and tokenizer


def without_empty(texts: Documents, key: str, allow_left_out: bool) -> Sequence[str]:
  """Returns the texts that are not empty; prints how many are. ValueError where too few are left."""
  empty = [i for i, text in enumerate(texts) if not text]
  if len(empty) == len(texts):
    raise ValueError(f'none of {len(texts):,} texts has anything to score under --key={key}; give another --key')
  report_left_out('texts', texts, empty, 'as they are empty', f'see whether --key={key} is the field with the text',
                  allow_left_out)
  places = sorted({*range(len(texts))} - {*empty})
  return Documents(lambda: places, lambda i: texts[i], texts.place)


def report_left_out(what: str, texts: Documents, places: Sequence[int], why: str, advice: str, allowed: bool
                    ) -> None:
  """Prints how many records are left out, and the first; ValueError from half of them on, unless that is allowed."""
  if len(places):
    line = f'{len(places):,} of {len(texts):,} {what} are left out, {why}; the first is {texts.place(places[0])}'
    print(check_left_out(line, len(places) / len(texts), advice, allowed))


def read_text(file: pathlib.Path) -> str:
  """Returns the text of a file as it is, line ends included; ValueError where it is no UTF-8."""
  data = file.read_bytes()
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    name = 'UTF-16' if utf16 else 'ENCODING'
    raise ValueError(f'{file} is no UTF-8 (byte {data[error.start]:#04x} at {error.start:,})'
                     f'{", but UTF-16" if utf16 else ""}: convert it with iconv -f {name} -t UTF-8') from None


def check_flags(model: Any, has_source: bool, bos: bool | None) -> None:
  """Announces pseudo-log-likelihoods of an encoder. ValueError where flags do not go with the kind of model."""
  if model.reads_source and not has_source:
    raise ValueError('an encoder-decoder scores a text given its source: give --source (of --jsonl, --source_key)')
  if has_source and not model.reads_source:
    raise ValueError('--source and --source_key are for an encoder-decoder, such as T5, which this model is not')
  if bos is not None and (model.reads_source or not model.causal):
    raise ValueError(f'--{"" if bos else "no"}bos is for decoders; this model scores the first token too')
  if not model.causal:
    print('pseudo-log-likelihood: each token is masked in turn and predicted from all others')


def check_lengths(loaded: Loaded, texts: Sequence[str]) -> None:
  """ValueError where a text, with bos, is longer than the model can read at once."""
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
  tokens: list[int]     # that are scored
  scores: np.ndarray    # log p of each
  size: int             # UTF-8 bytes that they stand for


def scored(loaded: Loaded, texts: Sequence[str], sources: Sequence[str] | None,
           bos: bool) -> list[Scored]:
  """Returns the scores of each text, given its source where there are sources, after bos where `bos` is true."""
  model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
  begin, end, encoded = [tokenizer.bos_id] * bos, [tokenizer.eos_id], tokenizer.encode_batch(texts)
  ids = [np.int32([*begin, *text_ids]) for text_ids in encoded]
  if not model.causal:
    ids = [np.int32([*text_ids, *end]) for text_ids in ids]
    scores = pseudo_log_probabilities(model, params, ids, mask_id(tokenizer))
  elif sources is not None:
    ids = [np.int32([*text_ids, *end]) for text_ids in ids]
    source_ids = [np.int32([*one, *end]) for one in tokenizer.encode_batch(sources)]
    scores = log_probabilities(model, params, ids, sources=source_ids)
  else:
    scores = log_probabilities(model, params, ids)
  sizes = [int(tokenizer.sizes(text, text_ids)[not bos:].sum()) if len(text_ids) else 0
           for text, text_ids in zip(texts, encoded)]
  return [Scored(text_ids[1:1 + len(values)].tolist(), values, size)
          for text_ids, values, size in zip(ids, scores, sizes)]


def show(loaded: Loaded, texts: Sequence[str], sources: Sequence[str] | None,
         bos: bool) -> None:
  """Prints a line a token, and the sums."""
  one, = scored(loaded, texts, sources, bos)
  if not one.tokens:
    raise ValueError('there is nothing to score in the text: it has one token, and no bos before it; give --bos')
  names = {loaded.tokenizer.control_id(name): name for name in loaded.tokenizer.control_names}
  print('log p     token')
  for token, value in zip(one.tokens, one.scores):
    print(f'{value:8.4f}  {names.get(token) or loaded.tokenizer.decode([token])!r}')
  print(f'\n{summary([one.scores], one.size)}')


def show_all(loaded: Loaded, texts: Sequence[str], sources: Sequence[str] | None,
             bos: bool) -> None:
  """Prints a line a text, and the sums; a few hundred texts at a time."""
  all_scores, total_size = [], 0
  print('  tokens    loss  bits a byte  text')
  for begin in range(0, len(texts), 256):
    some = slice(begin, begin + 256)
    for text, one in zip(texts[some], scored(loaded, texts[some], sources and sources[some], bos)):
      nll, count = -float(np.sum(one.scores, dtype=np.float64)), len(one.scores)
      loss = f'{nll / count:7.4f} {nll / np.log(2) / max(one.size, 1):12.4f}' if count else f'{"-":>7} {"-":>12}'
      print(f'{count:8,} {loss}  {text[:60]!r}')
      all_scores.append(one.scores)
      total_size += one.size
  if not sum(map(len, all_scores)):
    raise ValueError('there is nothing to score: each text has one token, and no bos before it; give --bos')
  print(f'\n{len(texts):,} texts: {summary(all_scores, total_size)}')


def summary(scores: Sequence[np.ndarray], size: int) -> str:
  """Returns a sentence on the loss of texts that have `size` bytes together."""
  count, nll = sum(map(len, scores)), -sum(float(np.sum(values, dtype=np.float64)) for values in scores)
  loss = nll / max(count, 1)
  return (f'{count:,} tokens, {size:,} bytes: loss {loss:.4f} nats a token, perplexity {np.exp(loss):.2f}, '
          f'{nll / np.log(2) / max(size, 1):.4f} bits a byte')


def show_split(loaded: Loaded, split: str, context: int, mesh: jax.sharding.Mesh) -> None:
  """Prints the metrics of a run's own objective over a whole split of its data.

  Each window of a split reads `context` positions before it again. ValueError where the data has no such split.
  """
  run, rows = loaded.run, sharding.padded_rows(loaded.run.batch)
  data = loaded.open_data()
  if split not in data.stores:
    raise ValueError(f'--split={split} is none of {", ".join(data.stores)}')
  step = validation.make_step(loaded.model.apply, run.objective, loaded.tokenizer)
  # Only documents have a context; what was stored of rows is stored of those of seed 0, as in training.
  order = {'seed': None, 'context': context} if context else {'seed': 0}
  batches = data.batches(split, run.objective, rows, repeat=False, **order)
  print(f'{split}: {validation.reading(batches)}')
  for name, value in validation.evaluate(step, loaded.params, batches, mesh).items():
    print(f'{name:14} {value:.4f}')
