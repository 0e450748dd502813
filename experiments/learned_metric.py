"""Trains a metric of texts from ratings, as BLEURT was trained, and compares it with people.

  python experiments/learned_metric.py
  python experiments/learned_metric.py --ratings=ratings.jsonl --init=google-bert/bert-base-uncased --lr=1e-5

Without --ratings, the pairs are lines of Python's own library and copies with errors, rated by the share of words that
are right. A line of --ratings has candidate, rating, reference or references, and optionally system and item.
BLEU, chrF and ROUGE, with which it is compared, need `pip install -e '.[eval]'`.
"""
import functools
import pathlib
from typing import Any

from lm import launch, load, named, options, statistics, train
from lm.data import rated_pairs, tokenizers
from lm.data.text import rating_records
from lm.evaluate import texts
from lm.evaluate.learned import bleurt
from lm.models import encoder
from lm.objectives.rating import rating

OTHERS = texts.Bleu(effective_order=True), texts.Chrf(), texts.Rouge()   # the metrics beside it
MEASURES = 'bleu', 'chrf', 'rouge1', 'rouge2', 'rougeL'   # of these metrics, in the table


def experiment(*, ratings: str | None = None, init: str | None = None, validation: float = 0.1,
               held_out_systems: tuple[str, ...] = (), vocab: int | None = None, layers: int | None = None,
               width: int | None = None, heads: int | None = None, length: int = 128,
               optimizer: options.Optimizer = options.Optimizer(lr=1e-3, schedule='linear'), steps: int = 1000,
               batch: int = 16, computation: options.Computation = options.Computation(),
               cadence: options.Cadence = options.Cadence(patience=2)) -> train.Run | train.Pending:
  """Trains a scorer of pairs.

  Most runs set: ratings, init, held_out_systems, lr, steps, batch, length, workdir.

  Args:
    ratings: files of JSON lines, a glob pattern; none makes pairs from Python's library.
    init: encoder to start from, as a folder or an id on the hub of BERT or of BLEURT, or a run; none for a new one.
    validation: share of the items that is held out for --patience, and of those that are held out for the table.
    held_out_systems: systems whose candidates are not trained on; none for a quarter of four or more systems.
    vocab: number of tokens of a new encoder; none for 2048.
    layers: number of layers of a new encoder; none for 2.
    width: size of the hidden states of a new encoder; none for 128.
    heads: number of heads of a new encoder; none for 4.
    length: positions of a row, which holds several pairs.
    steps: number of training steps.
    batch: rows in a batch.
  """
  if ratings is None and held_out_systems:
    raise ValueError(f'--held_out_systems={",".join(held_out_systems)} is for --ratings; leave it out')
  records = (rating_records.rated(ratings, validation, held_out_systems) if ratings else
             rating_records.synthetic(validation=validation))
  shape = {'vocab': vocab, 'layers': layers, 'width': width, 'heads': heads}
  explicit = {name: value for name, value in shape.items() if value is not None}
  if init and explicit:
    name, value = next(iter(explicit.items()))
    raise ValueError(f'--{name}={value} is for a new encoder, and --init={init} gives one; leave one of them out')
  update = optimizer.make(steps, warmup=min(100, steps // 10))

  def build(model: Any, tokenizer: Any, start: Any) -> train.Run:
    data = rated_pairs.RatedPairs(records, tokenizer, length)
    run = train.Run(computation.apply(model), rating(), data, update, steps, batch, start=start)
    return cadence.apply(computation.apply_to_steps(run))

  if init is None:
    shape = {'vocab': 2048, 'width': 128, 'layers': 2, 'heads': 4} | explicit
    model = encoder.scorer(encoder.bert(**shape, max_length=length))
    return build(model, functools.partial(tokenizers.train_sentencepiece, vocab=shape['vocab']), None)

  def build_from(base: load.BaseModel) -> train.Run:
    return build(encoder.scorer(base.model), base.tokenizer, lambda model: model.start(base.start, base.model))
  return train.after_opening(build_from, base=named.Named(
      '--init', init, lambda model: isinstance(model, encoder.Bidirectional), 'an encoder, such as BERT'))


def check() -> None:
  """Raises ImportError, which says what to install, where a package of the other metrics is missing."""
  for metric in OTHERS:
    metric.check()


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints the correlation of the metric, and of others, with the ratings that were held out."""
  for split, title in (('validation-items', 'held-out items'), ('validation-systems', 'held-out systems')):
    rated = [rating_records.read(record) for record in run.data.source.splits.get(split, ())]
    if len(rated) < 3:
      continue
    candidates, references = [record.candidate for record in rated], [record.references for record in rated]
    metric = bleurt.Bleurt(run.model, result.params, result.data.tokenizer, workdir.name)
    measures = metric(candidates, references)
    for other in OTHERS:
      measures += [measure for measure in other(candidates, references) if measure.name in MEASURES]
    if note := metric.note(candidates, references):
      print(note)
    print(f'\n{title}: {len(rated):,} ratings, correlation with 95 % intervals over items')
    for measure in measures:
      values = statistics.correlations(measure.scores(), [record.rating for record in rated],
                                       [record.item for record in rated])
      name = 'this metric' if measure is measures[0] else measure.name
      print(f'  {name:12}' + '  '.join(f'{kind} {value}' for kind, value in values.items()))


if __name__ == '__main__':
  launch.run(experiment, report, check)
