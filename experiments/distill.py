"""Distils a decoder into a smaller one, and compares it with the same small decoder trained on the text alone.

  python experiments/quickstart.py && python experiments/distill.py
  python experiments/distill.py --teacher=models/smol --kind=reverse --temperature=2 --hard=0.1
  python experiments/distill.py --stored_top_k=32 --hard=0.5

Bits per byte of held-out text after 500 steps of 2,048 positions, one seed, 2 cores of a busy AMD EPYC. The teacher is
the model of the quickstart (0.69 M weights, 1.748 bits per byte), the student has 0.18 M weights:

  from the text alone                  1.857      --kind=forward (the default)         1.823
  --kind=reverse                       1.883      --stored_top_k=32                    1.912
                                                  --stored_top_k=32 --hard=0.5         1.818

A step with this teacher takes 1.9 times as long as a step without it (0.32 s, 0.17 s). In the same time, training on
the text alone makes 930 steps and reaches 1.752: with plenty of text and a teacher that is hardly better, distillation
gains per step but not per hour. With --stored_top_k, the student learns only the total probability of all other
tokens, so use --hard with it. Storing takes one pass of the teacher over all data, about 5 minutes here.
"""
import dataclasses
import pathlib
from typing import Any, Literal

import jax

from lm import launch, load, named, options, train
from lm.data import dataset
from lm.evaluate import annotate
from lm.objectives import distillation
from lm.objectives.next_token import next_token
from lm.train import validation

DEFAULT = options.Size('llama', layers=1, width=64, heads=2)


def experiment(*, teacher: str = 'runs/quickstart', student: str | None = None,
               kind: Literal['forward', 'reverse', 'js'] = 'forward', beta: float = 0.5, temperature: float = 1.,
               hard: float = 0., stored_top_k: int = 0, corpus: options.Corpus = options.Corpus(), length: int = 256,
               shape: options.Shape = options.Shape(),
               regularisation: options.Regularisation = options.Regularisation(),
               optimizer: options.Optimizer = options.MUON, steps: int = 500, batch: int = 8,
               computation: options.Computation = options.Computation(),
               cadence: options.Cadence = options.Cadence(evaluate_batches=4)) -> train.Run | train.Pending:
  """Distils a decoder into a smaller one, which reads the text with the teacher's tokenizer.

  Most runs set: teacher, student, kind, hard, text, workdir, length, layers, width, heads, lr, steps, batch.

  Args:
    teacher: the teacher, as a run's workdir, a Hugging Face folder or an imported model.
    student: use the architecture of this run's workdir, Hugging Face folder or imported model, in place of the flags of
      shape. The parameters are new, unless --init is given too.
    kind: divergence. forward is KL(teacher || student), reverse is KL(student || teacher), js is Jensen-Shannon.
    beta: share of the teacher in the mixture of the Jensen-Shannon divergence.
    temperature: divisor of the logits of teacher and student.
    hard: weight of the cross-entropy of the text's own next tokens in the loss; the divergence has the other share.
    stored_top_k: run the teacher once and store this many of its most probable tokens; 0 runs the teacher at each step.
    length: positions in a row.
    layers: number of layers; none for 1.
    width: size of the residual stream; none for 64.
    heads: number of heads of attention; none for 2.
    steps: number of training steps.
    batch: rows in a batch.
    warmup: steps of linear warm-up; none for a thirtieth of all steps.
    evaluate_every: steps between evaluations; none for a quarter of all steps.
  """
  if student:
    shape.refuse(DEFAULT, f'--student={student}')
    if rates := regularisation.explicit_values():
      raise ValueError(f'--{next(iter(rates))} is for a student whose shape is given by flags; leave out this flag or '
                       '--student')
  text, update = corpus.source(), optimizer.make(steps, warmup=steps // 30)
  divergence = {'forward': distillation.forward_kl, 'reverse': distillation.reverse_kl,
                'js': distillation.JensenShannon(beta)}[kind]

  def build(base: load.BaseModel, like: load.BaseModel | None) -> train.Run:
    constants = train.Constants('teacher', base.model, base.start)
    if like:
      model = like.model
      distillation.check_tokenizers(base.tokenizer, like.tokenizer)
    else:
      model = shape.decoder(DEFAULT, base.model.vocab, length, computation, regularisation)
    data: Any = dataset.Text(text, base.tokenizer, length)
    if stored_top_k:
      stored = distillation.TopK(stored_top_k, base.model.vocab, temperature)
      objective = distillation.distil_stored(next_token(), stored, divergence, hard)
      data = annotate.Annotated(data, constants, stored.columns, stored)
    else:
      objective = distillation.distil(next_token(), base.model.apply, divergence, temperature, hard)
    run = train.Run(model=computation.apply(model), objective=objective, data=data, optimizer=update,
                    steps=steps, batch=batch, constants=() if stored_top_k else (constants,))
    return cadence.apply(computation.apply_to_steps(run), evaluations=4)
  return train.after_opening(build, base=named.decoder('--teacher', teacher),
                             like=named.decoder('--student', student) if student else None)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Trains the same student on the text alone, for as many steps. Prints the results of all on held-out text."""
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
    bits = metrics.get('bits_per_byte', float('nan'))   # older stores do not have the number of bytes
    print(f'  {name:22}{bits:7.3f}{metrics["perplexity"]:12.2f}{model_size(model):9,}'
          f'{seconds.get(name, float("nan")):10.3f}'.replace('nan', '  -'))


def model_size(model: Any) -> int:
  """Returns the number of parameters."""
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


if __name__ == '__main__':
  launch.run(experiment, report)
