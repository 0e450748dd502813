"""How fast are Hugging Face models here, beside `transformers`? Scoring, a row a family; decoding; import; on this CPU.

  python experiments/benchmarks/huggingface.py --what=scoring --families=gpt2,llama

Models are random and made on the spot. Scoring: texts of 8 to 512 tokens under 4 layers x 512, float32; transformers
gets them sorted by length, in padded batches of 8. BERT reads the texts unmasked, in one pass, and is asked for each
token at its place; T5 gets the texts as sources, and targets of about their length. Decoding: GPT-2 of 124M, float32,
greedy, after a prompt of 128 tokens, which is read in the same time; the arm `read` only reads what every token has to
read, the weights and the cache. Import: 1.2 billion parameters in bfloat16; `import` does what import_hf.py does,
`open` reads the parameters alone, `read` the file. Leave the machine alone meanwhile. For Linux. PyTorch: pip install
'lm[benchmark]'.
"""
import dataclasses
import os
import pathlib
import tempfile
import types
from typing import Any, Literal, get_args

import interleaved
from interleaved import Prepared

from lm import launch  # nothing heavy here: what an arm imports counts in its memory and its start-up time

What = Literal['scoring', 'decoding', 'import']
Kind = Literal['gpt2', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'olmo2', 'olmo3',
               'smollm3', 'phi3', 'mixtral', 'qwen2_moe', 'qwen3_moe', 'gpt_oss', 'deepseek_v3', 'llama4_text', 'bert',
               't5']
VOCAB, LENGTH, PROMPT = 16_384, 512, 128
SIZES = {'vocab_size': VOCAB, 'hidden_size': 512, 'num_hidden_layers': 4, 'num_attention_heads': 8,
         'num_key_value_heads': 4, 'intermediate_size': 1408, 'max_position_embeddings': LENGTH, 'pad_token_id': None,
         'bos_token_id': None, 'eos_token_id': None}
EXPERTS = {'moe_intermediate_size': 704, 'num_experts_per_tok': 2}
# What a family names otherwise.
OWN = {
    'gpt2': {'vocab_size': VOCAB, 'n_embd': 512, 'n_layer': 4, 'n_head': 8, 'n_positions': LENGTH},
    'gemma2': {'head_dim': 64}, 'gemma3_text': {'head_dim': 64}, 'qwen3': {'head_dim': 64},
    'mixtral': {'num_local_experts': 8, 'intermediate_size': 704},
    'qwen2_moe': {'num_experts': 8, **EXPERTS, 'shared_expert_intermediate_size': 704},
    'qwen3_moe': {'num_experts': 8, **EXPERTS, 'head_dim': 64},
    'gpt_oss': {'num_local_experts': 8, 'num_experts_per_tok': 2, 'intermediate_size': 704, 'head_dim': 64},
    'deepseek_v3': {'n_routed_experts': 8, **EXPERTS, 'n_group': 2, 'topk_group': 1, 'first_k_dense_replace': 1,
                    'q_lora_rank': 192, 'kv_lora_rank': 128, 'qk_nope_head_dim': 64, 'qk_rope_head_dim': 32,
                    'v_head_dim': 64, 'num_key_value_heads': 8},
    'llama4_text': {'num_local_experts': 8, 'intermediate_size': 704, 'intermediate_size_mlp': 1408, 'head_dim': 64},
    'bert': {'vocab_size': VOCAB, 'hidden_size': 512, 'num_hidden_layers': 4, 'num_attention_heads': 8,
             'intermediate_size': 2048, 'max_position_embeddings': LENGTH},
    't5': {'vocab_size': VOCAB, 'd_model': 512, 'num_layers': 4, 'num_heads': 8, 'd_ff': 2048,
           'decoder_start_token_id': 0}}
WHOLE = 'gpt2', 'bert', 't5'   # nothing of SIZES is in their configs
CLASSES = {'bert': 'AutoModelForMaskedLM', 't5': 'AutoModelForSeq2SeqLM'}


def texts(number: int) -> list[Any]:
  import numpy as np
  rng = np.random.default_rng(0)
  return [rng.integers(0, VOCAB, int(n)) for n in np.clip(rng.lognormal(4.6, 0.8, number), 8, LENGTH)]


def targets(number: int) -> list[Any]:
  """Of T5: one for each text, of its length, more or less."""
  import numpy as np
  rng = np.random.default_rng(1)
  return [rng.integers(0, VOCAB, int(len(text) * rng.uniform(0.7, 1.3))) for text in texts(number)]


def count(kind: Kind, number: int) -> int:
  """Tokens that are scored; of T5 also those of the sources."""
  if kind == 't5':
    return sum(map(len, texts(number) + targets(number)))
  return sum(len(text) - (kind != 'bert') for text in texts(number))


def pytorch() -> tuple[Any, Any]:
  """torch and transformers."""
  import torch
  import transformers
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  transformers.utils.logging.disable_progress_bar()
  return torch, transformers


