"""What was drawn, by the figures that matplotlib saved."""
import numpy as np


def saved_figures(monkeypatch):
  """A list of the figures that are saved from now on, each with more than one colour in its file."""
  from matplotlib import image
  from matplotlib.figure import Figure
  figures, savefig = [], Figure.savefig

  def save(figure, png, **options):
    savefig(figure, png, **options)
    assert np.ptp(image.imread(png)[..., :3]) > 0.5, 'the picture has one colour'
    figures.append(figure)

  monkeypatch.setattr(Figure, 'savefig', save)
  return figures


def points(axes):
  """The points (x, y) of each line."""
  return [list(zip(*(map(float, values) for values in line.get_data()))) for line in axes.get_lines()]
