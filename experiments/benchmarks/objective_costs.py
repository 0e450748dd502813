"""What does an objective cost, compared with next-token prediction? A training step, and the making of examples.

  python experiments/benchmarks/objective_costs.py --shape=small --rounds=5

Costs are per token that the model reads. The objectives run in separate processes, which take turns; medians are
printed. Use the machine for nothing else meanwhile. Linux only. To add an objective, add a line to `rows`.
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

BATCHES = 4   # number of batches that training steps use in turn


@dataclasses.dataclass(frozen=True)
class Row:
  """An objective with its model.

  Args:
    objective: the objective.
    model: the model that it trains.
    constants: constants of the run, such as a teacher.
    columns: dtype and further axes of the stored columns that it reads, as in `annotate.Annotated`. They are zeros.
    source_length: positions of the source, for an encoder-decoder.
  """
  objective: Any
  model: Any
  constants: tuple[Any, ...] = ()
  columns: Mapping[str, tuple[Any, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
  source_length: int | None = None


def rows(shape: Shape) -> dict[str, Row]:
  """Returns the objectives by name. The others are compared with the first."""
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
  """Documents as records of `kind`: dialogues whose second half is learned, or pairs, or rated dialogues of these."""

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
    dialogue = self._dialogue(i)
    if self._kind is Pair:
      return Pair(dialogue, dialogue)
    if self._kind is Rated:
      return Rated(dialogue, i % 2 == 0, dialogue)
    return dialogue


def batches_of(row: Row, shape: Shape) -> Any:
  """Returns a function from a step to its batch."""
  import numpy as np

  from lm.data.batch import Special
  from lm.data.rows.packed_documents import Stream
  from lm.data.rows.packed_records import Packed
  objective, store = row.objective, documents(shape.vocab)
  special = Special(1, 2, shape.vocab, tuple(range(3, 3 + len(objective.control))))
  if objective.needs is np.ndarray:
    return Stream(objective, special, shape.length, shape.batch, source_length=row.source_length, store=store)
  records = Records(objective.needs, store, shape.length)
  return Packed(objective, special, shape.length, shape.batch, source_length=row.source_length, records=records)


def count_tokens(batch: Any) -> int:
  """Returns the number of tokens that the model reads, with those of a source: all positions except padding."""
  return sum(int((x > 0).sum()) for x in (batch.segments, batch.source_segments) if x is not None)


def making(name: str, shape: Shape) -> Prepared:
  """An arm that makes examples, on one core."""
  batches, steps = batches_of(rows(shape)[name], shape), itertools.count()
  count = statistics.mean(count_tokens(batches(step)) for step in range(BATCHES))
  return lambda: batches(next(steps)) and None, {'units': count}


def training(name: str, shape: Shape) -> Prepared:
  """An arm that takes training steps, on batches in memory."""
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
  stored = {name: np.zeros((shape.batch, shape.length, *axes), dtype) for name, (dtype, axes) in row.columns.items()}
  sharded = [sharding.shard_rows(batch._replace(columns={**(batch.columns or {}), **stored} or None),
                                 jax.sharding.get_mesh()) for batch in batches]
  state, loaded, steps = jax.jit(lambda: train.init(run))(), train.load_constants(run), itertools.count()
  start = time.perf_counter()
  step = train.make_step(run).lower(state, sharded[0], loaded).compile()
  facts = {'compile': time.perf_counter() - start, 'temp': step.memory_analysis().temp_size_in_bytes / 1e9,
           'units': statistics.mean(map(count_tokens, batches))}

  def go():
    nonlocal state
    state, metrics = step(state, sharded[next(steps) % BATCHES], loaded)
    return float(metrics['loss'])   # waits for the step
  return go, facts


def main(*, only: list[str] = (), shape: Literal['tiny', 'small', 'large'] = 'small', rounds: int = 5,
         steps: int = 4) -> None:
  """Prints a table.

  Args:
    only: objectives to measure besides next_token; by default all.
    shape: size of the model, gpt2 with 2, 6 or 12 layers.
    rounds: number of rounds.
    steps: training steps in a round, a multiple of 4, because 4 batches are used in turn.
  """
  if rounds < 1 or steps < 1 or steps % BATCHES:
    raise ValueError(f'--rounds={rounds} must be 1 or more, and --steps={steps} a multiple of {BATCHES}')
  size = SHAPES[shape]
  first, *others = rows(size)
  if unknown := [name for name in only if name not in (first, *others)]:
    raise ValueError(f'--only={unknown[0]} is not an objective of the table; choose from '
                     f'{", ".join((first, *others))}')
  names = [first, *(name for name in others if name in only or not only)]
  trained = take_turns(training, names, size, rounds, steps)
  making_results = take_turns(making, names, size, rounds, 25 * steps)
  print(f'{shape}, {rounds} rounds of {steps} steps of {size.batch} x {size.length} positions\n\n'
        'objective              read  tokens/s   cost (of rounds)  temp GB  compile s   examples: tokens/s, one core')
  for name in names:
    (seconds, facts), (making_seconds, _) = trained[name], making_results[name]
    costs = sorted(mine / base for mine, base in zip(seconds, trained[first][0]))
    print(f'{name:21}{facts["units"] / size.batch / size.length:6.0%}{1 / statistics.median(seconds):10,.0f}'
          f'{statistics.median(costs):7.2f} ({costs[0]:.2f}..{costs[-1]:.2f}){facts["temp"]:9.2f}'
          f'{facts["compile"]:11.1f}{1 / statistics.median(making_seconds):31,.0f}', flush=True)


if __name__ == '__main__':
  launch.tool(main)
