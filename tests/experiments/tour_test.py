"""The notebook runs from top to bottom."""
import pathlib

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[2] / 'experiments' / 'tour.ipynb'


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning')   # the client raises it itself
def test_the_tour_runs(tmp_path):
  nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  for cell in notebook.cells:
    cell.source = cell.source.replace('STEPS = 300', 'STEPS = 12')
  executed = nbclient.NotebookClient(notebook, timeout=600, resources={'metadata': {'path': tmp_path}}).execute()
  outputs = {cell.source.splitlines()[0]: cell.outputs for cell in executed.cells if cell.cell_type == 'code'}
  assert sum('STEPS = 12' in cell.source for cell in executed.cells) == 1
  assert 'image/png' in outputs['from IPython.display import Image'][-1].data
  assert outputs['hf.write(folder / \'model\', model, params, tokens)'][-1].data['text/plain'] == 'True'
