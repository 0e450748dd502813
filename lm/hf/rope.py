"""Reads rotary positions from a config.json, and writes them.

They are in the field `rope_parameters`, or in `rope_theta` and `rope_scaling` of older files.
"""
import math
from typing import Any

import numpy as np

from lm.hf.config import TYPES, Config
from lm.models import rotary


def _scaling(r: Config, rope_type: str, original: int, max_length: int, size: int) -> rotary.Scaling | None:
  """Returns the scaling of rotary positions that the parameters `r` describe."""
  match rope_type:
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
      rotations = r.get('beta_fast', float, 32.), r.get('beta_slow', float, 1.)
      return rotary.Yarn(factor, original, r.get('attention_factor', float, attention), *rotations,
                         r.get('truncate', bool, True))
    case 'longrope':
      factor = r.get('factor', float, max_length / original)
      attention = longrope_attention(factor, original)
      short, long = (tuple(map(float, r.get(name, list))) for name in ('short_factor', 'long_factor'))
      if not len(short) == len(long) == size // 2:
        r.refuse('short_factor', f'{len(short)} and {len(long)} factors', f'{size // 2} of each')
      return rotary.LongRope(short, long, original, r.get('attention_factor', float, attention))
    case _:
      return r.refuse('rope_type', rope_type, 'default, linear, llama3, yarn or longrope')


def longrope_attention(factor: float, original: int) -> float:
  """Returns LongRoPE's factor of attention, for files that do not have it."""
  return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.


def rope(c: Config, max_length: int, head_size: int, theta: float = 10_000., kind: str | None = None,
         interleaved: bool = False, part: float | None = None) -> rotary.Rotary:
  """Returns rotary positions from `rope_parameters`, or from `rope_theta` and `rope_scaling` of older files.

  `kind` is the type of layer, if the parameters differ by it; older files scale only 'full_attention'. `part` is the
  default of the share of a head that is rotated; None for families that rotate all of it.

  Raises ValueError if a file has both forms, and they differ.
  """
  r, full = c.inner('rope_parameters'), kind != TYPES[1]
  older = c.inner('rope_scaling') if full else None
  if full:
    theta = c.get('rope_theta', float, theta)
  if r is not None and kind is not None:
    types = {name: r.inner(name) for name in TYPES}
    r.finish()
    r = types[kind]
  descriptions = [x for x in (r, older) if x is not None] or [Config({})]
  first, *others = (_rotary(c, x, max_length, head_size, theta, interleaved, part) for x in descriptions)
  if any(other != first for other in others):
    c.refuse('rope_scaling', c.get('rope_scaling', dict), f'what rope_parameters={c.get("rope_parameters", dict)} says')
  return first


def _rotary(c: Config, r: Config, max_length: int, head_size: int, theta: float, interleaved: bool, part: float | None
            ) -> rotary.Rotary:
  """Returns the rotary positions of the parameters `r`; fields that they lack are read from the config `c`."""
  theta = r.get('rope_theta', float, theta)
  rope_type = r.get('rope_type', str, None) or r.get('type', str, 'default')
  r.only('type', rope_type)
  if part is None:
    c.only('partial_rotary_factor', 1., 1)
    r.only('partial_rotary_factor', 1., 1)
  part = r.get('partial_rotary_factor', float, c.get('partial_rotary_factor', float, part or 1.))
  size = int(head_size * part)
  if size < 2 or size % 2:
    c.refuse('partial_rotary_factor', part, f'an even number of the {head_size} entries of a head')
  # In Phi 3, this field is outside of the parameters, and takes precedence.
  original = c.size('original_max_position_embeddings', r.size('original_max_position_embeddings', max_length))
  try:
    scaling = _scaling(r, rope_type, original, max_length, size)
  except ArithmeticError as error:
    raise ValueError(f'rope_parameters do not add up to {rope_type} scaling: {error}') from None
  r.finish()
  result = rotary.Rotary(theta, None if size == head_size else size, interleaved, scaling)
  if not (size < 2 ** 16 and theta > 0 and _is_finite(result, size)):
    c.refuse('rope_parameters', parameters(result, head_size), 'finite frequencies, and a head size below 65,536')
  return result


def _is_finite(candidate: rotary.Rotary, size: int) -> bool:
  """Returns whether all frequencies are finite."""
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
  if values['rope_type'] == 'longrope':   # it is read from outside of `rope_scaling`
    fields['original_max_position_embeddings'] = values['original_max_position_embeddings']
  return fields


def _older_scaling(values: dict[str, Any]) -> dict[str, Any] | None:
  outside = 'rope_theta', 'partial_rotary_factor'
  return None if values['rope_type'] == 'default' else {k: v for k, v in values.items() if k not in outside}


def typed_rope_config(model: Any, local: str = 'rope_theta') -> dict[str, Any]:
  """Returns `rope_parameters` by type of layer, and the older fields if these can express the same.

  They cannot if layers with windows are scaled. `local` is the older name of the theta of layers with windows.
  """
  types = {TYPES[a.scores.window is not None]: parameters(a.rotary, a.head_size)
           for a in (block.attention for block in model.layers)}
  full = types.get(TYPES[0]) or types[TYPES[1]]
  windowed = types.get(TYPES[1]) or {**full, 'rope_type': 'default'}   # if no layer has a window
  thetas = {local: windowed['rope_theta']} | {'rope_theta': full['rope_theta']}
  if windowed['rope_type'] != 'default' or thetas[local] != windowed['rope_theta']:
    return {'rope_parameters': types}
  return {'rope_parameters': types, **thetas, 'rope_scaling': _older_scaling(full)}
