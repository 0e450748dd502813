"""Flags of metrics that a neural network computes, by the name of a run, of a folder or of a model on the hub."""
import dataclasses
import pathlib

from lm import load
from lm.evaluate.learned import BertScore, Bleurt
from lm.hf import bleurt_checkpoints, pretrained


@dataclasses.dataclass(frozen=True)
class LearnedMetrics:
  """Learned metrics.

  Args:
    bleurt: model of BLEURT, as a run of learned_metric.py, a folder or an id on the hub; none leaves it out.
    bert_score: encoder of BERTScore, as a run, a folder or an id on the hub; none leaves it out.
    layer: the layer that BERTScore compares; none for the last.
    use_idf: BERTScore weights tokens by how rare they are in the references.
    baseline: a file of baselines of the package bert-score, with which BERTScore is rescaled.
  """
  bleurt: str | None = None
  bert_score: str | None = None
  layer: int | None = None
  use_idf: bool = False
  baseline: pathlib.Path | None = None

  def __post_init__(self):
    is_given = {'layer': self.layer is not None, 'use_idf': self.use_idf, 'baseline': self.baseline is not None}
    if self.bert_score is None and any(is_given.values()):
      name = next(name for name in is_given if is_given[name])
      raise ValueError(f'--{name}={getattr(self, name)} is for --bert_score, which is not given; leave it out')
    if self.baseline is not None and not self.baseline.is_file():
      raise ValueError(f'--baseline={self.baseline} is no file; give one of bert-score, such as its '
                       'rescale_baseline/en/bert-base-uncased.tsv')

  def open(self) -> list[Bleurt | BertScore]:
    """Opens the metrics that are given, on the mesh that is set.

    Raises:
      FileNotFoundError, OSError: there is no such model.
      ValueError: a model is of another kind.
    """
    metrics: list[Bleurt | BertScore] = []
    if self.bleurt is not None:
      metrics.append(open_bleurt(self.bleurt))
    if self.bert_score is not None:
      opened = load.open_trained(self.bert_score) if load.is_run(self.bert_score) else pretrained.load(self.bert_score)
      metrics.append(BertScore(opened.model, opened.params, opened.tokenizer, self.bert_score, self.layer, self.use_idf,
                               self.baseline))
    return metrics


def open_bleurt(name: str) -> Bleurt:
  """Opens a run of learned_metric.py, or a checkpoint of BLEURT, see `bleurt_checkpoints.load`."""
  if not load.is_run(name):
    return bleurt_checkpoints.load(name)
  trained = load.open_trained(name)
  return Bleurt(trained.model, trained.params, trained.tokenizer, name)
