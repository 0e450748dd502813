"""Imports a Hugging Face model as a checkpoint, in its own dtype, from which experiments can start.

  python experiments/import_hf.py --model=Qwen/Qwen3-0.6B --out=models/qwen3
"""
import pathlib

import jax

from lm import launch, load, sharding
from lm.hf import pretrained


def main(*, model: str, out: pathlib.Path, mesh: str | None = None) -> None:
  """Imports a model.

  Args:
    model: a folder with config.json and safetensors, or an id on the hub.
    out: folder to create.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2, over which the parameters are sharded; none puts all
      devices on data.
  """
  if load.is_run(model):
    raise ValueError(f'--model={model} is the workdir of a run, which needs no import; to start from it, use '
                     f'pretrain.py --init={model}')
  with jax.set_mesh(sharding.make_mesh(mesh)):
    loaded = pretrained.save(model, out)
  size = sum(x.size for x in jax.tree.leaves(loaded.params))
  print(f'{size:,} parameters, {len(loaded.model.layers)} layers, {loaded.tokenizer.vocab_size:,} tokens: {out}\n'
        f'start from it: python experiments/pretrain.py --init={out} --text=... --workdir=...')


if __name__ == '__main__':
  launch.tool(main)
