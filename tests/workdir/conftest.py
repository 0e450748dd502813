"""What tests of checkpoints share."""
import logging

import pytest
from absl import logging as absl_logging
from helpers.checkpoint_states import make_mesh


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(8, 1)


@pytest.fixture
def warned():
  """Returns the lines that this package logs by absl, whose logger may not propagate to pytest's.

  Orbax logs lines of its own where the machine is slow.
  """
  lines = []
  handler = logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage()) if 'orbax' not in record.pathname else None
  absl_logging.get_absl_logger().addHandler(handler)
  yield lines
  absl_logging.get_absl_logger().removeHandler(handler)