def new_model(kind: str, folder: pathlib.Path) -> None:
  _, transformers = pytorch()
  sizes = OWN[kind] if kind in WHOLE else SIZES | OWN.get(kind, {})
  if kind == 'gpt_neox':   # which has no such thing
    sizes = {name: size for name, size in sizes.items() if name != 'num_key_value_heads'}
  config = transformers.AutoConfig.for_model(kind, **sizes)
  getattr(transformers, CLASSES.get(kind, 'AutoModelForCausalLM')).from_config(config).save_pretrained(folder)


def new_decoder(folder: pathlib.Path) -> int:
  """GPT-2 of 124M; gives the bytes of the keys and values of a token."""
  _, transformers = pytorch()
  config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0)
  transformers.GPT2LMHeadModel(config).save_pretrained(folder)
  return 2 * config.n_layer * config.n_embd * 4


def new_large_model(folder: pathlib.Path) -> None:
  """The shape of Llama 3.2 1B."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from lm.data.tokenizers.folder import Bytes
  from lm.hf import pretrained
  from lm.models import transformer
  model, rng = transformer.llama(128_256, 2048, 16, 32, kv_heads=8, hidden=8192), np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(jnp.bfloat16),
                        jax.eval_shape(model.init, jax.random.key(0)))
  pretrained.write(folder, model, params, Bytes(('<|bos|>', '<|eos|>')))


def ours(folder: pathlib.Path) -> tuple[Any, Any]:
  """Model and parameters, on the mesh that is set."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from lm import sharding
  from lm.hf import files, weights
  jax.set_mesh(sharding.make_mesh())
  model, family = weights.open_model(folder)
  with files.Weights(folder) as found:
    return model, weights.load_params(model, family, found)


@dataclasses.dataclass(frozen=True)
class InPlace:
  """An encoder that reads what it is asked for."""
  model: Any
  max_length: int
  causal = True

  def apply(self, params: Any, batch: Any) -> Any:
    return self.model.apply(params, batch._replace(tokens=batch.targets))


def ours_scoring(folder: pathlib.Path, kind: Kind, number: int) -> Prepared:
  model, params = ours(folder)
  import jax
  import numpy as np

  from lm import evaluate
  documents, sources = texts(number), None
  if kind == 'bert':
    model, documents = InPlace(model, model.max_length), [np.r_[0, text] for text in documents]
  if kind == 't5':
    sources, documents = documents, [np.r_[0, text] for text in targets(number)]
  return (lambda: -float(np.concatenate(evaluate.log_probabilities(model, params, documents, sources=sources)).mean()),
          {'weights': sum(x.size for x in jax.tree.leaves(params))})


def transformers_scoring(folder: pathlib.Path, kind: Kind, number: int) -> Prepared:
  torch, transformers = pytorch()
  model = getattr(transformers, CLASSES.get(kind, 'AutoModelForCausalLM')).from_pretrained(
      folder, dtype=torch.float32).eval()
  pairs = [list(map(torch.from_numpy, pair)) for pair in zip(texts(number), targets(number))]
  pairs.sort(key=lambda pair: len(pair[0]), reverse=True)

  def forward(some):
    """Logits, and what is asked for at their places; -100 is nothing."""
    ids, asked = (torch.nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=-100) for side in zip(*some))
    read = {'input_ids': ids.clamp(min=0), 'attention_mask': (ids >= 0).long()}
    if kind == 'bert':
      return model(**read).logits, ids
    if kind == 't5':
      shifted = torch.nn.functional.pad(asked[:, :-1].clamp(min=0), (1, 0))
      return model(**read, decoder_input_ids=shifted, use_cache=False).logits, asked
    return model(**read, use_cache=False).logits[:, :-1], ids[:, 1:]

  @torch.inference_mode()
  def go():
    loss = count = 0
    for at in range(0, len(pairs), 8):
      logits, asked = forward(pairs[at:at + 8])
      loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), asked.flatten(), reduction='sum')
      count += int((asked >= 0).sum())
    return float(loss) / count
  return go, {'weights': sum(p.numel() for p in model.parameters())}


def prompts(batch: int) -> Any:
  """They begin alike, as with bos."""
  import numpy as np
  ids = np.random.default_rng(0).integers(0, 50_257, (batch, PROMPT), np.int32)
  ids[:, 0] = 0
  return ids


def ours_decoding(folder: pathlib.Path, batch: int, new_tokens: int) -> Prepared:
  model, params = ours(folder)
  import jax
  import numpy as np

  from lm import generate
  params, ids = model.unstack(params), list(prompts(batch)[:, 1:])
  # Stands for a tokenizer: an end that is never chosen, and a character an id, from 256 on.
  tokenizer = types.SimpleNamespace(
      vocab_size=model.vocab, bos_id=0, eos_id=-1, eos_ids=(-1,), adds_bos=True,
      encode_batch=lambda texts: ids, decode=lambda ids: ''.join(chr(256 + i) for i in ids))

  def go():
    made = generate.generate(model, params, tokenizer, [''] * batch, generate.Sampling(0.), max_tokens=new_tokens)
    found = np.array([[ord(c) - 256 for c in text] for text in made])
    assert found.shape == (batch, new_tokens)
    return float(found.mean())
  return go, {'weights': sum(x.size for x in jax.tree.leaves(params))}


