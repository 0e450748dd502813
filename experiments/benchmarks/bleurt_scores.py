"""How fast does BLEURT score pairs of texts, compared with `transformers` on the same weights, on this CPU?

  python experiments/benchmarks/bleurt_scores.py

The model is random and made on the spot: BERT with a regression head, 4 layers of width 512, float32. Pairs have 16 to
256 tokens. `transformers` gets them sorted by length, in padded batches. Use the machine for nothing else meanwhile.
Linux only. Install PyTorch and transformers with pip install 'lm[benchmark]'.
"""
import pathlib
import tempfile
from typing import Any

import interleaved
from interleaved import Prepared

from lm import launch  # nothing slow here: the imports of an arm count in its memory and its start-up time

VOCAB, LENGTH = 16_384, 256
CONFIG = {'vocab_size': VOCAB, 'hidden_size': 512, 'num_hidden_layers': 4, 'num_attention_heads': 8,
          'intermediate_size': 2048, 'max_position_embeddings': LENGTH, 'hidden_act': 'gelu_new', 'num_labels': 1}


def pairs(number: int) -> list[tuple[Any, Any]]:
  """Returns the tokens of references and candidates, int32 [T] each, with separators."""
  import numpy as np
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(4., 0.6, number), 16, LENGTH).astype(int)
  return [(rng.integers(5, VOCAB, n // 2).astype('i4'), rng.integers(5, VOCAB, n - n // 2).astype('i4'))
          for n in lengths]


def write_model(folder: pathlib.Path) -> None:
  """Writes a random model, as `transformers` does."""
  transformers = interleaved.transformers_library()
  config = transformers.BertConfig(**CONFIG)
  transformers.BertForSequenceClassification(config).save_pretrained(folder)


def ours(folder: pathlib.Path, number: int) -> Prepared:
  """An arm that scores all pairs as `learned.Bleurt` does."""
  model, params = interleaved.open_folder(folder)
  import functools

  import jax
  import numpy as np

  from lm.evaluate.learned import text_rows
  texts = [text_rows.Text(np.concatenate(pair), np.repeat([0, 1], [len(part) for part in pair]).astype('i4'))
           for pair in pairs(number)]
  function = functools.partial(text_rows.scores, model.apply, params)

  def step():
    scores = np.zeros(number, np.float32)
    for places, values in text_rows.compute('bleurt', function, texts, model.max_length):
      scores[places] = values[:len(places)]
    return float(scores.mean())
  return step, {'weights': sum(x.size for x in jax.tree.leaves(params))}


def theirs(folder: pathlib.Path, number: int, batch: int) -> Prepared:
  """An arm that scores all pairs with `transformers`."""
  torch, transformers = interleaved.torch_library(), interleaved.transformers_library()
  model = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
  texts = sorted(pairs(number), key=lambda pair: -sum(map(len, pair)))

  def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

  @torch.inference_mode()
  def step():
    total = 0.
    for start in range(0, number, batch):
      chosen = [[torch.from_numpy(part).long() for part in pair] for pair in texts[start:start + batch]]
      ids = padded([torch.cat(pair) for pair in chosen])
      types = padded([torch.cat([first * 0, second * 0 + 1]) for first, second in chosen])
      mask = padded([torch.ones(sum(map(len, pair)), dtype=torch.long) for pair in chosen])
      total += float(model(ids, attention_mask=mask, token_type_ids=types).logits.sum())
    return total / number
  return step, {'weights': sum(p.numel() for p in model.parameters())}


def benchmark(*, number: int = 256, batch: int = 32, rounds: int = 3) -> None:
  """Prints tokens a second of both.

  Args:
    number: number of pairs.
    batch: pairs in a batch of transformers.
    rounds: number of rounds.
  """
  if min(number, batch, rounds) < 1:
    raise ValueError(f'--number={number}, --batch={batch} and --rounds={rounds} must be 1 or more')
  interleaved.machine('jax', 'jaxlib', 'torch', 'transformers')
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root) / 'model'
    interleaved.in_process(write_model, folder)
    arms = {'ours': (ours, folder, number), 'transformers': (theirs, folder, number, batch)}
    results = interleaved.compare('BLEURT', arms, sum(len(part) for pair in pairs(number) for part in pair), rounds, 1)
  if len(results) == 2:
    first, second = results['ours'], results['transformers']
    print(f'\n  ours {first.rate:,.0f} tok/s, transformers {second.rate:,.0f}, ratio {first.rate / second.rate:.2f} '
          f'(CPU time {first.cpu / second.cpu:.2f}); mean scores differ by {abs(first.loss - second.loss):.1e}')


if __name__ == '__main__':
  launch.tool(benchmark)
