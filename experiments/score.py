"""Score text under a trained run or a Hugging Face model: log-probability of each token, loss, perplexity, bits a byte.

  python experiments/score.py --model=gpt2 --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --split=validation
  python experiments/score.py --model=gpt2 --jsonl='texts/*.jsonl'
  python experiments/score.py --model=google-bert/bert-base-uncased --text="Once upon a time"
  python experiments/score.py --workdir=runs/reward --source="Reverse abcd" --text="dcba"
  python experiments/score.py --workdir=runs/reward --pairs='pairs/*.jsonl'
  python experiments/score.py --model=t5-small --source="translate English to German: Hello" --text="Hallo"
"""
import codecs
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lm import evaluate, launch, load, sharding
from lm.data.rows.packed_records import check_left_out
from lm.data.text import corpora
from lm.data.text.source import Documents
from lm.data.tokenizers.folder import mask_id
from lm.evaluate import rewards
from lm.hf import pretrained
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.reward import Reward
from lm.train import validation


def score(*, workdir: pathlib.Path = pathlib.Path('runs/quickstart'), model: str | None = None,
          text: str | None = None, file: pathlib.Path | None = None, jsonl: str | None = None, key: str = 'text',
          source: str | None = None, source_key: str | None = None, split: str | None = None, pairs: str | None = None,
          context: int = 0, bos: bool | None = None, windows: bool = False, best: bool = False,
          encoding_errors: Literal['strict', 'replace', 'drop'] = 'strict', decompressed_limit: float = 64.,
          allow_left_out: bool = False, mesh: str | None = None) -> None:
  """Scores a text token by token, texts line by line, or a split of the run's data as a whole.

  An encoder-decoder scores a text given its source, and how it ends. Of an encoder the scores are
  pseudo-log-likelihoods. A reward model gives a text its reward, as an answer to --source where there is one.

  Args:
    workdir: of the run.
    model: a Hugging Face folder, an imported one, an id on the hub or the workdir of a run, in place of --workdir.
    text: what to score.
    file: a text file to score.
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern; a line is a text.
    key: the field of a line that holds the text.
    source: what the encoder of an encoder-decoder reads, such as a text to translate; the text is the translation. Of a
      reward model, the prompt.
    source_key: the field of a line that holds the source.
    split: train or validation.
    pairs: files of JSON lines with a prompt, a chosen and a rejected answer each, as a reward model learns from them.
    context: positions before each window of a split that are read again, for context.
    bos: begin the text with bos, or with --nobos not: then its first token is not scored. None does as the model's own
      tokenizer does, and begins a text as its documents began under a run.
    windows: score a text that is longer than the model's context in windows, half overlapping.
    encoding_errors: what happens to a line of JSON that is no UTF-8, an error, repair, or dropping it.
    decompressed_limit: GiB that a compressed file may unpack to.
    allow_left_out: go on also where half of the pairs are left out, as too long, or half of the lines, as empty.
    mesh: the size of each mesh axis, such as data:4,model:2; none puts all devices on data.
    best: take the best checkpoint by validation loss, not the newest.
  """
  if sum(given is not None for given in (text, file, jsonl, split, pairs)) != 1:
    raise ValueError('give one of --text, --file, --jsonl, --split and --pairs')
  corpora.check_limit(decompressed_limit)
  if allow_left_out and jsonl is None and pairs is None:
    raise ValueError('--allow_left_out is for --jsonl and --pairs, of which records may be left out')
  if model and load.is_run(model):
    workdir, model = pathlib.Path(model).expanduser(), None
  if model and split is not None:
    raise ValueError('--split is of a run; score a --text, a --file or a --jsonl under a --model')
  if source is not None and text is None and file is None or source_key and jsonl is None:
    raise ValueError('--source goes with --text or --file, --source_key with --jsonl')
  if file is not None:
    text = read(file)
  read_json = lambda pattern, key: corpora.jsonl(pattern, key, 0., encoding_errors, decompressed_limit).splits['train']
  texts, sources = [text], None if source is None else [source]
  if jsonl is not None:
    texts, sources = read_json(jsonl, key), read_json(jsonl, source_key) if source_key else None
  if text == '' and not sources:   # given a source, how an empty text ends is scored
    raise ValueError('the text is empty: there is nothing to score')
  if jsonl is not None and not sources:
    texts = without_empty(texts, key, allow_left_out)
  if model:   # before the weights, which take long
    check(pretrained.open_model(pretrained.locate(model)), sources is not None, bos)
  with jax.set_mesh(devices := sharding.make_mesh(mesh)):
    loaded = pretrained.load(model) if model else load.load(workdir, best)
    if split is None and isinstance(loaded.model, Reward):
      records = None if pairs is None else read_json(pairs, None)
      show_rewards(loaded, records, texts, sources, bos, allow_left_out)
      return
    if pairs is not None:
      raise ValueError(f'--pairs is for reward models, and {model or workdir} is none; "experiments/preference.py '
                       '--method=reward" makes one')
    if split is None:
      if not model:
        check(loaded.model, sources is not None, bos)
        if loaded.run.objective.prompt is None and loaded.model.causal:
          raise ValueError(f'the decoder in {workdir} was trained to fill in tokens that are masked, not to predict '
                           'the next one; --split gives the loss of its objective')
      if loaded.model.causal and not windows:
        check_lengths(loaded, texts)
      (show if jsonl is None else show_all)(loaded, texts, sources, begins(loaded, bos))
      return
    run, rows = loaded.run, sharding.padded_rows(loaded.run.batch)
    data = loaded.open_data()
    if split not in data.stores:
      raise ValueError(f'--split={split} is none of {", ".join(data.stores)}')
    step = validation.make_step(loaded.model.apply, run.objective, loaded.tokenizer)
    # Only documents have a context; what was stored of rows is stored of those of seed 0, as in training.
    order = {'seed': None, 'context': context} if context else {'seed': 0}
    batches = data.batches(split, run.objective, rows, repeat=False, **order)
    print(f'{split}: {validation.reading(batches)}')
    for name, value in validation.evaluate(step, loaded.params, batches, devices).items():
      print(f'{name:14} {value:.4f}')


