"""Attention, and the choice of the kernel that computes it. Shape legend: `transformer.py`."""
import functools
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm import sharding
from lm.models.kernels import AttentionDropout, AttentionScores, Visible, blockwise, cached

_CAUSAL = AttentionScores()


class Choice(NamedTuple):
  """A kernel, and why it is not the fused one of the platform; the reason is empty where it is, or where there is none.
  """
  kernel: Callable[..., jax.Array]
  reason: str = ''

  def __str__(self) -> str:
    return f'{self.kernel.__name__} attention' + (f', because {self.reason}' if self.reason else '')


def attend(q_BTNH: jax.Array, k: jax.Array, v: jax.Array, visible: Visible, scores: AttentionScores = _CAUSAL,
           sinks_N: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
  """Returns softmax(scores) v over the visible keys, [B, T, N, H]; each shard computes its own rows and heads.

  Where T is split, its parts are exchanged for parts of the heads, and back (DeepSpeed-Ulysses, Jacobs et al. 2023), so
  that each shard has all positions of its heads: masks, kernels and random bits are those without a split.

  Keys and values are [B, T, K, H], or, if `visible` has a start, those of a cache, [B, K, S, H]. The H of values may
  differ from that of keys. A cache that all heads share is replicated where heads are sharded. `sinks` are the scores
  of an additional key of each head, whose value is zero (Xiao et al. 2024). With a `key`, there is dropout, which is
  the same on any mesh.

  Raises:
    ValueError: T is split, and its mesh axes do not divide the heads.
  """
  drop, is_cached = None, visible.start is not None
  if key is not None and scores.dropout and not is_cached:
    indices = (sharding.constrain(jnp.arange(n), axis) for n, axis in zip(q_BTNH.shape[::2], 'BM'))
    drop = AttentionDropout(key, *indices)

  def local(q, k, v, visible, sinks, drop):
    kernel = cached if is_cached else chosen_kernel(q, k, v, visible, scores, sinks, drop)
    return kernel(q, k, v, visible, scores, sinks, drop)

  if sharding.spec('B') is None:
    return local(q_BTNH, k, v, visible, sinks_N, drop)
  q = q_BTNH
  if not is_cached:
    sharding.check('M', q.shape[2:3], 'the heads of attention')
    q, k, v = (sharding.constrain(x, 'B-MH') for x in (q, _enough_heads(k), _enough_heads(v)))
    sinks_N = None if sinks_N is None else sharding.constrain(sinks_N, 'M')
    bias = None if visible.bias_NTS is None else sharding.constrain(visible.bias_NTS, 'M--')
    rows = jax.tree.map(lambda x: sharding.constrain(x, 'B-'), visible._replace(bias_NTS=None))
    visible = rows._replace(bias_NTS=bias)
  local = sharding.per_device(local, jax.typeof(q).sharding.spec, check_vma=False)
  return sharding.constrain(local(q, k, v, visible, sinks_N, drop), 'BTNH')


def _enough_heads(x_BSKH: jax.Array) -> jax.Array:
  """Returns keys or values with each head repeated, as often as needed for every shard to have those of its queries.
  """
  heads, shards = x_BSKH.shape[2], sharding.parts('M')
  if heads % shards == 0:
    return x_BSKH
  repeats = math.lcm(heads, shards) // heads
  shape = (*x_BSKH.shape[:3], repeats, x_BSKH.shape[3])
  return sharding.merge_axes(jnp.broadcast_to(x_BSKH[:, :, :, None], shape), 2)


def chosen_kernel(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible, scores: AttentionScores,
                  sinks_N: jax.Array | None, drop: AttentionDropout | None) -> Callable[..., jax.Array]:
  """Returns the kernel for the platform that the program is for.

  Process 0 prints each choice once, where the platform has more kernels than one. Initialisation, which applies the
  model to a single token, prints none.
  """
  choice = choose(sharding.platform(), q_BTNH, k_BSKH, v_BSKH, visible, scores, sinks_N, drop)
  if choice != Choice(blockwise) and q_BTNH.shape[1] > 1 and jax.process_index() == 0:
    _print(str(choice))
  return choice.kernel


@functools.cache
def _print(line: str) -> None:
  print(line, file=sys.stderr)


def choose(platform: str, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible,
           scores: AttentionScores, sinks_N: jax.Array | None = None, drop: AttentionDropout | None = None) -> Choice:
  """Returns the fastest kernel that computes exactly this attention, without a cache.

  All kernels are called as `kernel(q, k, v, visible, scores, sinks, drop)`. The choice depends on the platform, on
  shapes and dtypes, and on which restrictions there are, so abstract arrays will do.
  """
  fused = {'gpu': (cudnn, _cudnn_limits), 'cuda': (cudnn, _cudnn_limits), 'tpu': (splash, _splash_limits)}
  if platform not in fused:
    return Choice(blockwise)
  kernel, limits = fused[platform]
  conditions = {'it has no dropout of attention': drop is not None,
                'it has no bias of scores': visible.bias_NTS is not None,
                **limits(q_BTNH, k_BSKH, v_BSKH, visible, scores, sinks_N)}
  reasons = [reason for reason, applies in conditions.items() if applies]
  return Choice(blockwise, f'{kernel.__name__} does not fit: {"; ".join(reasons)}') if reasons else Choice(kernel)


def _cudnn_limits(q, k, v, visible, scores, sinks) -> dict[str, bool]:
  """Returns what cuDNN's attention, as JAX calls it, cannot compute, and whether it is required."""
  del visible
  largest = 256 if _compute_capability() >= 9 else 128
  return {
      f'it computes in bfloat16 or float16, not in {q.dtype}': q.dtype not in (jnp.bfloat16, jnp.float16),
      f'the size of its heads is a multiple of 8 up to {largest}, not {q.shape[-1]}':
          q.shape[-1] % 8 != 0 or q.shape[-1] > largest,
      f'its values are as long as its keys, not {v.shape[-1]} beside {k.shape[-1]}': v.shape[-1] != k.shape[-1],
      f'its lengths are even, not {q.shape[1]} and {k.shape[1]}': q.shape[1] % 2 != 0 or k.shape[1] % 2 != 0,
      'it has no softcap': scores.softcap is not None,
      'it has no sinks': sinks is not None}


def _compute_capability() -> float:
  """Returns the compute capability of the local GPU; 0 where the program is for another machine."""
  return min((float(getattr(device, 'compute_capability', 0)) for device in jax.local_devices()), default=0.)


def _needs_mask(q, k, visible: Visible, scores: AttentionScores) -> bool:
  """Returns whether cuDNN is given a mask [T, S], because its own causal mask and window do not express this one."""
  restrictions = visible.segments_BT, visible.bidirectional_BS, scores.chunk
  has_own = scores.causal and q.shape[1] == k.shape[1] or scores.window is None and not scores.causal
  return not has_own or any(restriction is not None for restriction in restrictions)


def cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible, scores: AttentionScores,
          sinks_N: jax.Array | None = None, drop: AttentionDropout | None = None) -> jax.Array:
  """Computes attention with cuDNN, on a GPU. It is quickest without a mask in memory."""
  del sinks_N, drop
  options = {'is_causal': scores.causal}
  if _needs_mask(q_BTNH, k_BSKH, visible, scores):
    options = {'mask': visible.mask(slice(0, q_BTNH.shape[1]), slice(0, k_BSKH.shape[1]), scores)}
  elif scores.window is not None:
    options['local_window_size'] = (scores.window - 1, 0)
  y = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, scale=scores.scale, implementation='cudnn', **options)
  return checkpoint_name(y, 'attended')


