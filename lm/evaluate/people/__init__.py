"""Human evaluation: people compare or rate outputs on a local web page; ratings, agreement, and votes still needed."""
from lm.evaluate.people.exports import as_text, results_csv, votes_csv
from lm.evaluate.people.opening import open_study
from lm.evaluate.people.rating_server import application, serve
from lm.evaluate.people.results import summarise
from lm.evaluate.people.study import Mode

__all__ = ['application', 'as_text', 'Mode', 'open_study', 'results_csv', 'serve', 'summarise', 'votes_csv']