def without_empty(texts: Documents, key: str, allow_left_out: bool) -> Sequence[str]:
  """The texts that are not empty; a line says how many are. ValueError where there is none, or as `tell_left_out`."""
  empty = [i for i, text in enumerate(texts) if not text]
  if len(empty) == len(texts):
    raise ValueError(f'none of {len(texts):,} texts has anything to score under --key={key}; give another --key')
  tell_left_out('texts', texts, empty, 'as they are empty', f'see whether --key={key} is the field with the text',
                allow_left_out)
  kept = sorted({*range(len(texts))} - {*empty})
  return Documents(lambda: kept, lambda i: texts[i], texts.place)


def tell_left_out(what: str, texts: Documents, places: Sequence[int], why: str, advice: str, allowed: bool
                  ) -> None:
  """Prints how many records are left out, and the first; ValueError from half of them on, unless that is allowed."""
  if len(places):
    line = f'{len(places):,} of {len(texts):,} {what} are left out, {why}; the first is {texts.place(places[0])}'
    print(check_left_out(line, len(places) / len(texts), advice, allowed))


def show_rewards(loaded: load.Trained, records: Documents | None, texts: Sequence[str],
                 sources: Sequence[str] | None, bos: bool | None, allow_left_out: bool) -> None:
  """Prints the reward of each text, as an answer to its source, or of both answers of each pair."""
  if bos is not None:
    raise ValueError(f'--{"" if bos else "no"}bos: how a text begins for a reward model is a part of its template; '
                     'leave it out')
  judge = rewards.Judge(loaded.model, loaded.params, loaded.tokenizer, load.chat_template(loaded.run.data))
  if records is None:
    print('  reward  text')
    for begin in range(0, len(texts), 256):
      some = slice(begin, begin + 256)
      prompts = [''] * len(texts[some]) if sources is None else sources[some]
      for text, value in zip(texts[some], judge.answers(prompts, texts[some])):
        print(f'{value:8.4f}  {text[:100]!r}')
    return
  given = judge.pairs(list(records), loaded.run.data.keys)
  reads = f'the {loaded.model.max_length:,} tokens that the model reads at once'
  advice = 'shorten their prompts or answers, or train a reward model with a longer context'
  tell_left_out('pairs', records, given.too_long, f'longer than {reads}', advice, allow_left_out)
  if not len(given.chosen):
    raise ValueError(f'none of {len(records):,} pairs fits {reads}; shorten their prompts or answers')
  print('  chosen  rejected')
  for chosen, rejected in zip(given.chosen, given.rejected):
    print(f'{chosen:8.4f}  {rejected:8.4f}{"" if chosen > rejected else "  wrong"}')
  print(f'\n{len(given.chosen):,} pairs: {given.accuracy:.1%} right, margin {given.margin:.4f}')


def read(file: pathlib.Path) -> str:
  """The text of a file as it is, line ends included; ValueError where it is no UTF-8."""
  data = file.read_bytes()
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    name = 'UTF-16' if utf16 else 'ENCODING'
    raise ValueError(f'{file} is no UTF-8 (byte {data[error.start]:#04x} at {error.start:,})'
                     f'{", but UTF-16" if utf16 else ""}: convert it with iconv -f {name} -t UTF-8') from None


