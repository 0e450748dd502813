"""What does an objective cost, beside next-token prediction? A training step by token seen, and the making of examples.

  python experiments/benchmarks/objective_costs.py --shape=small --rounds=5

Each objective is a process of its own; they take turns, in both orders, and medians count. Leave the machine alone
meanwhile. For Linux. An objective more is a line in `rows`.
"""
import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any, Literal

from interleaved import SHAPES, Prepared, Shape, documents, take_turns

from lm import launch  # nothing heavy here: it counts in the start-up time of each process

BATCHES = 4   # different ones, that a step of training takes in turn


@dataclasses.dataclass(frozen=True)
class Row:
  """An objective, and what it needs beside documents and the decoder `model`.

  `columns` are those that data would have stored, as in `annotate.Annotated`; they are zeros here.
  """
  objective: Any
  model: Any
  constants: tuple[Any, ...] = ()
  columns: Mapping[str, tuple[Any, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
  source_length: int | None = None


def rows(shape: Shape) -> dict[str, Row]:
  """The table, by name; the first is what the others are compared with."""
  from lm import train
  from lm.data.tokenizers.folder import sentinels
  from lm.models import prediction_heads as further
  from lm.models import transformer
  from lm.objectives import (
      diffusion,
      infill,
      masked,
      multi_token,
      next_token,
      preference,
      prefix,
      supervised,
      ul2,
      unlikelihood,
  )
  from lm.objectives import span_corruption as spans
  from lm.objectives.distillation import TopK, distil, distil_stored
  decoder, top_k = transformer.gpt2(*shape[:4], shape.length), TopK(min(32, shape.vocab), shape.vocab)
  teacher, plain = train.Constants('teacher', decoder, None), next_token.next_token()   # it is as large as the student
  marks = {'layout': spans.DECODER, 'sentinels': sentinels(max(32, shape.length // 4))}
  return {
      'next_token': Row(plain, decoder),
      'prefix': Row(prefix.prefix(), decoder),
      'masked': Row(masked.masked(), decoder),
      'span_corruption': Row(spans.span_corruption(**marks), decoder),
      'ul2': Row(ul2.ul2(**marks), decoder),
      'infill': Row(infill.infill(), decoder),
      'diffusion': Row(diffusion.masked_diffusion(), decoder),
      'multi_token': Row(multi_token.multi_token(plain), further.sequential(decoder, 1)),
      'unlikelihood': Row(unlikelihood.unlikelihood(plain), decoder),
      'supervised': Row(supervised.supervised(), decoder),
      'dpo': Row(preference.preference(preference.dpo()), decoder, columns=preference.COLUMNS),
      'kto': Row(preference.kto(), decoder, columns=preference.COLUMNS),
      'distillation': Row(distil(plain, decoder.apply), decoder, (teacher,)),
      'distillation_stored': Row(distil_stored(plain, top_k), decoder, columns=top_k.columns),
  }


class Records:
  """Documents as dialogues, the second half of each asked for; as pairs, or rated, where an objective needs those."""

  def __init__(self, kind: type, store: Any, longest: int):
    import numpy as np

    from lm.data.batch import Dialogue
    self._kind, self._starts = kind, store.offsets[:-1]
    self._sizes = np.maximum(np.minimum(np.diff(store.offsets), longest // 2), 2)
    self._dialogue = lambda i: Dialogue(
        np.resize(store.tokens[self._starts[i]:][:self._sizes[i]], self._sizes[i]).astype(np.int32),
        np.arange(self._sizes[i]) >= self._sizes[i] // 2)
    self.positions = (self._sizes - 1) * (1 if kind is Dialogue else 2)

  def __len__(self) -> int:
    return len(self._sizes)

  def __getitem__(self, i: int) -> Any:
    from lm.data.batch import Pair, Rated
    one = self._dialogue(i)
    return {Pair: lambda: Pair(one, one), Rated: lambda: Rated(one, i % 2 == 0, one)}.get(self._kind, lambda: one)()


def batches_of(row: Row, shape: Shape) -> Any:
  import numpy as np

  from lm.data.batch import Special
  from lm.data.rows.packed_documents import Stream
  from lm.data.rows.packed_records import Packed
  objective, store = row.objective, documents(shape.vocab)
  special = Special(1, 2, shape.vocab, tuple(range(3, 3 + len(objective.control))))
  data = {'store': store} if objective.needs is np.ndarray else {
      'records': Records(objective.needs, store, shape.length)}
  kind = Stream if objective.needs is np.ndarray else Packed
  return kind(objective, special, shape.length, shape.batch, source_length=row.source_length, **data)


def seen(batch: Any) -> int:
  """Tokens that a model reads, of a source too: all positions but padding."""
  return sum(int((x > 0).sum()) for x in (batch.segments, batch.source_segments) if x is not None)


def making(name: str, shape: Shape) -> Prepared:
  """Makes examples, on one core."""
  batches, steps = batches_of(rows(shape)[name], shape), itertools.count()
  count = statistics.mean(seen(batches(step)) for step in range(BATCHES))
  return lambda: batches(next(steps)) and None, {'seen': count}


def training(name: str, shape: Shape) -> Prepared:
  """Takes steps on batches that are there."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax
  import numpy as np

  from lm import optim, sharding, train
  jax.set_mesh(sharding.make_mesh())
  row, load = rows(shape)[name], lambda model: jax.jit(model.init)(jax.random.key(1))
  constants = tuple(dataclasses.replace(constant, load=load) for constant in row.constants)
  run = train.Run(row.model, row.objective, None, optim.adamw(lambda step: 1e-3), steps=1, batch=shape.batch,
                  constants=constants)
  batches = [batches_of(row, shape)(step) for step in range(BATCHES)]
  stored = {name: np.zeros((shape.batch, shape.length, *more), dtype) for name, (dtype, more) in row.columns.items()}
  held = [sharding.shard_rows(batch._replace(columns={**(batch.columns or {}), **stored} or None),
                              jax.sharding.get_mesh()) for batch in batches]
  state, loaded, steps = jax.jit(lambda: train.init(run))(), train.load_constants(run), itertools.count()
  start = time.perf_counter()
  step = train.make_step(run).lower(state, held[0], loaded).compile()
  facts = {'compile': time.perf_counter() - start, 'temp': step.memory_analysis().temp_size_in_bytes / 1e9,
           'seen': statistics.mean(map(seen, batches))}

  def go():
    nonlocal state
    state, metrics = step(state, held[next(steps) % BATCHES], loaded)
    return float(metrics['loss'])   # waits for the step
  return go, facts


def main(*, only: list[str] = (), shape: Literal['tiny', 'small', 'large'] = 'small', rounds: int = 5,
         steps: int = 4) -> None:
  """Prints a table.

  Args:
    only: these objectives, beside next_token; none for all.
    steps: of training, a round; 4 batches are taken in turn.
  """
  if rounds < 1 or steps < 1 or steps % BATCHES:
    raise ValueError(f'--rounds={rounds} must be 1 or more, and --steps={steps} a multiple of {BATCHES}')
  size = SHAPES[shape]
  first, *others = rows(size)
  if unknown := [name for name in only if name not in (first, *others)]:
    raise ValueError(f'--only={unknown[0]} is none of {", ".join((first, *others))}')
  names = [first, *(name for name in others if name in only or not only)]
  trained = take_turns(training, names, size, rounds, steps)
  made = take_turns(making, names, size, rounds, 25 * steps)
  print(f'{shape}, {rounds} rounds of {steps} steps of {size.batch} x {size.length} positions\n\n'
        'objective              seen  tokens/s   cost (of rounds)  temp GB  compile s   examples: tokens/s, one core')
  for name in names:
    (seconds, facts), (making_seconds, _) = trained[name], made[name]
    costs = sorted(mine / base for mine, base in zip(seconds, trained[first][0]))
    print(f'{name:21}{facts["seen"] / size.batch / size.length:6.0%}{1 / statistics.median(seconds):10,.0f}'
          f'{statistics.median(costs):7.2f} ({costs[0]:.2f}..{costs[-1]:.2f}){facts["temp"]:9.2f}'
          f'{facts["compile"]:11.1f}{1 / statistics.median(making_seconds):31,.0f}', flush=True)


if __name__ == '__main__':
  launch.tool(main)
