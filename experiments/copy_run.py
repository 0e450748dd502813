"""Copies a run, or one of its checkpoints, to another folder or file system, where it opens and trains on.

  python experiments/copy_run.py --workdir=runs/books --out=/mnt/backup/books
  python experiments/copy_run.py --workdir=runs/books --out=gs://bucket/books --step=20_000

The same command continues a copy that was cut short, and brings an earlier copy up to date.
"""
from lm import launch
from lm.workdir import copying


def main(*, workdir: str, out: str, step: int | None = None) -> None:
  """Copies a run.

  Args:
    workdir: workdir of a run, or folder of an imported model; a path, or a URL.
    out: folder to create; a path, or a URL such as gs://bucket/folder.
    step: the only checkpoint to copy; none copies all.
  """
  copying.copy(workdir, out, step)
  print(f'copied: {out}; every byte was read back and compared')


if __name__ == '__main__':
  launch.tool(main)
