"""Teach a small decoder what a larger one makes of the text, beside the same decoder that learns from the text alone.

  python experiments/quickstart.py && python experiments/distill.py
  python experiments/distill.py --teacher=models/smol --kind=reverse --temperature=2 --hard=0.1
  python experiments/distill.py --stored_top_k=32 --hard=0.5

Bits per byte of held-out text after 500 steps of 2,048 positions, one seed, 2 cores of a busy AMD EPYC; the teacher is
the quickstart's (0.69 M weights, 1.748), the student has 0.18 M:

  from the text alone                  1.857      --kind=forward (the default)         1.823
  --kind=reverse                       1.883      --stored_top_k=32                    1.912
                                                  --stored_top_k=32 --hard=0.5         1.818

A step with this teacher takes 1.9 times as long as one without (0.32 s, 0.17 s). In the same time the text alone gives
930 steps, and 1.752: at this size, where text is not short and the teacher hardly better, distillation pays by step and
not by hour. Of the tokens outside of what is stored nothing is learned but their sum: take --hard with it. Storing is
one pass of the teacher over all of the data, some 5 minutes here.
"""
import dataclasses
import pathlib
from typing import Any, Literal

import jax

from lm import launch, load, optim, train
from lm.data import dataset
from lm.data.text.corpus_flags import corpus
from lm.evaluate import annotate
from lm.models import transformer
from lm.objectives import distillation
from lm.objectives.next_token import next_token
from lm.optim import schedules
from lm.train import validation

QUICKSTART = 'runs/quickstart'


def open_teacher(name: str) -> load.BaseModel:
  """The decoder of a run's workdir, of a Hugging Face folder or of an imported one."""
  if name == QUICKSTART and not pathlib.Path(name).exists():
    raise FileNotFoundError(f'there is no teacher in {name}; train one (python experiments/quickstart.py, 4 minutes), '
                            'or name another by --teacher')
  found = load.base(name)
  if not isinstance(found.model, transformer.Transformer):
    raise ValueError(f'--teacher={name} is no decoder; take one such as GPT-2 or Llama')
  return found


def experiment(*, teacher: str = QUICKSTART, student: str | None = None,
               kind: Literal['forward', 'reverse', 'js'] = 'forward', beta: float = 0.5, temperature: float = 1.,
               hard: float = 0., stored_top_k: int = 0, text: str | None = None, separator: str | None = None,
               encoding_errors: Literal['strict', 'replace', 'drop'] = 'strict', jsonl: str | None = None,
               parquet: str | None = None, tfds: str | None = None, key: str = 'text',
               weights: tuple[float, ...] = (), repeat: bool = True, validation: float = 0.05,
               decompressed_limit: float = 64., length: int = 256,
               layers: int = 1, width: int = 64, heads: int = 2, batch: int = 8, steps: int = 500, lr: float = 0.015,
               embedding_rate: float = 4., evaluate_every: int | None = None, save_every: int | None = None
               ) -> train.Run:
  r"""Distils a decoder into a smaller one, which reads the text with the teacher's tokenizer.

  Args:
    teacher: a run's workdir, a Hugging Face folder or an imported one.
    student: take the architecture from this run's workdir, Hugging Face folder or imported one, in place of the flags
      of shape; for the parameters see --init.
    kind: of divergence, KL(teacher || student), KL(student || teacher), or Jensen-Shannon.
    beta: share of the teacher in the middle of Jensen-Shannon.
    temperature: divides the logits of both.
    hard: weight of the text's own next tokens in the loss.
    stored_top_k: ask the teacher once, and store so many of its likeliest tokens; 0 asks at each step.
    text: files of text, a glob pattern (** for folders below); without any corpus, Python's own library.
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
    length: positions a row.
    lr: of the matrices, which Muon trains.
    embedding_rate: how much faster the embedding learns.
    evaluate_every: steps between evaluations; none for a quarter of the steps.
    save_every: steps between checkpoints; none for a quarter of the steps.
  """
  source = corpus(text, separator, encoding_errors, jsonl, parquet, tfds, key, weights, repeat, validation,
                  decompressed_limit)
  base = open_teacher(teacher)
  constants, tokens = train.Constants('teacher', base.model, base.start), base.tokenizer
  divergence = {'forward': distillation.forward_kl, 'reverse': distillation.reverse_kl,
                'js': distillation.JensenShannon(beta)}[kind]
  if student:
    like = load.base(student)
    model = like.model
    distillation.check_tokenizers(tokens, like.tokenizer)
  else:
    model = transformer.llama(constants.model.vocab, width, layers, heads, max_length=length)
  data = dataset.Text(source, tokens, length)
  if stored_top_k:
    stored = distillation.TopK(stored_top_k, constants.model.vocab, temperature)
    objective = distillation.distil_stored(next_token(), stored, divergence, hard)
    data, taught = annotate.Annotated(data, constants, stored.columns, stored), ()
  else:
    objective = distillation.distil(next_token(), constants.model.apply, divergence, temperature, hard)
    taught = constants,
  schedule = schedules.warmup_linear(lr, steps, warmup=steps // 30)
  quarter = max(steps // 4, 1)
  return train.Run(model=model, objective=objective, data=data, optimizer=optim.muon(schedule, rest=embedding_rate),
                   steps=steps, batch=batch, evaluate_every=quarter if evaluate_every is None else evaluate_every,
                   evaluate_batches=4, save_every=quarter if save_every is None else save_every, constants=taught)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Trains the same student on the text alone, for as many steps; prints what all of them reach on held-out text."""
  teacher = run.constants[0] if run.constants else run.data.model
  text = run.data if run.constants else run.data.data
  print('\nthe same student, from the text alone')
  alone = train.train(dataclasses.replace(run, objective=next_token(), constants=(),
                                          data=dataclasses.replace(text, folder=workdir / 'data')),
                      workdir / 'text_alone', result.mesh)
  alone.raise_if_stopped()
  arms = {'teacher': (teacher.model, result.params.get('teacher') or teacher.load(teacher.model)),
          'student, distilled': (run.model, result.params), 'student, from the text': (run.model, alone.params)}
  batches = alone.data.batches('validation', next_token(), run.batch, seed=None, repeat=False,
                               context=run.data.length // 2)
  print('\nheld-out text         bits/byte  perplexity  weights    s/step')
  seconds = {name: phases.phases.get('train', 0) / max(phases.step - phases.start - 1, 1)
             for name, phases in zip(list(arms)[1:], (result, alone))}
  for name, (model, params) in arms.items():
    step = validation.make_step(model.apply, next_token(), alone.data.tokenizer)
    metrics = validation.evaluate(step, params, batches, result.mesh)
    bits = metrics.get('bits_per_byte', float('nan'))   # data of before bytes were stored does not say it
    print(f'  {name:22}{bits:7.3f}{metrics["perplexity"]:12.2f}{model_size(model):9,}'
          f'{seconds.get(name, float("nan")):10.3f}'.replace('nan', '  -'))


def model_size(model: Any) -> int:
  """How many parameters it has."""
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


if __name__ == '__main__':
  launch.run(experiment, report)
