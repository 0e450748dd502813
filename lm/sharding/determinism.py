"""Bit-reproducible programs on GPUs: an option of XLA that has to be set before JAX's backend starts."""
import importlib.util
import os

# It forbids operations whose order varies, such as sums by atomic additions (scatter, and so the gradient of a lookup),
# and kernels that are chosen by measuring how fast each is. Compilation fails where there is no other kernel.
_FLAG = '--xla_gpu_deterministic_ops'
_PLUGINS = 'jax_plugins.xla_cuda12', 'jax_plugins.xla_cuda13', 'jax_plugins.xla_rocm60', 'jax_plugins.xla_rocm7'


def require() -> None:
  """Makes XLA compile programs that give the same bits at each start, where JAX may run on a GPU.

  Raises:
    ValueError: the environment variable XLA_FLAGS says otherwise.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  stated = [flag for flag in flags.split() if flag.partition('=')[0] == _FLAG]
  if stated and stated[-1].lower() not in (_FLAG, f'{_FLAG}=true', f'{_FLAG}=1'):
    raise ValueError(f'--deterministic is given, and XLA_FLAGS has {stated[-1]}; leave one of them out')
  if not stated and any(_is_installed(plugin) for plugin in _PLUGINS):
    os.environ['XLA_FLAGS'] = f'{flags} {_FLAG}=true'.strip()


def describe(platform: str) -> str:
  """Returns a line on what `require` does on a platform, such as 'gpu', and what it costs."""
  if platform == 'gpu':
    return (f'deterministic: XLA_FLAGS has {_FLAG}=true. Sums by atomic additions become slower ones, and kernels are '
            'not chosen by measuring, so that a step may take longer; compare tokens per second with and without')
  return f'deterministic: without effect on {platform}, where XLA computes the same bits at each start anyway'


def _is_installed(plugin: str) -> bool:
  try:
    return importlib.util.find_spec(plugin) is not None
  except ImportError:   # there are no plugins at all
    return False