def transformers_decoding(folder: pathlib.Path, batch: int, new_tokens: int) -> Prepared:
  torch, transformers = pytorch()
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  ids = torch.from_numpy(prompts(batch)).long()

  def go():
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    assert made.shape == (batch, PROMPT + new_tokens)
    return float(made[:, PROMPT:].double().mean())
  return go, {'weights': sum(p.numel() for p in model.parameters())}


def ours_import(folder: pathlib.Path) -> Prepared:
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from lm import sharding
  from lm.hf import pretrained

  def go():
    with tempfile.TemporaryDirectory() as out, jax.set_mesh(sharding.make_mesh()):
      pretrained.save(str(folder), pathlib.Path(out) / 'imported')
  return go, {}


def ours_open(folder: pathlib.Path) -> Prepared:
  return (lambda: ours(folder) and None), {}


def transformers_open(folder: pathlib.Path) -> Prepared:
  torch, transformers = pytorch()

  def go():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():   # it maps the file: each page is touched once, as by a first use
      return float(sum(p.float().sum() * 0 for p in model.parameters())) or None
  return go, {}


def scoring(folder: pathlib.Path, kind: Kind, number: int, rounds: int) -> str:
  """Measures a family; gives its line of the table."""
  interleaved.in_process(new_model, kind, folder)
  found = interleaved.compare(f'scoring, {kind}', {
      'ours': (ours_scoring, folder, kind, number), 'transformers': (transformers_scoring, folder, kind, number)},
      count(kind, number), rounds, 1)
  if len(found) < 2:
    return f'  {kind:12} failed'
  mine, theirs = found.values()
  return (f'  {kind:12}{mine.rate:11,.0f}{theirs.rate:14,.0f}{mine.rate / theirs.rate:7.2f}{mine.cpu / theirs.cpu:7.2f}'
          f'{abs(mine.loss - theirs.loss):17.1e}{mine.peak / theirs.peak:13.2f}')


def decoding(folder: pathlib.Path, rounds: int, new_tokens: int) -> None:
  each = interleaved.in_process(new_decoder, folder)
  for batch in (1, 8):
    # Of a step, on average: new tokens find the prompt and half of themselves in the cache.
    size = (folder / 'model.safetensors').stat().st_size + batch * (PROMPT + new_tokens // 2) * each
    found = interleaved.compare(f'decoding, batch {batch}', {
        'ours': (ours_decoding, folder, batch, new_tokens), 'read': (interleaved.read_memory, size, new_tokens),
        'transformers': (transformers_decoding, folder, batch, new_tokens)}, batch * new_tokens, rounds, 1)
    if len(found) == 3:
      limit = found.pop('read').rate
      print(f'  {size / 1e6:,.0f} MB a step, read at {limit / batch * size / 1e9:.1f} GB/s; of that:', ', '.join(
          f'{name} {result.rate / limit:.0%}' for name, result in found.items()),
          '' if len({result.loss for result in found.values()}) == 1 else 'NOT THE SAME TEXT')


def importing(folder: pathlib.Path, rounds: int) -> None:
  interleaved.in_process(new_large_model, folder)
  size = (folder / 'model.safetensors').stat().st_size
  found = interleaved.compare(f'import of {size / 1e9:.2f} GB', {
      'import': (ours_import, folder), 'open': (ours_open, folder), 'transformers': (transformers_open, folder),
      'read': (interleaved.read_file, folder / 'model.safetensors')}, size // 10 ** 6, rounds, 1, 'MB')
  print('  peak memory, of the file:', ', '.join(f'{name} {x.peak * 1e9 / size:.2f}x' for name, x in found.items()))


def benchmark(*, what: list[What] = get_args(What), families: list[Kind] = get_args(Kind),   # noqa: B008
              number: int = 64, rounds: int = 3, new_tokens: int = 64) -> None:
  """Measures.

  Args:
    families: whose scoring is measured.
    number: of texts to score.
    rounds: how often the arms take turns.
    new_tokens: to decode.
  """
  if min(number, rounds, new_tokens) < 1:
    raise ValueError(f'--number={number}, --rounds={rounds} and --new_tokens={new_tokens} must be 1 or more')
  interleaved.machine('jax', 'jaxlib', 'torch', 'transformers')
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    lines = [scoring(root / kind, kind, number, rounds) for kind in (families if 'scoring' in what else ())]
    if 'decoding' in what:
      decoding(root / 'decoder', rounds, new_tokens)
    if 'import' in what:
      importing(root / 'large', rounds)
  if lines:
    print('\n  scoring     ours, tok/s  transformers  ratio    CPU  loss difference  peak memory', *lines, sep='\n')


if __name__ == '__main__':
  launch.tool(benchmark)
