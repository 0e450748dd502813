"""What tests of tokenizers share."""
import pytest
from helpers.byte_level import TEXT


@pytest.fixture(scope='module')
def documents():
  return [TEXT[i:i + 3000] for i in range(0, len(TEXT), 3000)]
