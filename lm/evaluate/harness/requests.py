"""Requests of lm-evaluation-harness: how they are generated, and the order and groups in which they are answered."""
import collections
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm.generate.sampling import Sampling

MAX_TOKENS = 256   # that are written where a task does not say how many, as in the harness
_LENGTHS = 'max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens'   # the first that is there counts
_FIELDS = 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty'


class Writing(NamedTuple):
  """How the text of a request is written."""
  sampling: Sampling
  max_tokens: int
  stop: tuple[str, ...]


def writing(settings: Mapping[str, Any]) -> Writing:
  """Reads the generation settings of a task; without `do_sample`, a temperature above 0 samples.

  Raises ValueError, which names it, for a setting that is not obeyed here.
  """
  values = dict(settings)
  lengths = [values.pop(name, None) for name in _LENGTHS]
  max_tokens = int(next((length for length in lengths if length is not None), MAX_TOKENS))
  stop = values.pop('until', None) or []
  stop = [stop] if isinstance(stop, str) else stop
  sampled = values.pop('do_sample', None)
  if values.pop('num_beams', 1) != 1:
    raise ValueError(f'num_beams={settings["num_beams"]}: beams are not searched here; set num_beams to 1')
  chosen = {name: values.pop(name) for name in _FIELDS if values.get(name) is not None}
  unknown = [name for name, value in values.items() if value is not None]
  if unknown:
    raise ValueError(f'{unknown[0]}={values[unknown[0]]!r} of a task is not supported; supported are until, do_sample, '
                     f'{", ".join((*_FIELDS, *_LENGTHS))}')
  temperature = float(chosen.get('temperature', 1. if sampled else 0.))
  if sampled is False:
    temperature = 0.
  if max_tokens < 1:
    raise ValueError(f'max_gen_toks={max_tokens} of a task is below 1')
  return Writing(Sampling(**{**chosen, 'temperature': temperature}), max_tokens, tuple(text for text in stop if text))


class Item(NamedTuple):
  """A request that has no answer yet; equal requests are one item, unless their answers are drawn at random."""
  key: str
  args: tuple[Any, ...]
  copy: int   # the number of equal requests before it, whose answers are drawn apart


def keys(method: str, requests: Sequence[tuple[Any, ...]], is_drawn: Callable[[tuple[Any, ...]], bool]) -> list[Item]:
  """Returns an item for each request, whose key is that of its answer."""
  copies, items = collections.Counter(), []
  for args in requests:
    text = json.dumps([method, *args], sort_keys=True)
    copy = copies[text] if is_drawn(args) else 0
    copies[text] += 1
    items.append(Item(hashlib.sha256(f'{copy} {text}'.encode()).hexdigest(), args, copy))
  return items


def chunks(items: Sequence[Item], group: Callable[[Item], Any], size: int) -> Iterator[list[Item]]:
  """Yields items of one group at a time, at most `size`, those with the longest contexts first.

  So batches are alike in length, and items that share a context come together. `group` returns what can be compared.
  """
  groups = collections.defaultdict(list)
  for item in items:
    groups[group(item)].append(item)
  for _, members in sorted(groups.items()):
    members.sort(key=lambda item: (-len(item.args[0]), item.args[0]))
    for first in range(0, len(members), size):
      yield members[first:first + size]
