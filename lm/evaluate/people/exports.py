"""Votes and results as CSV, as JSON for the page, and as text for a terminal."""
import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from lm import statistics
from lm.evaluate.people.results import Cell, Results
from lm.evaluate.people.vote_store import VoteStore


def votes_csv(store: VoteStore) -> str:
  """Returns all votes that count: a row each, and in mode likert a row for each text that a vote rates.

  `shown` are the systems from left to right, joined by |.
  """
  study = store.study
  of_mode = {'pairwise': ('preferred',), 'best_worst': ('best', 'worst'), 'likert': ('system', *study.criteria)}
  rows: list[Sequence[Any]] = [('vote', 'rater', 'time', 'seconds', 'item', 'check', 'shown', *of_mode[study.mode],
                                'comment')]
  for vote in store.votes():
    shown = ['scrambled' if position == vote.task.scrambled else system
             for position, system in enumerate(vote.task.shown)]
    match vote.answer:
      case {'choice': 'tie'}:
        judgements: list[Sequence[Any]] = [('tie',)]
      case {'choice': choice}:
        judgements = [(shown[choice],)]
      case {'best': best, 'worst': worst}:
        judgements = [(shown[best], shown[worst])]
      case {'ratings': scores}:
        judgements = [(system, *values) for system, values in zip(shown, scores)]
    rows += [(vote.id, vote.rater, vote.time, vote.seconds, study.items[vote.task.item].id, vote.task.check,
              '|'.join(shown), *judgement, _no_formula(vote.comment)) for judgement in judgements]
  return _csv(rows)


def results_csv(results: Results) -> str:
  """Returns all numbers of the tables, a row each; low and high are the limits of a 95 % interval."""
  rows: list[Sequence[Any]] = [('table', 'row', 'column', 'value', 'low', 'high')]
  for table in results.tables:
    for name, *cells in table.rows:
      for column, cell in zip(table.columns[1:], cells):
        values = cell if isinstance(cell, statistics.Interval) else (cell, '', '')
        rows.append((table.title, name, column, *values))
  return _csv(rows)


def as_json(results: Results) -> dict[str, Any]:
  """Returns the results as the page shows them; limits that are not finite are null."""
  finite = lambda value: value if math.isfinite(value) else None

  def encode(cell: Cell) -> Any:
    if isinstance(cell, statistics.Interval):
      return {'value': finite(cell.value), 'low': finite(cell.low), 'high': finite(cell.high)}
    return cell if isinstance(cell, str | None) else str(cell)
  return {'sentences': results.sentences, 'tables': [
      {'title': table.title, 'columns': table.columns, 'digits': table.digits,
       'rows': [[encode(cell) for cell in row] for row in table.rows]} for table in results.tables]}


def as_text(results: Results) -> str:
  """Returns the results for a terminal."""
  lines = list(results.sentences)
  for table in results.tables:
    rows = [table.columns, *([_text(cell, table.digits) for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines += ['', table.title]
    lines += ['  ' + '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
  return '\n'.join(lines)


def _text(cell: Cell, digits: int) -> str:
  if isinstance(cell, statistics.Interval):
    return f'{cell.value:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]'
  return '' if cell is None else str(cell)


def _no_formula(comment: str) -> str:
  """A comment that spreadsheets would compute as a formula gets an apostrophe in front."""
  return f"'{comment}" if comment[:1] in ('=', '+', '-', '@', '\t') else comment


def _csv(rows: Iterable[Sequence[Any]]) -> str:
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(rows)
  return text.getvalue()
