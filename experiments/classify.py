r"""Classifies texts without training: each class has a verbaliser, and the one with the highest probability is chosen.

  python experiments/quickstart.py
  python experiments/classify.py --workdir=runs/quickstart
  python experiments/classify.py --model=gpt2 --jsonl=reviews.jsonl --between='\nThis film is' \
    --classes='pos= great,neg= bad'

The second command takes 9 s of CPU time on 2 crowded cores of an AMD EPYC. The model here is that of
the quickstart after 2.5 minutes, which were 140 steps there (2.16 bits per byte). Of 43 pieces of held-out files
of Python's library, 0.67 [0.53, 0.81] are rightly Python, C or prose by the likeliest verbaliser, and 0.63 [0.49, 0.77]
by what each gains by the text; always saying Python is right for 0.60 [0.47, 0.74]. So no difference to that is shown.
The brackets are 95 % intervals over files. Rightly Python are 'self._timeout_handler.cancel()', 'from unittest import
main' and 'def prepare_predicate(next, token):'; wrongly prose are the C headers 'int use_environment;' and '#endif /*
!Py_ITEROBJECT_H */', and wrongly Python is a table on "if" and "else" from the language reference.
"""
import collections
import json
import pathlib

import jax
import numpy as np

from lm import launch, load, sharding
from lm.data.text import corpora
from lm.data.text.source import unescaped
from lm.evaluate import report, verbalisers
from lm.evaluate.measures import mean
from lm.evaluate.report import Result
from lm.hf import pretrained

KINDS = 'Python=    def ,C=#define ,prose=The '   # how a line begins in each kind of file of Python's library


def kind(document: str) -> str:
  """Returns the kind of a file of Python's library, by the comments of C, and the imports and definitions of Python."""
  if '/*' in document and '#' in document:
    return 'C'
  is_code = any(line.startswith(('import ', 'from ', 'def ', 'class ')) for line in document.split('\n'))
  return 'Python' if is_code else 'prose'


def classify(*, workdir: pathlib.Path | None = None, model: str | None = None, jsonl: str | None = None,
             text_key: str = 'text', label_key: str = 'label', between: str = r'\n',
             classes: tuple[str, ...] = tuple(KINDS.split(',')), limit: int | None = 300, best: bool = False) -> None:
  """Classifies texts, and prints the accuracy.

  Args:
    workdir: of the run; none for runs/quickstart.
    model: a Hugging Face folder, an imported one, an id on the hub or the workdir of a run, in place of --workdir.
    jsonl: files of JSON lines with a text and its class, a glob pattern; none takes pieces of the files that were held
      out of the run.
    text_key: field with the text.
    label_key: field with the name of the class.
    between: text between a text and the verbaliser, with \\n for a new line.
    classes: CLASS=VERBALISER of each class.
    limit: the first so many texts; none for all.
    best: take the best checkpoint, not the newest.
  """
  if limit is not None and limit < 1:
    raise ValueError(f'limit={limit} must be at least 1')
  workdir, model = load.run_or_model(workdir, model, best)
  if model and not jsonl:
    raise ValueError(f'--model={model} has no held-out documents of its own; give --jsonl')
  words = dict(one.split('=', 1) for one in classes if '=' in one)
  if len(words) < max(len(classes), 2):
    raise ValueError(f'--classes={",".join(classes)} is not two or more different CLASS=VERBALISER')
  with jax.set_mesh(sharding.make_mesh()):
    loaded = pretrained.load(model) if model else load.open_trained(workdir, best)
    if jsonl:
      records = [json.loads(line) for line in corpora.jsonl(jsonl, None, 0.).splits['train'][:limit]]
      bad = [record for record in records if label_key not in record or not isinstance(record.get(text_key), str)]
      if bad:
        raise ValueError(f'{jsonl}: the record {json.dumps(bad[0])[:100]} needs a text in {text_key!r} and a class in '
                         f'{label_key!r}; name its fields by --text_key and --label_key')
      texts, labels = [record[text_key] for record in records], [str(record[label_key]) for record in records]
    else:
      documents = loaded.open_data().documents('validation')
      texts = [text[len(text) // 2:][:600] for text in documents[:limit]]
      labels = [kind(text) for text in documents[:limit]]
    if not texts:
      raise ValueError(f'{jsonl or workdir} has no texts; give a file that has some')
    if unknown := set(labels) - set(words):
      raise ValueError(f'--classes={",".join(classes)} has no verbaliser of {", ".join(sorted(unknown)[:5])}')
    contexts = [text + unescaped(between) for text in ('', *texts)]   # the first one is without a text
    scores = verbalisers.log_probabilities(loaded.model, loaded.params, loaded.tokenizer, contexts,
                                           list(words.values()))
  expected = np.array([list(words).index(label) for label in labels])
  common = collections.Counter(expected.tolist()).most_common(1)[0][0]
  measures = [mean('likeliest', scores[1:].argmax(1) == expected, 'higher'),
              mean('gained_most', (scores[1:] - scores[0]).argmax(1) == expected, 'higher'),
              mean('most_common', expected == common, 'higher')]
  print('classes of some texts, as what the likeliest verbaliser takes them, and their ends:')
  for i in range(0, len(texts), max(len(texts) // 6, 1)):
    print(f'{labels[i]} as {list(words)[int(scores[i + 1].argmax())]}: {texts[i][-80:]!r}')
  print('\n' + report.table({'accuracy': report.to_json(Result(measures))}))


if __name__ == '__main__':
  launch.tool(classify)
