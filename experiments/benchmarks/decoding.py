"""How fast is text generated, compared with `transformers`, on this CPU? GPT-2 of 124M parameters, float32, greedy.

  python experiments/benchmarks/decoding.py --rounds=3

A step reads a prompt of 128 tokens and writes `--new_tokens` tokens, at batch sizes 1 and 8. The arm `read` only reads
the memory that every token has to read: the weights and the cache. The arms `int8` and `int4` have rounded weights. Use
the machine for nothing else meanwhile. Linux only. Install PyTorch and transformers with pip install 'lm[benchmark]'.
"""
import pathlib
import tempfile
import types
from typing import Any

import interleaved
from interleaved import Prepared

from lm import launch  # nothing slow here: the imports of an arm count in its memory and its start-up time

PROMPT = 128


def write_model(folder: pathlib.Path) -> int:
  """Writes a random model. Returns the bytes of the keys and values of one token."""
  transformers = interleaved.transformers_library()
  config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0)
  transformers.GPT2LMHeadModel(config).save_pretrained(folder)
  return 2 * config.n_layer * config.n_embd * 4


def prompts(batch: int) -> Any:
  """Returns random prompts, int32 [batch, 128]. All begin with token 0, as with bos."""
  ids = interleaved.tokens(50_257, batch, PROMPT)
  ids[:, 0] = 0
  return ids


def ours(folder: pathlib.Path, batch: int, new_tokens: int, weights: str = 'float32') -> Prepared:
  """An arm that writes with `generate.generate`."""
  model, params = interleaved.open_folder(folder, weights == 'float32')
  import jax
  import numpy as np

  from lm import generate
  from lm.models import quantized_decoder
  params = quantized_decoder.with_rounded_weights(model, params, weights)
  params, prompt_ids = model.unstack(params), list(prompts(batch)[:, 1:])
  # In place of a tokenizer: each id is one character, from 256 on, and no id ends a text.
  tokenizer = types.SimpleNamespace(
      vocab_size=model.vocab, bos_id=0, eos_id=-1, eos_ids=(-1,), adds_bos=True,
      encode_batch=lambda texts: prompt_ids, decode=lambda ids: ''.join(chr(256 + i) for i in ids))

  def step():
    texts = generate.generate(model, params, tokenizer, [''] * batch, generate.Sampling(0.), max_tokens=new_tokens)
    ids = np.array([[ord(c) - 256 for c in text] for text in texts])
    assert ids.shape == (batch, new_tokens)
    return float(ids.mean())
  return step, {'weights': sum(x.size for x in jax.tree.leaves(params))}


def theirs(folder: pathlib.Path, batch: int, new_tokens: int) -> Prepared:
  """An arm that writes with the method `generate` of `transformers`."""
  torch, transformers = interleaved.torch_library(), interleaved.transformers_library()
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  prompt_ids = torch.from_numpy(prompts(batch)).long()

  def step():
    ids = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=new_tokens,
                         do_sample=False)
    assert ids.shape == (batch, PROMPT + new_tokens)
    return float(ids[:, PROMPT:].double().mean())
  return step, {'weights': sum(p.numel() for p in model.parameters())}


def benchmark(*, rounds: int = 3, new_tokens: int = 64) -> None:
  """Prints a table for each batch size, and the share of the memory bandwidth that each arm reaches.

  Args:
    rounds: number of rounds.
    new_tokens: number of tokens that each row writes in a step.
  """
  if min(rounds, new_tokens) < 1:
    raise ValueError(f'--rounds={rounds} and --new_tokens={new_tokens} must be 1 or more')
  interleaved.machine('jax', 'jaxlib', 'torch', 'transformers')
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root) / 'decoder'
    token_size = interleaved.in_process(write_model, folder)
    for batch in (1, 8):
      # Bytes that a token reads on average: the cache has the prompt and half of the new tokens.
      size = (folder / 'model.safetensors').stat().st_size + batch * (PROMPT + new_tokens // 2) * token_size
      results = interleaved.compare(f'decoding, batch {batch}', {
          'ours': (ours, folder, batch, new_tokens), 'int8': (ours, folder, batch, new_tokens, 'int8'),
          'int4': (ours, folder, batch, new_tokens, 'int4'),
          'read': (interleaved.read_memory, size, new_tokens),
          'transformers': (theirs, folder, batch, new_tokens)}, batch * new_tokens, rounds, 1)
      if len(results) == 5:
        limit = results.pop('read')
        shares = [f'{name} {result.rate / limit.rate:.0%} ({result.cpu / limit.cpu:.0%} in CPU time)'
                  for name, result in results.items()]
        print(f'  {size / 1e6:,.0f} MB a token, read at {limit.rate / batch * size / 1e9:.1f} GB/s; of that:',
              ', '.join(shares),
              '' if results['ours'].loss == results['transformers'].loss else 'NOT THE SAME TEXT')


if __name__ == '__main__':
  launch.tool(benchmark)
