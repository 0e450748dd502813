"""Evaluate a model on a suite of named evaluations: every number with its interval, as a table, JSON and figures.

  python experiments/evaluate.py --workdir=runs/quickstart
  python experiments/evaluate.py --model=gpt2 --suite=suite.json
  python experiments/evaluate.py --model=gpt2 --tasks=hellaswag,piqa

A suite is a JSON file, as lm/evaluate/suites.py says; without one, the likelihood of what was held out of the run,
and how varied 50 texts are that go on from its beginnings.
"""
import pathlib

import jax

from lm import launch, load, sharding
from lm.evaluate import evaluations, report, suites, text_generation
from lm.evaluate.harness import Harness
from lm.hf import pretrained
from lm.objectives.objective import causal_prompt


def evaluate(*, workdir: pathlib.Path | None = None, model: str | None = None, suite: pathlib.Path | None = None,
             tasks: tuple[str, ...] = (), include_path: str | None = None, limit: int | None = None,
             out: pathlib.Path | None = None, best: bool = False, mesh: str | None = None) -> None:
  """Evaluates a model.

  Args:
    workdir: of the run; none for runs/quickstart.
    model: a Hugging Face folder, an imported one, an id on the hub or the workdir of a run, in place of --workdir.
    suite: a JSON file with the evaluations; none for the likelihood of what was held out of the run, and 50 texts that
      go on from the first tokens of it.
    tasks: tasks of lm-evaluation-harness, in place of a suite.
    include_path: a folder with further tasks of that kind, such as experiments/tasks.
    limit: the first so many documents of each of these tasks; none for all.
    out: the folder for the results; none for the folder `evaluation` of the run, or evaluation-NAME of another model.
      What it has of the same model and settings is not measured again, and an evaluation that was stopped goes on.
    best: take the best checkpoint, not the newest.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
  """
  workdir, model = load.run_or_model(workdir, model, best)
  if model and suite is None and not tasks:
    raise ValueError(f'--model={model} has no held-out documents of its own; give --tasks, or a --suite such as '
                     '{"likelihood": {"books": {"text": "books/*.txt"}}}')
  chosen = of_flags(suite, tasks, include_path, limit)
  for _, evaluation in chosen.evaluations() if chosen else ():
    evaluation.check_packages()   # before a model is read, which may take long
  with jax.set_mesh(sharding.make_mesh(mesh)):
    if model:
      loaded = pretrained.load(model)
      identity = {'model': model, 'parameters': pretrained.start(loaded.folder, loaded.model).parameters}
    else:
      loaded = load.open_trained(workdir, best)
      identity = {'workdir': workdir.name, 'step': loaded.step, 'parameters': loaded.facts.get('parameters')}
    folder = out or (pathlib.Path(f'evaluation-{pathlib.Path(model).name}') if model else workdir / 'evaluation')

    def held_out() -> list[str]:
      if model:
        raise ValueError(f'--model={model} has no held-out documents of its own; name files with text or jsonl')
      return loaded.open_data().documents('validation')

    subject = evaluations.Subject(loaded.model, loaded.params, loaded.tokenizer, held_out,
                                  causal_prompt if model else loaded.run.objective.prompt,
                                  pretrained.folder_template(loaded.folder) if model else loaded.run.data.template)
    results = suites.run(chosen or default(subject), subject, identity, folder)
  print(f'\n{report.table(results)}\n\nwritten to {folder}: ' +
        ', '.join(sorted(file.name for file in folder.iterdir() if file.suffix in ('.json', '.jsonl', '.txt', '.png'))))


def of_flags(file: pathlib.Path | None, tasks: tuple[str, ...], include_path: str | None, limit: int | None
             ) -> suites.Suite | None:
  """Returns the suite of a file or of tasks; None without both."""
  if file and tasks:
    raise ValueError(f'--suite={file} and --tasks={",".join(tasks)} both name evaluations; give one of them, and put '
                     'the tasks into the suite: {"harness": {"tasks": {"tasks": ["' + tasks[0] + '"]}}}')
  for name, value in (('include_path', include_path), ('limit', limit)):
    if value and not tasks:
      raise ValueError(f'--{name}={value} is for --tasks, which are not given; give tasks, or leave it out')
  if tasks:
    return suites.Suite(harness={'tasks': Harness(tasks, include_path, limit=limit)})
  return None if file is None else suites.read(file)


def default(subject: evaluations.Subject) -> suites.Suite:
  """Returns the likelihood of what was held out and, where it has prompts for the model, texts that go on from them."""
  likelihood, size = {'held-out': evaluations.Likelihood()}, min(64, (subject.model.max_length - 1) // 2)
  written = text_generation.Generation(limit=50, prompt_tokens=size, max_tokens=size)
  try:
    written.digest(subject)
  except ValueError as error:
    print(f'no texts are generated: {error}')
    return suites.Suite(likelihood)
  return suites.Suite(likelihood, {'written': written})


if __name__ == '__main__':
  launch.tool(evaluate)
