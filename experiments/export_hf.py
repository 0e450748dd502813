"""Exports a run or an imported model as a folder that `transformers` opens.

  python experiments/export_hf.py --workdir=runs/books --out=models/books-hf
"""
import pathlib
from typing import Literal

import jax

from lm import launch, load, sharding
from lm.hf import pretrained
from lm.models.reward import Reward


def main(*, workdir: pathlib.Path | None = None, model: str | None = None, out: pathlib.Path,
         dtype: Literal['float32', 'bfloat16', 'float16'] | None = None, like: pathlib.Path | None = None,
         best: bool = False) -> None:
  """Exports a model with its tokenizer.

  Args:
    workdir: workdir of a run.
    model: an imported folder, or the workdir of a run, in place of --workdir.
    out: folder to create.
    dtype: dtype of the weights; by default that of the parameters, float32 for a run.
    like: Hugging Face folder whose family, tokenizer files and generation config are used; by default the folder that
      the run was started from.
    best: use the best checkpoint by the metric of the run, mostly the validation loss, instead of the newest.
  """
  if (workdir is None) == (model is None):
    raise ValueError('give one of --workdir and --model')
  workdir, model = load.run_or_model(workdir, model, best)
  with jax.set_mesh(sharding.make_mesh()):
    loaded = pretrained.load(model) if model else load.open_trained(workdir, best)
    if isinstance(loaded.model, Reward):
      raise ValueError(f'{workdir} is a reward model, which cannot be exported: transformers has no family-independent '
                       'class for a decoder with one score a text and the template that the score depends on. Use its '
                       'workdir with score.py or with generate.py --reward')
    like = like or (loaded.folder if model else load.origin_folder(loaded.run, loaded.tokenizer))
    pretrained.write(out, loaded.model, loaded.params, loaded.tokenizer, dtype and jax.numpy.dtype(dtype), like,
                     None if model else loaded.run.data.template)
  print(f'written: {out}; open it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})')


if __name__ == '__main__':
  launch.tool(main)