def check(model: Any, has_source: bool, bos: bool | None) -> None:
  """ValueError where flags do not go with the kind of model."""
  if isinstance(model, EncoderDecoder) and not has_source:
    raise ValueError('an encoder-decoder scores a text given its source: give --source (of --jsonl, --source_key)')
  if not isinstance(model, EncoderDecoder) and has_source:
    raise ValueError('--source and --source_key are for an encoder-decoder, such as T5, which this model is not')
  if isinstance(model, EncoderDecoder | Encoder) and bos is not None:
    raise ValueError(f'--{"" if bos else "no"}bos is for decoders; this model scores the first token too')
  if isinstance(model, Encoder):
    print('pseudo-log-likelihood: each token is masked in turn and predicted from all others')


def check_lengths(loaded: load.Trained | pretrained.Pretrained, texts: Sequence[str]) -> None:
  """ValueError where a text, with bos, is longer than the model can read at once."""
  for begin in range(0, len(texts), 256):
    for i, ids in enumerate(loaded.tokenizer.encode_batch(texts[begin:begin + 256]), begin + 1):
      if len(ids) > loaded.model.max_length:
        raise ValueError(f'text {i} of {len(texts)} has {len(ids):,} tokens, and the model reads '
                         f'{loaded.model.max_length:,} at once: score a part of it, or give --windows, by which each '
                         'token is given at least half of that before it')


def begins(loaded: load.Trained | pretrained.Pretrained, bos: bool | None) -> bool:
  """Whether a text is scored after bos; of a decoder, a line tells it."""
  tokenizer = loaded.tokenizer
  if not isinstance(loaded.model, EncoderDecoder | Encoder):
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


def scored(loaded: load.Trained | pretrained.Pretrained, texts: Sequence[str], sources: Sequence[str] | None,
           bos: bool) -> list[Scored]:
  model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
  begin, end, encoded = [tokenizer.bos_id] * bos, [tokenizer.eos_id], tokenizer.encode_batch(texts)
  ids = [np.int32([*begin, *found]) for found in encoded]
  if isinstance(model, Encoder):
    ids = [np.int32([*found, *end]) for found in ids]
    scores = evaluate.pseudo_log_probabilities(model, params, ids, mask_id(tokenizer))
  elif sources is not None:
    ids = [np.int32([*found, *end]) for found in ids]
    read = [np.int32([*found, *end]) for found in tokenizer.encode_batch(sources)]
    scores = evaluate.log_probabilities(model, params, ids, sources=read)
  else:
    scores = evaluate.log_probabilities(model, params, ids)
  sizes = [int(tokenizer.sizes(text, found)[not bos:].sum()) if len(found) else 0
           for text, found in zip(texts, encoded)]
  return [Scored(found[1:1 + len(of)].tolist(), of, size) for found, of, size in zip(ids, scores, sizes)]


def show(loaded: load.Trained | pretrained.Pretrained, texts: Sequence[str], sources: Sequence[str] | None,
         bos: bool) -> None:
  """Prints a line a token, and the sums."""
  found, = scored(loaded, texts, sources, bos)
  if not found.tokens:
    raise ValueError('there is nothing to score in the text: it has one token, and no bos before it; give --bos')
  names = {loaded.tokenizer.control_id(name): name for name in loaded.tokenizer.control_names}
  print('log p     token')
  for token, value in zip(found.tokens, found.scores):
    print(f'{value:8.4f}  {names.get(token) or loaded.tokenizer.decode([token])!r}')
  print(f'\n{told([found.scores], found.size)}')


def show_all(loaded: load.Trained | pretrained.Pretrained, texts: Sequence[str], sources: Sequence[str] | None,
             bos: bool) -> None:
  """Prints a line a text, and the sums; a few hundred texts at a time."""
  everything, whole = [], 0
  print('  tokens    loss  bits a byte  text')
  for begin in range(0, len(texts), 256):
    some = slice(begin, begin + 256)
    for text, found in zip(texts[some], scored(loaded, texts[some], sources and sources[some], bos)):
      nll, count = -float(np.sum(found.scores, dtype=np.float64)), len(found.scores)
      loss = f'{nll / count:7.4f} {nll / np.log(2) / max(found.size, 1):12.4f}' if count else f'{"-":>7} {"-":>12}'
      print(f'{count:8,} {loss}  {text[:60]!r}')
      everything.append(found.scores)
      whole += found.size
  if not sum(map(len, everything)):
    raise ValueError('there is nothing to score: each text has one token, and no bos before it; give --bos')
  print(f'\n{len(texts):,} texts: {told(everything, whole)}')


def told(scores: Sequence[np.ndarray], size: int) -> str:
  count, nll = sum(map(len, scores)), -sum(float(np.sum(found, dtype=np.float64)) for found in scores)
  loss = nll / max(count, 1)
  return (f'{count:,} tokens, {size:,} bytes: loss {loss:.4f} nats a token, perplexity {np.exp(loss):.2f}, '
          f'{nll / np.log(2) / max(size, 1):.4f} bits a byte')


if __name__ == '__main__':
  launch.tool(score)
