"""Rotary positions in a config.json, both ways: `rope_parameters`, or `rope_theta` and `rope_scaling` as older files
have it."""
import math
from typing import Any

import numpy as np

from lm.hf.config import TYPES, Config
from lm.models import rotary


def _scaling(r: Config, named: str, original: int, max_length: int, size: int) -> rotary.Scaling | None:
  """The scaling of rotary positions that `rope_parameters` has."""
  match named:
    case 'default':
      return None
    case 'linear':
      return rotary.Linear(r.get('factor', float))
    case 'llama3':
      return rotary.Llama3(r.get('factor', float), r.get('low_freq_factor', float),
                           r.get('high_freq_factor', float), original)
    case 'yarn':
      factor = r.get('factor', float, max_length / original)
      scales = r.get('mscale', float, 0.), r.get('mscale_all_dim', float, 0.)
      attention = mscale(factor, scales[0]) / mscale(factor, scales[1]) if all(scales) else mscale(factor, 1.)
      turns = r.get('beta_fast', float, 32.), r.get('beta_slow', float, 1.)
      return rotary.Yarn(factor, original, r.get('attention_factor', float, attention), *turns,
                         r.get('truncate', bool, True))
    case 'longrope':
      factor = r.get('factor', float, max_length / original)
      attention = longrope_attention(factor, original)
      short, long = (tuple(map(float, r.get(name, list))) for name in ('short_factor', 'long_factor'))
      if not len(short) == len(long) == size // 2:
        r.refuse('short_factor', f'{len(short)} and {len(long)} factors', f'{size // 2} of each')
      return rotary.LongRope(short, long, original, r.get('attention_factor', float, attention))
    case _:
      return r.refuse('rope_type', named, 'default, linear, llama3, yarn or longrope')


def longrope_attention(factor: float, original: int) -> float:
  """How much LongRoPE raises attention where a file does not say it."""
  return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.


def rope(c: Config, max_length: int, head_size: int, theta: float = 10_000., kind: str | None = None,
         interleaved: bool = False, part: float | None = None) -> rotary.Rotary:
  """Rotary positions from `rope_parameters`, or from `rope_theta` and `rope_scaling` as older files have it.

  `kind` chooses where the parameters differ by type of layer, of which older files scale 'full_attention' alone.
  `part` is of a head, which turns, by default; None for families that turn all of it.

  Raises ValueError where a file has both, and they differ.
  """
  r, full = c.inner('rope_parameters'), kind != TYPES[1]
  older = c.inner('rope_scaling') if full else None
  if full:
    theta = c.get('rope_theta', float, theta)
  if r is not None and kind is not None:
    types = {name: r.inner(name) for name in TYPES}
    r.finish()
    r = types[kind]
  turn, *others = (_rotary(c, x, max_length, head_size, theta, interleaved, part)
                   for x in ([x for x in (r, older) if x is not None] or [Config({})]))
  if any(other != turn for other in others):
    c.refuse('rope_scaling', c.get('rope_scaling', dict), f'what rope_parameters={c.get("rope_parameters", dict)} says')
  return turn


def _rotary(c: Config, r: Config, max_length: int, head_size: int, theta: float, interleaved: bool, part: float | None
            ) -> rotary.Rotary:
  """What the parameters `r` say, and where they say nothing `c`."""
  theta = r.get('rope_theta', float, theta)
  named = r.get('rope_type', str, None) or r.get('type', str, 'default')
  r.only('type', named)
  if part is None:
    c.only('partial_rotary_factor', 1., 1)
    r.only('partial_rotary_factor', 1., 1)
  part = r.get('partial_rotary_factor', float, c.get('partial_rotary_factor', float, part or 1.))
  size = int(head_size * part)
  if size < 2 or size % 2:
    c.refuse('partial_rotary_factor', part, f'an even number of the {head_size} entries of a head')
  # Phi 3 has it outside too, and that is what counts.
  original = c.size('original_max_position_embeddings', r.size('original_max_position_embeddings', max_length))
  try:
    scaling = _scaling(r, named, original, max_length, size)
  except ArithmeticError as error:
    raise ValueError(f'rope_parameters do not add up to {named} scaling: {error}') from None
  r.finish()
  turn = rotary.Rotary(theta, None if size == head_size else size, interleaved, scaling)
  if not (size < 2 ** 16 and theta > 0 and _finite(turn, size)):
    c.refuse('rope_parameters', parameters(turn, head_size), 'finite frequencies, and a head size below 65,536')
  return turn


