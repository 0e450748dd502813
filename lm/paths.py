"""Paths of files and folders, which lie on a mounted file system."""
import os
import pathlib
import re

_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')   # pathlib makes one slash of two


class Remote(ValueError):
  """A URL is given in place of a path."""


def local(text: str | os.PathLike) -> pathlib.Path:
  """Returns the path that a text names. Raises Remote for a URL, such as `gs://bucket/run`, with what to mount."""
  text = str(text)
  if _URL.match(text):
    raise Remote(f'{text} is a URL, and a path of a mounted file system is needed: mount the storage (gcsfuse mounts '
                 'buckets of gs://, mount-s3 those of s3://) and give the path there; copy_run.py copies a run to '
                 'a URL and back')
  return pathlib.Path(os.path.expanduser(text))   # pathlib raises RuntimeError for a user that does not exist
