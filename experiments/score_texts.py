"""Scores texts against references by BLEU, chrF, TER, ROUGE and others, each number with its interval.

  python experiments/score_texts.py --candidates=outputs.jsonl --references=references.jsonl --metrics=bleu,rouge
  python experiments/score_texts.py --candidates=a.txt,b.txt --references=first.txt,second.txt --lowercase
  python experiments/score_texts.py --candidates=poems.txt --language=zh --metrics=distinct,self_bleu,repetition
  python experiments/score_texts.py --candidates=a.jsonl --references=r.jsonl --bleurt=lucadiliello/BLEURT-20-D12
  python experiments/score_texts.py --candidates=samples.jsonl --problems=HumanEval.jsonl.gz --execute_code --k=1,10

JSON lines have `id`, `text` (or `candidate`) and `references` (or `reference`); plain text has one text a line. Ids are
matched, in any order. Needs `pip install -e '.[eval]'`.
"""
import collections
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from lm import launch, options
from lm.evaluate import report, texts
from lm.evaluate.learned import BertScore, Bleurt
from lm.evaluate.texts import text_files


def score_texts(*, candidates: tuple[pathlib.Path, ...], references: tuple[pathlib.Path, ...] = (),
                metrics: tuple[str, ...] | None = None, problems: pathlib.Path | None = None,
                execute_code: bool = False, k: tuple[int, ...] = (1,), seconds: float = 10.,
                allow_no_isolation: bool = False, settings: texts.Settings = texts.Settings(),
                learned: options.LearnedMetrics = options.LearnedMetrics(), out: pathlib.Path | None = None) -> None:
  """Scores files of texts.

  Args:
    candidates: the texts of each system, a file for each: .jsonl with lines of id and text, or plain text.
    references: .jsonl with lines of id and references, or plain text; each file has references of all texts. None
      where the lines of --candidates have references.
    metrics: some of bleu, chrf, chrf++, ter, rouge, exact_match, edit_distance, length_ratio, distinct, repetition and
      self_bleu, of which the last three need no references; none for bleu, chrf and rouge, or pass@k of --problems.
    problems: programming problems, such as HumanEval; the candidates are programs, several lines with an id as well.
    execute_code: let the candidates be executed, each in a process without network, files, rights and much memory.
    k: of pass@k: how many programs may try.
    seconds: the time of each program.
    allow_no_isolation: execute programs where the system has no namespaces, with limits alone; they read what everyone
      may read, and have the network.
    out: a folder for results.json, results.txt, and what came of each program.
  """
  if out:
    out.mkdir(parents=True, exist_ok=True)
  if problems is None:
    if execute_code or allow_no_isolation or k != (1,) or seconds != 10.:
      raise ValueError('--execute_code, --allow_no_isolation, --k and --seconds are for --problems, which is not given')
    chosen = metrics or ('bleu', 'chrf', 'rouge')
    texts.check_names(chosen)
    settings.check(chosen)
    settings.check_packages(chosen)
    described = {'metrics': chosen, **dataclasses.asdict(settings), **{
        name: value for name, value in dataclasses.asdict(learned).items() if value}}
    records_by_name, opened = text_files.read_named(candidates), learned.open()
    results = {name: score(records, references, chosen, settings, opened) for name, records in records_by_name.items()}
  else:
    if references or metrics or settings != texts.Settings() or learned != options.LearnedMetrics():
      raise ValueError('--problems has pass@k alone; score texts with --references and --metrics by another command')
    if not execute_code:
      raise ValueError('--problems executes the programs in --candidates, which nobody may have read; --execute_code '
                       'allows it')
    metric = texts.PassAtK(k, texts.Sandbox(seconds=seconds, isolated=not allow_no_isolation))
    described = {'problems': str(problems), **dataclasses.asdict(metric)}
    results = {name: execute(records, text_files.read(problems), metric)
               for name, records in text_files.read_named(candidates).items()}
  tables = {name: report.to_json(result) for name, result in results.items()}
  if out:
    for name, result in results.items():
      if result.outputs:
        report.write_outputs(out / f'{name}.jsonl', result.outputs)
    files = {'candidates': list(map(str, candidates)), 'references': list(map(str, references))}
    report.write(out, {**files, **described}, tables)
  print(report.table(tables))
  if out:
    print(f'written to {out}')


def score(records: text_files.Records, files: tuple[pathlib.Path, ...], metrics: tuple[str, ...],
          settings: texts.Settings, learned: Sequence[Bleurt | BertScore] = ()) -> report.Result:
  """Returns the measures of the texts of a file, in the order of the metrics."""
  candidates, references, notes = text_files.texts(records), None, []
  text_files.check_unique(records)
  if learned or not set(metrics) <= set(texts.WITHOUT_REFERENCES):
    references = text_files.matched(records, [text_files.read(file) for file in files])
    notes += filter(None, [settings.note(references)])
    for note in notes:
      print(f'{records.path}: {note}', flush=True)
  elif files:
    raise ValueError(f'--references is not read by {", ".join(metrics)}; leave it out, or add a metric that compares')
  empty = sum(not text.strip() for text in candidates)
  measures = []
  for name in metrics:
    start = time.monotonic()
    measures += settings.scores(name, candidates, references)
    print(f'{name}: {len(candidates):,} texts in {time.monotonic() - start:.1f} s', file=sys.stderr, flush=True)
  for metric in learned:
    measures += metric(candidates, references)
    notes += filter(None, [metric.note(candidates, references)])
  return report.Result(measures, (), notes + [f'{empty:,} of {len(candidates):,} texts are empty'] * bool(empty))


def execute(records: text_files.Records, problems: text_files.Records, metric: texts.PassAtK) -> report.Result:
  """Returns pass@k of the programs of a file, and which reasons the others had for not passing."""
  attempts = metric(text_files.by_problem(records, problems), [texts.problem(line) for line in problems.lines])
  reasons = collections.Counter(result.split(':')[0] for results in attempts.results for result in results)
  note = ', '.join(f'{reason}: {count}' for reason, count in reasons.most_common(6))
  ids = problems.ids or list(map(str, range(len(problems.lines))))
  return report.Result(attempts.measures, (), [note], ids, [
      {'id': id, 'results': of_problem} for id, of_problem in zip(ids, attempts.results)])


if __name__ == '__main__':
  launch.tool(score_texts)
