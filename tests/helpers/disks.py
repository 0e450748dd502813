"""A full disk."""
import contextlib
import resource


@contextlib.contextmanager
def files_of(size: int):
  """Limits every file to `size` bytes while the context is open: a larger write fails in the kernel, as on a full disk.
  """
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