def _splash_limits(q, k, v, visible, scores, sinks) -> dict[str, bool]:
  """Returns what splash attention cannot compute, and whether it is required."""
  del v, sinks
  return {
      f'it computes in bfloat16 or float32, not in {q.dtype}': q.dtype not in (jnp.bfloat16, jnp.float32),
      f'its lengths are multiples of 128, not {q.shape[1]} and {k.shape[1]}':
          q.shape[1] % 128 != 0 or k.shape[1] % 128 != 0,
      f'with a causal mask or a window, there are as many keys as queries, not {k.shape[1]} and {q.shape[1]}':
          k.shape[1] != q.shape[1] and (scores.causal or scores.window is not None),   # a query would see no key
      'its mask is known when it is compiled, and bidirectional tokens are not': visible.bidirectional_BS is not None,
      'its mask is known when it is compiled, and chunks of positions are not': scores.chunk is not None}


def splash(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible, scores: AttentionScores,
           sinks_N: jax.Array | None = None, drop: AttentionDropout | None = None, interpret: bool = False
           ) -> jax.Array:
  """Computes attention with JAX's kernel for TPU, which skips blocks that its mask hides. `interpret` runs it on CPU.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  del drop
  shape = q_BTNH.shape[1], k_BSKH.shape[1]
  window = None if scores.window is None else scores.window - 1
  if scores.window is not None:
    mask = masks.LocalMask(shape, (window, 0 if scores.causal else window), 0)
  else:
    mask = masks.CausalMask(shape) if scores.causal else masks.FullMask(shape)
  queries, keys = (next(size for size in (512, 256, 128) if length % size == 0) for length in shape)
  blocks = splash_kernel.BlockSizes(queries, keys, keys, queries, keys, keys, queries, keys)
  kernel = splash_kernel.make_splash_mha(
      masks.MultiHeadMask([mask] * q_BTNH.shape[2]), block_sizes=blocks, attn_logits_soft_cap=scores.softcap,
      head_shards=1, q_seq_shards=1, residual_checkpoint_name='attended', interpret=interpret)
  segments = None
  if visible.segments_BT is not None:
    segments = splash_kernel.SegmentIds(visible.segments_BT, visible.key_segments_BS)
  scale = q_BTNH.shape[-1] ** -0.5 if scores.scale is None else scores.scale
  q_BNTH, k_BKSH, v_BKSH = ((q_BTNH * scale).astype(q_BTNH.dtype).swapaxes(1, 2), k_BSKH.swapaxes(1, 2),
                            v_BSKH.swapaxes(1, 2))
  y_BNTH = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q_BNTH, k_BKSH, v_BKSH, segments, sinks_N)
  return y_BNTH.swapaxes(1, 2)
