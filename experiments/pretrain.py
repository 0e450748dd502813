"""Pretrain a decoder on any corpus. By default: Python's own library, 6 layers, 4 hours on 2 CPU cores.

  python experiments/pretrain.py --text='books/**/*.txt' --workdir=runs/books --layers=12 --width=768 --steps=20_000

Name the corpus with one or more of --text, --jsonl, --parquet and --tfds; several are mixed in equal parts, or by
--weights. One long text file is cut into documents by --separator.
"""
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lm import launch, load, lora, optim, train
from lm.data import dataset, tokenizers
from lm.data.rows import augment, stages
from lm.data.text import clean
from lm.data.text.corpus_flags import corpus
from lm.models import layers as parts
from lm.models import mup, prediction_heads
from lm.models.shape import Shape
from lm.objectives import losses, multi_token
from lm.objectives import objective as objectives
from lm.objectives.infill import NAMES, infill
from lm.objectives.masked import masked
from lm.objectives.next_token import next_token
from lm.objectives.prefix import prefix
from lm.objectives.span_corruption import DECODER, span_corruption
from lm.objectives.ul2 import MODES, ul2
from lm.optim import averaging, groups, schedules
from lm.train import guard


def check_used(flags: Mapping[str, Any], used: bool, by: str) -> None:
  """ValueError where a flag is given, not None, and has no effect; `by` are the flags that use it."""
  for name, value in flags.items():
    if value is not None and not used:
      raise ValueError(f'--{name}={value} has no effect without {by}; leave it out, or give that too')


def learned(name: str, denominator: str, label_smoothing: float, z_loss: float, length: int,
            noise: float | None, mean_span: float | None, infill_rate: float | None,
            control: tuple[str, ...]) -> objectives.Objective:
  """The objective that the flags name."""
  if control and name in ('next_token', 'prefix'):
    raise ValueError(f'--control={",".join(control)} names tokens, of which --objective={name} needs none')
  check_used({'noise': noise}, name in ('masked', 'span_corruption'), '--objective=masked or span_corruption')
  check_used({'mean_span': mean_span}, name == 'span_corruption', '--objective=span_corruption')
  check_used({'infill_rate': infill_rate}, name == 'infill', '--objective=infill')
  noise = 0.15 if noise is None else noise
  mean_span = 3. if mean_span is None else mean_span
  more = [part(value) for part, value in ((losses.smoothing, label_smoothing), (losses.z_loss, z_loss)) if value]
  how = {'denominator': getattr(objectives, denominator),
         'token_loss': losses.token_loss(losses.nll, *more) if more else objectives.cross_entropy}

  def sentinels(rate):   # of a row's positions, a span takes 1 / rate tokens and two sentinels
    return tokenizers.sentinels(max(32, math.ceil(length / (1 / rate + 2))))

  match name:
    case 'prefix':
      return prefix(**how)
    case 'masked':
      return masked(noise, *control[:1], **how)
    case 'span_corruption':
      if not mean_span >= 1:
        raise ValueError(f'--mean_span={mean_span} is not 1 token at least')
      return span_corruption(noise, mean_span, DECODER, control or sentinels(noise / mean_span), **how)
    case 'ul2':
      return ul2(sentinels=control[:-3] or sentinels(0.5 / 3), modes=control[-3:] or MODES, **how)
    case 'infill':
      return infill(0.5 if infill_rate is None else infill_rate, names=control or NAMES, **how)
  return next_token(**how)


Schedule = Literal['cosine', 'linear', 'constant', 'inverse_sqrt', 'stable_decay', 'one_cycle', 'steps']
Optimizer = Literal['adamw', 'adam', 'nadamw', 'rmsprop', 'sgd', 'adafactor', 'lion', 'adan', 'muon', 'soap', 'sophia',
                    'schedule_free']


