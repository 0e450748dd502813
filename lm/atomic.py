"""Files that are there whole, or as they were before."""
import os
import pathlib


def write(path: pathlib.Path, text: str) -> None:
  """Puts `text` in place of a file, such that a kill or a full disk at any moment leaves the old one or the new one."""
  new = path.with_name(f'{path.name}.{os.getpid()}.new')
  with open(new, 'w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(new, path)
