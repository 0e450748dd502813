"""Probes of data: duplicates, padding, examples that are cut or left out, and how often a run reads its data."""
import hashlib

import numpy as np

from lm.data.rows.packed_documents import Stream
from lm.data.rows.packed_records import Packed
from lm.doctor.findings import DoesNotApply, Finding, Verdict, judge
from lm.doctor.subject import Subject

BATCHES = 4           # that are read for the share of padding
DOCUMENTS = 20_000    # the most documents that are compared with one another


def padding_share(subject: Subject) -> Finding:
  """The share of padding in the first batches, and the targets a row."""
  batches = subject.batches
  rows = range(min(subject.run.batch, 16))
  read = [batches(step, rows) for step in range(min(BATCHES, batches.steps_per_epoch))]
  padding = np.mean([batch.segments == 0 for batch in read])
  targets = np.mean([(batch.weights != 0).sum() for batch in read]) / len(rows)
  text = f'{padding:.1%} of the positions of the first rows are padding; a row has {targets:.0f} targets'
  return judge(padding < 0.5, text, 'shorter rows (--length) cost less', Verdict.WARNING)


def cut_examples(subject: Subject) -> Finding:
  """The share of documents that are longer than a row and are cut, or of records that are left out."""
  batches = subject.batches
  if isinstance(batches, Packed):
    share = batches.left_out / len(batches.records)
    text = f'{batches.left_out:,} of {len(batches.records):,} records ({share:.1%}) are longer than a row and left out'
    return judge(share < 0.1, text, 'raise --length, or shorten the records', Verdict.WARNING)
  if not isinstance(batches, Stream):
    raise DoesNotApply('the data packs its rows itself')
  sizes = np.diff(batches.store.offsets)
  longer = sizes + 2 > batches.length
  return judge(True, f'{longer.mean():.1%} of {len(sizes):,} documents are longer than a row, and are read in several '
               f'pieces; {sizes.mean():,.0f} tokens a document')


def duplicates(subject: Subject) -> Finding:
  """The share of training documents, or records, that are the same as an earlier one."""
  stored = subject.data.stores.get('train') if hasattr(subject.data, 'stores') else None
  if stored is None or not hasattr(stored, 'offsets'):
    raise DoesNotApply('the data does not store its documents one by one')
  count = min(len(stored.offsets) - 1, DOCUMENTS)
  digests = {hashlib.blake2b(np.asarray(stored.tokens[stored.offsets[i]:stored.offsets[i + 1]]).tobytes(),
                             digest_size=12).digest() for i in range(count)}
  share = 1 - len(digests) / max(count, 1)
  text = f'{share:.2%} of {count:,} documents repeat an earlier one token by token'
  return judge(share < 0.01, text, 'each counts as often as it is repeated', Verdict.WARNING)


def epochs(subject: Subject) -> Finding:
  """How often the run reads its data."""
  run, batches = subject.run, subject.batches
  rows = run.schedule.rows_before(run.steps)
  count = rows / batches.rows_per_epoch
  tokens = batches.rows_per_epoch * run.data.length
  text = f'an epoch is {tokens:,} positions; this run reads {count:.3g} epochs in {run.steps:,} steps'
  return judge(count <= 8, text, 'text that is read so often is learned by heart; --patience stops in time',
               Verdict.WARNING)
