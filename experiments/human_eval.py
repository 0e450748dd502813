"""Let people judge outputs of systems: a local web page shows them blind, side by side and in random order.

  python experiments/human_eval.py --outputs=system_a.jsonl,system_b.jsonl --raters=3 --database=runs/study.sqlite
  python experiments/human_eval.py --outputs=a.txt,b.txt --mode=likert --criteria=fluency,relevance
  python experiments/human_eval.py --database=runs/study.sqlite
  python experiments/human_eval.py --database=runs/study.sqlite --export=votes.csv --export_results=results.csv

Prints a private link for each rater and one for the results. All votes are in the database; a study that was stopped,
or killed, continues from there. Needs `pip install -e '.[human]'`.
"""
import pathlib

from lm import launch
from lm.evaluate import people
from lm.workdir import atomic


def human_eval(*, outputs: tuple[str, ...] = (), database: pathlib.Path = pathlib.Path('study.sqlite'),
               mode: people.Mode | None = None, criteria: tuple[str, ...] | None = None, scale: int | None = None,
               question: str | None = None, raters: int | None = None, votes_per_item: int | None = None,
               checks: int | None = None, seed: int | None = None, host: str = '127.0.0.1', port: int = 8000,
               export: pathlib.Path | None = None, export_results: pathlib.Path | None = None) -> None:
  """Serves the pages of a study, or exports its votes and results.

  Args:
    outputs: a file of outputs for each system, as file or name=file; .jsonl has lines with text and perhaps id and
      prompt, other files have an output a line. None continues the study in the database.
    database: where the study and its votes are kept.
    mode: pairwise asks which of two is better, best_worst for the best and the worst of all, likert for a rating of
      each; none for pairwise, or what the study has.
    criteria: what each text is rated by, with --mode=likert.
    scale: ratings are 1 to this; none for 5.
    question: the question above the texts; none for one that fits the mode.
    raters: how many people judge; each has a link. Of a study that exists, more may be added. None for 1.
    votes_per_item: raters who answer each question; none for 2, or 1 where there is one rater.
    checks: attention checks that each rater gets, half with a scrambled text, half repeated questions; none for 4.
    seed: of all random orders; none for 0.
    host: the address to listen on; 0.0.0.0 lets other machines of the network open the links.
    port: 0 takes any that is free.
    export: write all votes to this CSV file, print the results, and do not serve.
    export_results: write the numbers of the results to this CSV file, print them, and do not serve.
  """
  for path in export, export_results:
    if path is not None and not path.absolute().parent.is_dir():
      raise ValueError(f'{path} cannot be written, as there is no folder {path.parent}; make it, or give another file')
  settings = {'mode': mode, 'criteria': criteria, 'scale': scale, 'question': question, 'checks': checks, 'seed': seed}
  store = people.open_study(database, outputs, settings, raters, votes_per_item)
  if export is None and export_results is None:
    people.serve(store, host, port)
    return
  results = people.summarise(store)
  for path, text in (export, people.votes_csv(store)), (export_results, people.results_csv(results)):
    if path is not None:
      atomic.write(path, text)
  print(people.as_text(results))


if __name__ == '__main__':
  launch.tool(human_eval)
