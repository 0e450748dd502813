"""Pretrain a decoder on any corpus. By default: Python's own library, 6 layers, 30 minutes on 2 CPU cores.

  python experiments/pretrain.py --text='books/**/*.txt' --workdir=runs/books --layers=12 --width=768 --steps=20_000

Name the corpus with one or more of --text, --jsonl, --parquet and --tfds; several are mixed in equal parts, or by
--weights. One long text file is cut into documents by --separator.
"""
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lm import launch, optim, pretrained, train
from lm.data import clean, corpora, dataset, source, tokenizer
from lm.data.mixture import mixture
from lm.models import layers as parts
from lm.models import multi_token, transformer
from lm.objectives import multi_token as multi_token_objective
from lm.objectives import objective
from lm.objectives.next_token import next_token


def corpus(text: str | None, separator: str | None, encoding_errors: str, jsonl: str | None, parquet: str | None,
           tfds: str | None, key: str, weights: tuple[float, ...], validation: float) -> source.Source:
  """The source, or mixture of sources, that the flags name."""
  flags = {'text': text, 'jsonl': jsonl, 'parquet': parquet, 'tfds': tfds}
  for name, given in {**flags, 'separator': separator}.items():
    if given == '' or given and name != 'separator' and not given.strip():
      raise ValueError(f'--{name}={given} is empty, perhaps an unset shell variable; leave it out or give it a value')
  if separator and not text:
    raise ValueError(f'--separator={separator} cuts the files of --text, which is not given')
  if not 0 < validation < 1:
    raise ValueError(f'--validation={validation} is not a share between 0 and 1')
  make = {'text': lambda: corpora.text(text, validation, separator and source.unescaped(separator), encoding_errors),
          'jsonl': lambda: corpora.jsonl(jsonl, key, validation),
          'parquet': lambda: corpora.parquet(parquet, key, validation),
          'tfds': lambda: corpora.tfds(tfds, key, validation)}
  sources = [make[name]() for name, given in flags.items() if given]
  written = f'--weights={",".join(map(str, weights))}'
  if weights and len(sources) < 2:
    raise ValueError(f'{written} is for a mixture of several corpora; leave it out')
  if weights and len(weights) != len(sources):
    raise ValueError(f'{written} has {len(weights)} numbers for {len(sources)} corpora')
  if not all(0 < weight < float('inf') for weight in weights):
    raise ValueError(f'{written}: each must be above 0; leave out the flag of a corpus that is not wanted')
  if len(sources) > 1:
    return mixture(list(zip(sources, weights or (1.,) * len(sources))))
  return sources[0] if sources else corpora.python_library(validation)