def scheduled(name: Schedule, lr: float, steps: int, warmup: int, cooldown: int | None, milestones: tuple[int, ...],
              drop: float | None) -> schedules.Schedule:
  """The schedule that the flags name."""
  if cooldown is not None and name not in ('stable_decay', 'one_cycle'):
    raise ValueError(f'--cooldown={cooldown} is for --schedule=stable_decay and one_cycle, not for {name}')
  if bool(milestones) != (name == 'steps'):
    raise ValueError(f'--milestones={",".join(map(str, milestones))} goes with --schedule=steps, and that with them; '
                     f'the schedule is {name}')
  check_used({'drop': drop}, name == 'steps', '--schedule=steps')
  drop = 0.1 if drop is None else drop
  if not 0 < drop < 1:
    raise ValueError(f'--drop={drop} is not a share of the rate between 0 and 1, which is what is left of it')
  cooldown = steps // 5 if cooldown is None else cooldown
  match name:
    case 'stable_decay':
      return schedules.warmup_stable_decay(lr, steps, warmup, cooldown)
    case 'one_cycle':
      return schedules.one_cycle(lr, steps, cooldown)
    case 'steps':
      return schedules.warmup_piecewise(lr, steps, warmup, milestones, drop)
  return {'cosine': schedules.warmup_cosine, 'linear': schedules.warmup_linear, 'constant': schedules.warmup_constant,
          'inverse_sqrt': schedules.warmup_inverse_sqrt}[name](lr, steps, warmup)


def optimised(name: Optimizer, rate: optim.Rate, clip: float | None, weight_decay: float | None,
              decay: tuple[str, ...], l1: float, l2: float, average: float) -> optax.GradientTransformation:
  """The optimizer that the flags name."""
  how = {'clip': clip}
  if weight_decay is not None:
    how['weight_decay'] = weight_decay
  if decay:
    how['decays'] = groups.matching(*decay)
  if name == 'adam' and len(how) > 1:
    raise ValueError('--optimizer=adam has no weight decay; leave out --weight_decay and --decay, or take adamw')
  make = {'adamw': optim.adamw, 'adam': optim.adam, 'nadamw': optim.nadamw, 'rmsprop': optim.rmsprop, 'sgd': optim.sgd,
          'adafactor': optim.adafactor, 'lion': optim.lion, 'adan': optim.adan, 'muon': optim.muon, 'soap': optim.soap,
          'sophia': optim.sophia, 'schedule_free': optim.schedule_free}[name]
  optimizer = make(rate, **how)
  if l1 or l2:
    optimizer = optim.penalised(optimizer, l1, l2, how.get('decays', groups.decayed))
  return averaging.averaged(optimizer, average) if average else optimizer


def warmup_of(name: str, parts: tuple[str, ...]) -> list[tuple[int, int]]:
  """(until, value) of 'until:value'."""
  try:
    return [(int(until), int(value)) for until, value in (part.split(':') for part in parts)]
  except ValueError:
    raise ValueError(f'--{name}_warmup={",".join(parts)} is not of the kind 200:4,500:8, step:value') from None


def augmentations(token_dropout: float, span_deletion: float, shuffle: float, subword_sampling: float
                  ) -> tuple[augment.Augmentation, ...]:
  """Of text: lines change places before what is inside of them changes."""
  made = ((augment.Shuffle, shuffle), (augment.SpanDeletion, span_deletion),
          (augment.SubwordSampling, subword_sampling), (augment.TokenDropout, token_dropout))
  return tuple(make(value) for make, value in made if value)


