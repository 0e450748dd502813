r"""Finds which evaluation items occur in training text, and shows scores on clean and dirty items beside each other.

  python experiments/contamination.py --text='books/*.txt' --items=questions.jsonl
  python experiments/contamination.py --jsonl='train/*.jsonl.gz' --items=gsm8k.jsonl --item_keys=question,answer \
      --scores=answers.jsonl --score_key=correct
  python experiments/contamination.py --items=test.jsonl --results=runs/quickstart/evaluation

An item is dirty by the 13-word rule of GPT-3, see docs/evaluate.md. The training text is read once, and a search that
is stopped goes on where it was.
"""
import json
import pathlib

import numpy as np

from lm import launch
from lm.data.text import source
from lm.evaluate import contamination as search
from lm.evaluate import item_files, measures, stored_measures
from lm.options import Corpus
from lm.workdir import atomic


def contamination(*, items: pathlib.Path, corpus: Corpus = Corpus(), item_keys: tuple[str, ...] = ('text',),
                  words: int = 13, most_documents: int | None = 10, scores: pathlib.Path | None = None,
                  score_key: str = 'score', results: pathlib.Path | None = None,
                  out: pathlib.Path = pathlib.Path('contamination.json')) -> None:
  """Looks evaluation items up in the train split of a corpus: what a run with the same flags is trained on.

  Args:
    items: JSON lines with the text of an item each, and perhaps an id.
    item_keys: the fields of a line that hold the text of an item.
    words: an item is dirty if so many of its words in a row occur in the training text.
    most_documents: words that occur in more documents than this are ignored, as common phrases; none ignores nothing.
    scores: JSON lines with a score of each item, matched by id, or by line where neither file has ids.
    score_key: the field of a line that holds the score.
    results: a folder of results of evaluate.py, of which the evaluations on the texts of the items are shown.
    out: the report, a JSON file.
  """
  if corpus.weights or not corpus.repeat:
    raise ValueError('weights and repeat are of training; all documents of a mixture are searched once, so leave them '
                     'out')
  out.parent.mkdir(parents=True, exist_ok=True)
  entries = item_files.read_items(items, item_keys)
  by_id = item_files.read_scores(scores, score_key) if scores else {}
  lacking = [item.id for item in entries if scores and item.id not in by_id]
  if lacking:
    raise ValueError(f'{scores} has no score of {len(lacking)} of the {len(entries)} items of {items}, such as id '
                     f'{lacking[0]}; give a score for each')
  stored = stored_measures.read(results) if results else {}
  training = corpus.source()
  documents = training.splits['train']
  print(f'searching {len(documents):,} documents of the train split of {training.name} for {len(entries):,} items; '
        f'what --validation={corpus.validation} holds out is not searched', flush=True)
  occurrences = search.search(
      entries, documents, words, most_documents, out.with_name(f'{out.name}.partial.npz'), training.fingerprint,
      lambda count, total: print(f'{count:,} of {total:,} documents', flush=True))
  status = {one.id: one.status for one in occurrences}
  splits = {}
  if scores:
    measure = measures.mean(score_key, [by_id[item.id] for item in entries], '')
    splits[score_key] = search.split(measure, [status[item.id] for item in entries])
  by_text = {source.digest(item.text).hex(): item.id for item in entries}
  for name, (measure, names) in stored.items():
    places = [i for i, document in enumerate(names) if document in by_text]
    if places:
      measure = measure._replace(rows=measure.rows[np.array(places)])
      splits[name] = search.split(measure, [status[by_text[names[i]]] for i in places])
  report = {'settings': {'items': str(items), 'item_keys': item_keys, 'words': words, 'most_documents': most_documents,
                         'training_text': training.name, 'fingerprint': training.fingerprint,
                         'documents': len(documents)},
            'scores': {name: one.to_json() for name, one in splits.items()},
            'items': [one._asdict() for one in occurrences]}
  atomic.write(out, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + '\n')
  print('\n'.join(search.summary(occurrences, words, most_documents)))
  if splits:
    print('\n' + search.scores_table(splits))
  elif results:
    print(f'\n{results} has no evaluation on the texts of these items; give --item_keys the field that was evaluated')
  print(f'\nwritten to {out}')


if __name__ == '__main__':
  launch.tool(contamination)