def _finite(candidate: rotary.Rotary, size: int) -> bool:
  try:
    with np.errstate(all='ignore'):
      return bool(np.isfinite(candidate.frequencies(size)).all())
  except (ArithmeticError, ValueError):
    return False


def mscale(factor: float, scale: float) -> float:
  """Returns the factor by which YaRN raises attention scores."""
  return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.


def parameters(r: rotary.Rotary, head_size: int) -> dict[str, Any]:
  """Returns `rope_parameters` for rotary positions."""
  values: dict[str, Any] = {'rope_theta': r.theta, 'rope_type': 'default'}
  if r.size is not None:
    values['partial_rotary_factor'] = r.size / head_size
  match r.scaling:
    case rotary.Linear(factor):
      values |= {'rope_type': 'linear', 'factor': factor}
    case rotary.Llama3(factor, low, high, original):
      values |= {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': low, 'high_freq_factor': high,
                'original_max_position_embeddings': original}
    case rotary.Yarn(factor, original, attention, fast, slow, truncate):
      values |= {'rope_type': 'yarn', 'factor': factor, 'original_max_position_embeddings': original,
                'attention_factor': attention, 'beta_fast': fast, 'beta_slow': slow, 'truncate': truncate}
    case rotary.LongRope(short, long, original, attention):
      values |= {'rope_type': 'longrope', 'short_factor': list(short), 'long_factor': list(long),
                'original_max_position_embeddings': original, 'attention_factor': attention}
  return values


def rope_config(r: rotary.Rotary, head_size: int) -> dict[str, Any]:
  """Returns `rope_parameters`, and the fields that transformers before version 5 reads instead."""
  return older_fields(parameters(r, head_size))


def older_fields(values: dict[str, Any]) -> dict[str, Any]:
  """Returns `values` as `rope_parameters`, and under the older names of its fields."""
  fields = {'rope_parameters': values, 'rope_theta': values['rope_theta'], 'rope_scaling': _older_scaling(values)}
  if 'partial_rotary_factor' in values:
    fields['partial_rotary_factor'] = values['partial_rotary_factor']
  if values['rope_type'] == 'longrope':   # readers look for it outside of `rope_scaling`
    fields['original_max_position_embeddings'] = values['original_max_position_embeddings']
  return fields


def _older_scaling(values: dict[str, Any]) -> dict[str, Any] | None:
  outside = 'rope_theta', 'partial_rotary_factor'
  return None if values['rope_type'] == 'default' else {k: v for k, v in values.items() if k not in outside}


def typed_rope_config(model: Any, local: str = 'rope_theta') -> dict[str, Any]:
  """`rope_parameters` by type of layer, and older fields where these can say it: no scaling within windows.

  `local` is the older name of theta within windows.
  """
  types = {TYPES[a.scores.window is not None]: parameters(a.rotary, a.head_size)
           for a in (block.attention for block in model.layers)}
  full = types.get(TYPES[0]) or types[TYPES[1]]
  windowed = types.get(TYPES[1]) or {**full, 'rope_type': 'default'}   # which no layer has
  thetas = {local: windowed['rope_theta']} | {'rope_theta': full['rope_theta']}
  if windowed['rope_type'] != 'default' or thetas[local] != windowed['rope_theta']:
    return {'rope_parameters': types}
  return {'rope_parameters': types, **thetas, 'rope_scaling': _older_scaling(full)}