def experiment(*, text: str | None = None, separator: str | None = None,
               encoding_errors: Literal['strict', 'replace', 'drop'] = 'strict',
               jsonl: str | None = None, parquet: str | None = None, tfds: str | None = None, key: str = 'text',
               weights: tuple[float, ...] = (), repeat: bool = True, validation: float = 0.05,
               decompressed_limit: float = 64., stop_words: str | None = None,
               init: pathlib.Path | None = None, model: str | None = None,
               tokenizer_kind: Literal['bpe', 'unigram', 'bytes'] | None = None,
               tokenizer_file: str | None = None, vocab: int | None = None, character_coverage: float | None = None,
               length: int | None = None,
               architecture: Literal['llama', 'gpt2'] | None = None, layers: int | None = None,
               width: int | None = None, heads: int | None = None, kv_heads: int | None = None,
               dropout: float | None = None, embedding_dropout: float | None = None,
               attention_dropout: float | None = None, layer_dropout: float | None = None,
               stochastic_depth: float | None = None, precision: Literal['float32', 'bfloat16'] = 'float32',
               remat: Literal['products', 'none', 'full'] = 'products',
               objective: Literal['next_token', 'prefix', 'masked', 'span_corruption', 'ul2', 'infill'] = 'next_token',
               denominator: Literal['token_mean', 'sequence_mean'] = 'token_mean', label_smoothing: float = 0.,
               z_loss: float = 0., noise: float | None = None, mean_span: float | None = None,
               infill_rate: float | None = None,
               control: tuple[str, ...] = (), token_dropout: float = 0., span_deletion: float = 0., shuffle: float = 0.,
               subword_sampling: float = 0., predict_ahead: int = 0,
               ahead_modules: Literal['sequential', 'parallel'] | None = None, ahead_weight: float | None = None,
               optimizer: Optimizer = 'adamw', lr: float = 1e-3, schedule: Schedule = 'cosine',
               warmup: int | None = None, cooldown: int | None = None, milestones: tuple[int, ...] = (),
               drop: float | None = None, weight_decay: float | None = None, decay: tuple[str, ...] = (),
               rates: tuple[str, ...] = (), l1: float = 0., l2: float = 0., average: float = 0., mup_width: int = 0,
               mup_layers: int = 0, clip: float | None = 1., spike_guard: float | None = None, steps: int = 2000,
               batch: int = 16, batch_warmup: tuple[str, ...] = (), length_warmup: tuple[str, ...] = (),
               accumulate: int = 1, evaluate_every: int = 250, evaluate_batches: int | None = 20,
               patience: int | None = None, save_every: int = 500, keep: int = 2, lora_rank: int = 0,
               lora_alpha: float | None = None) -> train.Run:
  r"""Pretrains a decoder.

  Args:
    text: files of text, a glob pattern (** for folders below).
    separator: what separates documents within a text file, such as \n\n (two newlines; \t is a tab).
    encoding_errors: what happens to text of any corpus that is no UTF-8, an error, repair, or dropping the document.
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern.
    parquet: Parquet files, a glob pattern.
    tfds: a TensorFlow data set, the folder of a prepared one or a TFDS name.
    key: the field that holds the text, in all but plain text.
    weights: share of each corpus in the tokens of training, in the order text, jsonl, parquet, tfds; 0 leaves it out.
    repeat: of a mixture, a corpus that ends begins anew; otherwise training stops where the first one ends.
    validation: share of the documents that is held out; a TFDS set with a split for it keeps its own.
    decompressed_limit: GiB that a compressed file may unpack to.
    stop_words: drop the stop words of this language, such as en or zh; hurts a language model, for comparison only.
    init: start from the result of another run's workdir, from a Hugging Face folder, an imported one or an id on the
      hub; adapters lie on it. It gives the tokenizer, but where a flag of one is given, and the shape, but where a flag
      of shape is given.
    model: take architecture and tokenizer from a run's workdir, a Hugging Face or imported folder or an id on the hub,
      and not the parameters, which --init gives. Goes with no flag of shape or of a tokenizer.
    tokenizer_kind: of the tokenizer that is trained; by default bpe. Bytes are not trained.
    tokenizer_file: use this .model or tokenizer.json rather than training a tokenizer.
    vocab: tokens of the tokenizer that is trained, and of the model; by default 8192.
    character_coverage: share of the text whose characters have a token each, from 0.98 to 1, by default 0.9995; rarer
      ones are spelled in bytes. Lower it for Chinese text and a small vocabulary.
    length: positions a row; by default 512, or what the model reads at once, if that is less.
    architecture: the first flag of shape; by default llama.
    layers: by default 6.
    width: by default 384.
    heads: by default 6.
    dropout: share of what each branch of a layer adds that is zeroed, and of the embedding.
    embedding_dropout: of the embedding; none for that of dropout.
    attention_dropout: of the probabilities of attention.
    layer_dropout: chance of each layer to be left out of a step.
    stochastic_depth: chance of the last layer to be left out of a row; that of others rises to it layer by layer.
    objective: what is learned; see lm/objectives.
    denominator: what a loss is divided by, targets or sequences.
    label_smoothing: share of a target's probability that is spread over the vocabulary.
    z_loss: coefficient of the squared log of the softmax's denominator, such as 1e-4.
    noise: share of the tokens that masked and span_corruption hide, by default 0.15.
    mean_span: tokens of a hidden span of span_corruption, on average, by default 3.
    infill_rate: share of the pieces whose middle comes last, of infill, by default 0.5.
    control: names of the control tokens of the objective, where the tokenizer has others than ours, the mask; the
      sentinels (of ul2, then its three modes); or those before prefix, suffix and middle.
    token_dropout: share of the tokens that are read of which <|mask|> takes the place, while targets stay.
    span_deletion: share of the text of a row that is cut out, in short spans.
    shuffle: share of the rows' texts whose lines change places.
    subword_sampling: share of the merges that bpe leaves out, or the exponent of a unigram tokenizer's probabilities;
      it, and the three above, are of training alone.
    predict_ahead: so many tokens further than the next are predicted too, by a module each, which can then draft text.
    ahead_modules: whether these are a chain that reads the tokens between, as in DeepSeek-V3 (the default), or stand
      side by side.
    ahead_weight: of the mean of their losses, by default 0.3.
    remat: what the backward pass computes again rather than keeps, all but matrix products, nothing, or all.
    warmup: steps of linear warm-up, none for 100, or a tenth of the steps where that is less; one_cycle has none.
    cooldown: last steps of stable_decay and one_cycle, in which the rate falls; none for a fifth.
    milestones: steps at which the schedule called steps falls.
    drop: the share of its rate that is then left, by default 0.1.
    weight_decay: decoupled; none for what the optimizer has by itself, mostly 0.1.
    decay: patterns of parameters that decay, such as blocks/*; by default matrices (with muon those in blocks).
    rates: pattern=factor, such as embedding=4,*norm/*=0.5; the rate of such parameters is multiplied.
    l1: coefficient of the sum of the absolute values of what decays, a part of the gradient.
    l2: coefficient of half the sum of their squares, a part of the gradient too.
    average: decay of an exponential moving average of the parameters, which is then what is evaluated; 0 for none.
    mup_width: width of the model that --lr was found with, of which this is a larger or smaller one, as in
      lm/models/mup.py; 0 for a model on its own.
    mup_layers: its number of layers; 0 for as many as here.
    clip: bound on the global norm of the gradient.
    spike_guard: skip a step whose loss or gradient norm is so many standard deviations above the last 128, such as 6.
    batch_warmup: rows of the first steps, as UNTIL:ROWS, such as 200:4,500:8 for 4 up to step 200, then 8 up to 500.
    length_warmup: of these steps, the length that rows are cut into, as UNTIL:LENGTH, such as 300:64,600:128.
    evaluate_batches: batches of the validation split in an evaluation; none for all.
    patience: evaluations in a row that are no better than the best, after which training stops there.
    keep: how many of the last checkpoints to keep, beside the best.
    lora_rank: of adapters that are trained in place of all parameters, on those of --init; 0 for none.
    lora_alpha: adapters are scaled by it over the rank; none for twice the rank.
  """
  rules = clean.DEFAULT + ((clean.StopWords(stop_words),) if stop_words else ())
  given = lambda **flags: {name: value for name, value in flags.items() if value is not None}
  shape = given(architecture=architecture, layers=layers, width=width, heads=heads, kv_heads=kv_heads, dropout=dropout,
                embedding_dropout=embedding_dropout, attention_dropout=attention_dropout, layer_dropout=layer_dropout,
                stochastic_depth=stochastic_depth)
  of_tokens = given(tokenizer_kind=tokenizer_kind, tokenizer_file=tokenizer_file, vocab=vocab,
                    character_coverage=character_coverage)
  decoder, tokens, size = load.decoder_and_tokenizer(model, init, shape, of_tokens, jnp.dtype(precision))
  for name, value in given(vocab=vocab, length=length).items():
    if value < 1:
      raise ValueError(f'--{name}={value} is not positive; leave it out, or give it 1 at least')
  vocab, shape = vocab or size or 8192, Shape(**shape)
  length = length or min(512, decoder.max_length if decoder else 512)
  goal = learned(objective, denominator, label_smoothing, z_loss, length, noise, mean_span, infill_rate, control)
  more = [name for name in goal.control if name not in tokenizers.CONTROL]   # the tokenizer is made with these
  names = {'control': (*tokenizers.CONTROL, *more)} if more else {}
  if character_coverage is not None and (tokenizer_file or tokenizer_kind == 'bytes'):
    raise ValueError(f'--character_coverage={character_coverage} is for a tokenizer that is trained; leave it out')
  if tokenizer_file:
    tokens = tokenizers.load(tokenizer_file)
  elif tokens is None and tokenizer_kind == 'bytes':
    tokens = tokenizers.Bytes(**names)
  elif tokens is None:
    tokens = functools.partial(tokenizers.train_sentencepiece, vocab=vocab, kind=tokenizer_kind or 'bpe',
                               **names, **given(character_coverage=character_coverage))
  policy = {'products': parts.keep_products, 'none': None, 'full': jax.checkpoint_policies.nothing_saveable}[remat]
  base = {'base_width': mup_width or shape.width,
          'base_layers': mup_layers or shape.layers} if mup_width or mup_layers else {}
  if base and (decoder or shape.architecture != 'llama' or optimizer in ('sgd', 'muon', 'adafactor')):
    raise ValueError(f'--mup_width={mup_width} and --mup_layers={mup_layers} are for the architecture llama, its shape '
                     'given by flags, not by --model or --init, and an optimizer that steps as adamw does; not for '
                     f'{shape.architecture} with {optimizer}')
  if decoder:
    decoder = decoder.clone(dtype=jnp.dtype(precision), remat=policy)
  else:
    decoder = shape.decoder(vocab, length, jnp.dtype(precision), policy)
    decoder = mup.parametrised(decoder, **base) if base else decoder
  check_used({'ahead_modules': ahead_modules, 'ahead_weight': ahead_weight}, predict_ahead > 0, '--predict_ahead')
  check_used({'lora_alpha': lora_alpha}, lora_rank > 0, '--lora_rank')
  if predict_ahead:
    if objective != 'next_token':
      raise ValueError(f'--predict_ahead={predict_ahead} goes with --objective=next_token, not with {objective}')
    decoder = {'sequential': prediction_heads.sequential, 'parallel': prediction_heads.parallel}[
        ahead_modules or 'sequential'](decoder, predict_ahead)
    goal = multi_token.multi_token(goal, 0.3 if ahead_weight is None else ahead_weight)
  warmup = min(100, steps // 10) if warmup is None else warmup
  rate = scheduled(schedule, lr, steps, warmup, cooldown, milestones, drop)
  if rates or base:
    rate = groups.Rates(rate, groups.parsed(rates), mup.rates(shape.width, shape.layers, **base) if base else ())
  run = train.Run(
      model=decoder, objective=goal,
      data=dataset.Text(corpus(text, separator, encoding_errors, jsonl, parquet, tfds, key, weights, repeat,
                               validation, decompressed_limit),
                        tokens, length, rules),
      optimizer=optimised(optimizer, rate, clip, weight_decay, decay, l1, l2, average),
      augment=augmentations(token_dropout, span_deletion, shuffle, subword_sampling),
      stages=stages.stages(warmup_of('batch', batch_warmup), warmup_of('length', length_warmup), batch, length),
      guard=None if spike_guard is None else guard.Guard(sigma=spike_guard), patience=patience,
      steps=steps, batch=batch, accumulate=accumulate, evaluate_every=evaluate_every,
      evaluate_batches=evaluate_batches, save_every=save_every, keep=keep)
  return lora.adapt(run, lora_rank, lora_alpha)


if __name__ == '__main__':
  launch.run(experiment)
