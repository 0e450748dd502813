"""The strictest setting: eight host devices, warnings are errors, no silent rank promotion."""
import collections
import os

# Before JAX starts: the flag is read once.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tiny programs run once: they take longer to optimise than to run.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_addoption(parser):
  parser.addoption('--rows', action='store_true', help='print what was measured of Hugging Face families, a row each')


def pytest_terminal_summary(terminalreporter, config):
  """Of each family the worst of its tests; `same` are properties that hold."""
  if config.getoption('--rows'):
    columns, table = ['logits', 'loss', 'packed', 'cached', 'back'], collections.defaultdict(dict)
    for report in terminalreporter.getreports('passed'):
      for name, value in report.user_properties:
        row, _, column = name.partition('/')
        table[row][column] = max(value, table[row].get(column, value))
    terminalreporter.write_line(f'{"":34}' + ''.join(f'{column:>10}' for column in columns))
    for row, found in table.items():
      cells = [found.get(column, '-') for column in columns]
      terminalreporter.write_line(f'{row:34}' + ''.join(
          f'{cell:>10}' if isinstance(cell, str) else f'{cell:10.1e}' for cell in cells))
