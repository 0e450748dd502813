r"""Measures, for several temperatures, how probable the texts of a model are, and how varied.

  python experiments/quickstart.py
  python experiments/temperatures.py --workdir=runs/quickstart

With --limit=32, the second command takes 14 s of CPU time on 2 crowded cores of an AMD EPYC. The model here is that of
the quickstart after 2.5 minutes, which were 140 steps there (2.16 bits per byte of held-out text). 64 tokens after
the beginnings of 32 held-out documents, with 95 % intervals over documents:

  temperature  bits per byte      distinct-2         self-BLEU            repeated 4-grams
  0.3          1.45 [1.31, 1.62]  0.55 [0.51, 0.60]  26.9 [22.4, 31.5]    0.045
  0.5          1.73 [1.57, 1.92]  0.70 [0.65, 0.75]  18.8 [15.2, 22.9]    0.007
  0.7          2.03 [1.88, 2.19]  0.84 [0.82, 0.87]   9.3 [7.9, 10.8]     0.001
  0.85         2.24 [2.10, 2.41]  0.86 [0.81, 0.90]   8.4 [7.1, 9.8]      0.018
  1            2.46 [2.33, 2.60]  0.88 [0.83, 0.91]   6.9 [5.9, 8.0]      0.014
  1.2          2.64 [2.51, 2.77]  0.87 [0.83, 0.91]   7.5 [6.4, 8.8]      0.010
  documents    2.38 [2.24, 2.53]  0.66 [0.57, 0.75]  26.0 [17.7, 34.6]    0.054

Where texts of the model are as likely as the documents (between 0.85 and 1), they share fewer phrases than documents
do: so small a model varies where code and prose repeat themselves. No temperature has both numbers of the documents.
After '#define Py_PYCORECONFIG_H\n#ifndef Py_' it writes, all of it bad:

  0.3  'BUILDGMOREADTGNAL_ANNOTATHOREFrame(5\n    # TLUPY_READSTION(_READAL_REPEATHAR'
  0.7  'DE_H_HGMOUTTATGS_S_skip_EN_CHORETORes\n'
  1.2  ' FntIuple(readsT:\n        # and_scro and specified argument element sargses work,'
"""
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from lm import launch, load, sharding
from lm.evaluate import evaluations, report, text_generation, texts
from lm.evaluate.report import Curve, Result

METRICS = 'distinct', 'repetition', 'self_bleu'


def measure(*, workdir: pathlib.Path = pathlib.Path('runs/quickstart'),
            temperatures: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85, 1., 1.2), top_p: float = 1., limit: int = 64,
            prompt_tokens: int = 32, max_tokens: int = 64, seed: int = 0, out: pathlib.Path | None = None,
            best: bool = False) -> None:
  """Lets a model continue the beginnings of held-out documents, and measures the texts.

  Args:
    workdir: of the run.
    temperatures: the temperatures; 0 takes the most probable token each time.
    top_p: draw among the fewest tokens whose probabilities reach this sum.
    limit: the number of held-out documents, 2 or more.
    prompt_tokens: tokens of each that the model reads.
    max_tokens: tokens that it writes after them.
    seed: of the draws.
    out: the folder for the results; none for the folder `temperatures` of the run.
    best: take the best checkpoint, not the newest.
  """
  if not temperatures or len(set(temperatures)) < len(temperatures):
    raise ValueError(f'--temperatures={",".join(map(str, temperatures))} is not one or more different numbers')
  kinds = [text_generation.Generation(limit=limit, prompt_tokens=prompt_tokens, max_tokens=max_tokens, metrics=METRICS,
                                      temperature=temperature, top_p=top_p, seed=seed) for temperature in temperatures]
  with jax.set_mesh(sharding.make_mesh()):
    loaded = load.open_trained(workdir, best)
    documents = loaded.open_data().documents('validation')
    subject = evaluations.Subject(loaded.model, loaded.params, loaded.tokenizer, lambda: documents,
                                  loaded.run.objective.prompt, loaded.run.data.template)
    kinds[0].digest(subject)   # refuses what does not fit the model
    folder = out or workdir / 'temperatures'
    folder.mkdir(parents=True, exist_ok=True)   # not for a run that does not exist
    results = {}
    for kind in kinds:
      outputs = kind(subject).outputs
      prompts, written = [output['prompt'] for output in outputs], [output['text'] for output in outputs]
      results[f'{kind.temperature:g}'] = judged(subject, prompts, written)
      print(f'\n--- {kind.temperature:g}: {prompts[0][-60:]!r} -> {written[0][:120]!r}', flush=True)
    results['documents'] = judged(subject, prompts, [output['references'][0] for output in outputs])
  report.write(folder, {'workdir': workdir.name, 'step': loaded.step, 'top_p': top_p, 'prompt_tokens': prompt_tokens,
                        'max_tokens': max_tokens, 'seed': seed}, results)
  print(f'\n{report.table(results)}\n\nwritten to {folder}: results.json, results.txt, '
        + ', '.join(file.name for file in report.draw(folder, results)))


def judged(subject: evaluations.Subject, prompts: Sequence[str], written: Sequence[str]) -> dict[str, Any]:
  """Returns the bits per byte of texts after their prompts, and how varied they are, with a point of the figure."""
  likely = text_generation.bits_per_byte(subject, prompts, written)
  variety = [measure for name in METRICS for measure in texts.Settings().scores(name, written, None)]
  self_bleu = next(measure for measure in variety if measure.name == 'self_bleu')
  curve = Curve('likelihood_and_variety', 'self-BLEU (lower is more varied)', 'bits per byte (lower is likelier)',
                [(self_bleu.interval().value, likely)])
  return report.to_json(Result([likely, *variety], [curve]))


if __name__ == '__main__':
  launch.tool(measure)