def experiment(*, text: str | None = None, separator: str | None = None,
               encoding_errors: Literal['strict', 'replace', 'drop'] = 'strict',
               jsonl: str | None = None, parquet: str | None = None, tfds: str | None = None, key: str = 'text',
               weights: tuple[float, ...] = (), validation: float = 0.05, stop_words: str | None = None,
               model: str | None = None, tokenizer_kind: Literal['bpe', 'unigram', 'bytes'] = 'bpe',
               tokenizer_file: str | None = None, vocab: int = 8192, length: int = 512,
               architecture: Literal['llama', 'gpt2'] = 'llama',
               layers: int = 6, width: int = 384, heads: int = 6, kv_heads: int | None = None, dropout: float = 0.,
               precision: Literal['float32', 'bfloat16'] = 'float32',
               remat: Literal['products', 'none', 'full'] = 'products',
               denominator: Literal['token_mean', 'sequence_mean'] = 'token_mean', predict_ahead: int = 0,
               ahead_modules: Literal['sequential', 'parallel'] = 'sequential', ahead_weight: float = 0.3,
               optimizer: Literal['adamw', 'adam', 'rmsprop', 'sgd', 'muon'] = 'adamw', lr: float = 1e-3,
               schedule: Literal['cosine', 'linear', 'constant', 'inverse_sqrt'] = 'cosine', warmup: int = 100,
               weight_decay: float = 0.1, clip: float | None = 1., steps: int = 2000, batch: int = 16,
               accumulate: int = 1, evaluate_every: int = 250, evaluate_batches: int | None = 20,
               save_every: int = 500, keep: int = 2) -> train.Run:
  r"""Pretrains a decoder.

  Args:
    text: files of text, a glob pattern (** for folders below).
    separator: what separates documents within a text file, such as \n\n (two newlines; \t is a tab).
    encoding_errors: what happens to text that is no UTF-8, an error, repair, or dropping the document.
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern.
    parquet: Parquet files, a glob pattern.
    tfds: a TensorFlow data set, the folder of a prepared one or a TFDS name.
    key: the field that holds the text, in all but plain text.
    weights: share of each corpus in a mixture, in the order text, jsonl, parquet, tfds.
    validation: share of the documents that is held out; a TFDS set with a split for it keeps its own.
    stop_words: drop the stop words of this language, such as en or zh; hurts a language model, for comparison only.
    model: take architecture and tokenizer from this Hugging Face or imported folder, in place of the flags of shape
      from vocab to dropout; for the parameters see --init.
    tokenizer_file: use this .model or tokenizer.json rather than training a tokenizer.
    vocab: tokens of the tokenizer that is trained, and of the model.
    length: positions a row.
    denominator: what a loss is divided by, targets or sequences.
    predict_ahead: so many tokens further than the next are predicted too, by a module each, which can then draft text.
    ahead_modules: whether these are a chain that reads the tokens between, as in DeepSeek-V3, or stand side by side.
    ahead_weight: of the mean of their losses.
    remat: what the backward pass computes again rather than keeps, all but matrix products, nothing, or all.
    clip: bound on the global norm of the gradient.
    warmup: steps of linear warm-up.
    evaluate_batches: batches of the validation split in an evaluation; none for all.
    keep: how many of the last checkpoints to keep, beside the best.
  """
  rules = clean.DEFAULT + ((clean.StopWords(stop_words),) if stop_words else ())
  folder = pretrained.locate(model) if model else None
  decoder = pretrained.open_model(folder, jnp.dtype(precision)) if folder else None
  if folder and not isinstance(decoder, transformer.Transformer):
    raise ValueError(f'--model={model} is no decoder, and next tokens are what is learned here; take one such as GPT-2 '
                     'or Llama')
  if tokenizer_file or folder:
    tokens = tokenizer.load(tokenizer_file or folder)
  elif tokenizer_kind == 'bytes':
    tokens = tokenizer.Bytes()
  else:
    tokens = functools.partial(tokenizer.train_sentencepiece, vocab=vocab, kind=tokenizer_kind)
  shape = {'vocab': vocab, 'width': width, 'layers': layers, 'heads': heads, 'max_length': length, 'dropout': dropout,
           'dtype': jnp.dtype(precision), 'remat': {
               'products': parts.keep_products, 'none': None,
               'full': jax.checkpoint_policies.nothing_saveable}[remat]}
  if folder:
    decoder = decoder.clone(remat=shape['remat'])
  else:
    decoder = transformer.gpt2(**shape) if architecture == 'gpt2' else transformer.llama(**shape, kv_heads=kv_heads)
  learned = next_token(denominator=getattr(objective, denominator))
  if predict_ahead:
    decoder = {'sequential': multi_token.sequential, 'parallel': multi_token.parallel}[ahead_modules](
        decoder, predict_ahead)
    learned = multi_token_objective.multi_token(learned, ahead_weight)
  rate = {'cosine': optim.warmup_cosine, 'linear': optim.warmup_linear, 'constant': optim.warmup_constant,
          'inverse_sqrt': optim.warmup_inverse_sqrt}[schedule](lr, steps, warmup)
  update = {'adamw': functools.partial(optim.adamw, weight_decay=weight_decay), 'adam': optim.adam,
            'rmsprop': optim.rmsprop, 'sgd': optim.sgd,
            'muon': functools.partial(optim.muon, weight_decay=weight_decay)}[optimizer]
  return train.Run(
      model=decoder, objective=learned,
      data=dataset.Text(corpus(text, separator, encoding_errors, jsonl, parquet, tfds, key, weights, validation),
                        tokens, length, rules),
      optimizer=update(rate, clip=clip), steps=steps, batch=batch, accumulate=accumulate,
      evaluate_every=evaluate_every, evaluate_batches=evaluate_batches, save_every=save_every, keep=keep)


if __name__ == '__main__':
  launch.run(experiment)
