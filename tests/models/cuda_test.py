"""Programs for GPUs, lowered without one: attention is cuDNN's, on every shard."""
import re

import jax
import jax.numpy as jnp
from helpers.meshes import mesh_of
from jax._src.cudnn import fused_attention_stablehlo
from models.tpu_test import gradient, tiny

from lm import sharding


def test_a_model_is_lowered_with_the_kernel_of_cudnn_on_every_shard(monkeypatch):
  """JAX asks cuDNN for its version and the GPU for its capability, neither of which this machine has."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_compute_capability', lambda capability: True)
  monkeypatch.setattr(sharding, 'platform', lambda: 'cuda')
  with jax.set_mesh(mesh := mesh_of('fsdp:4,tensor:2')):
    text = gradient(tiny(dtype=jnp.bfloat16), mesh).lower(lowering_platforms=('cuda',)).as_text()
  calls = re.findall(r'@__cudnn\$\w+.*', text)
  assert any('Backward' in call for call in calls) and any('Backward' not in call for call in calls)
  assert all('tensor<2x256x2x16xbf16>' in call for call in calls), calls   # rows and heads of one shard
