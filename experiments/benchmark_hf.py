"""How fast are Hugging Face models here, beside `transformers`? Scoring, a row a family, and import, on this CPU.

  python experiments/benchmark_hf.py --what=scoring --families=gpt2,llama

Models are random and made on the spot. Scoring: 64 texts of 8 to 512 tokens under 4 layers x 512, float32; transformers
gets them sorted by length, in padded batches of 8. BERT masks each token of 4 texts of at most 48 in turn; T5 scores
half of the texts, given the other half. Import: 1.2 billion parameters in bfloat16; the last arm only reads the file.
Leave the machine alone meanwhile. For Linux. PyTorch: pip install 'lm[benchmark]'.
"""
import os
import pathlib
import tempfile
from typing import Any, Literal, get_args

from lm import launch, race  # nothing heavy here: what an arm imports counts in its memory and in its start
from lm.race import Made

What = Literal['scoring', 'import']
Kind = Literal['gpt2', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'olmo2', 'olmo3',
               'smollm3', 'phi3', 'mixtral', 'qwen2_moe', 'qwen3_moe', 'gpt_oss', 'deepseek_v3', 'llama4_text',
               'bert', 't5']
VOCAB, LENGTH = 16_384, 512
SIZES = {'vocab_size': VOCAB, 'hidden_size': 512, 'num_hidden_layers': 4, 'num_attention_heads': 8,
         'num_key_value_heads': 4, 'intermediate_size': 1408, 'max_position_embeddings': LENGTH, 'pad_token_id': None,
         'bos_token_id': None, 'eos_token_id': None}
EXPERTS = {'moe_intermediate_size': 704, 'num_experts_per_tok': 2}
AUTO = {'bert': 'AutoModelForMaskedLM', 't5': 'AutoModelForSeq2SeqLM'}
# What a family names otherwise.
OWN = {
    'gpt2': {'vocab_size': VOCAB, 'n_embd': 512, 'n_layer': 4, 'n_head': 8, 'n_positions': LENGTH},
    'bert': {'vocab_size': VOCAB, 'hidden_size': 512, 'num_hidden_layers': 4, 'num_attention_heads': 8,
             'intermediate_size': 2048},
    't5': {'vocab_size': VOCAB, 'd_model': 512, 'd_kv': 64, 'd_ff': 1408, 'num_layers': 4, 'num_heads': 8,
           'decoder_start_token_id': 0, 'pad_token_id': 0},
    'gemma2': {'head_dim': 64}, 'gemma3_text': {'head_dim': 64}, 'qwen3': {'head_dim': 64},
    'mixtral': {'num_local_experts': 8, 'intermediate_size': 704},
    'qwen2_moe': {'num_experts': 8, **EXPERTS, 'shared_expert_intermediate_size': 704},
    'qwen3_moe': {'num_experts': 8, **EXPERTS, 'head_dim': 64},
    'gpt_oss': {'num_local_experts': 8, 'num_experts_per_tok': 2, 'intermediate_size': 704, 'head_dim': 64},
    'deepseek_v3': {'n_routed_experts': 8, **EXPERTS, 'n_group': 2, 'topk_group': 1, 'first_k_dense_replace': 1,
                    'q_lora_rank': 192, 'kv_lora_rank': 128, 'qk_nope_head_dim': 64, 'qk_rope_head_dim': 32,
                    'v_head_dim': 64, 'num_key_value_heads': 8},
    'llama4_text': {'num_local_experts': 8, 'intermediate_size': 704, 'intermediate_size_mlp': 1408, 'head_dim': 64}}


def texts() -> list[Any]:
  import numpy as np
  rng = np.random.default_rng(0)
  return [rng.integers(0, VOCAB, int(n)) for n in np.clip(rng.lognormal(4.6, 0.8, 64), 8, LENGTH)]


def work(kind: str) -> tuple[list[Any], list[Any], int]:
  """Texts, the sources of them, and how many tokens are scored."""
  if kind == 'bert':
    some = [text[:48] for text in texts()[:4]]
    return some, [], sum(len(text) - 2 for text in some)
  if kind == 't5':
    return texts()[32:], texts()[:32], sum(len(text) - 1 for text in texts()[32:])
  return texts(), [], sum(len(text) - 1 for text in texts())


def pytorch() -> Any:
  import torch
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  return torch


def new_model(kind: str, folder: pathlib.Path) -> None:
  pytorch()
  import transformers
  transformers.utils.logging.disable_progress_bar()
  sizes = OWN[kind] if kind in AUTO or kind == 'gpt2' else SIZES | OWN.get(kind, {})
  if kind == 'gpt_neox':   # which has no such thing
    sizes = {name: size for name, size in sizes.items() if name != 'num_key_value_heads'}
  config = transformers.AutoConfig.for_model(kind, **sizes)
  getattr(transformers, AUTO.get(kind, 'AutoModelForCausalLM')).from_config(config).save_pretrained(folder)


def new_large_model(folder: pathlib.Path) -> None:
  """The shape of Llama 3.2 1B."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from lm.hf import weights
  from lm.models import transformer
  model = transformer.llama(128_256, 2048, 16, 32, kv_heads=8, hidden=8192)
  some = np.random.default_rng(0).normal(size=1 << 20).astype(jnp.bfloat16)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  weights.write(folder, model, jax.tree.map(lambda s: np.resize(some, s.shape), shapes))


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


def ours_scoring(folder: pathlib.Path, kind: str) -> Made:
  model, params = ours(folder)
  import jax
  import numpy as np

  from lm import evaluate
  some, sources, _ = work(kind)
  score = {'bert': lambda: evaluate.pseudo_log_probabilities(model, params, some, mask=4),
           't5': lambda: evaluate.log_probabilities_given(model, params, sources, some)}.get(
               kind, lambda: evaluate.log_probabilities(model, params, some))
  return lambda: -float(np.concatenate(score()).mean()), {'weights': sum(x.size for x in jax.tree.leaves(params))}


def transformers_scoring(folder: pathlib.Path, kind: str) -> Made:
  torch = pytorch()
  import transformers
  transformers.utils.logging.disable_progress_bar()
  kind_of_model = getattr(transformers, AUTO.get(kind, 'AutoModelForCausalLM'))
  model = kind_of_model.from_pretrained(folder, dtype=torch.float32).eval()
  some, sources, count = work(kind)
  order = sorted(range(len(some)), key=lambda i: -len(some[i]))

  def padded(documents):
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(text) for text in documents], True, -100)
    return ids, (ids >= 0).long()

  def masked():
    """(inputs, what is asked at each position or -100), 32 rows at a time."""
    for text in some:
      ids = torch.from_numpy(text)
      places = torch.arange(1, len(ids) - 1)[:, None]
      here = torch.arange(len(ids))[None] == places
      yield from zip(torch.where(here, 4, ids).split(32), torch.where(here, ids, -100).split(32))

  def batches():
    """(logits, targets)"""
    if kind == 'bert':
      for ids, targets in masked():
        yield model(ids).logits, targets
      return
    for group in (order[at:at + 8] for at in range(0, len(order), 8)):
      ids, mask = padded([some[i] for i in group])
      if kind == 't5':
        source, source_mask = padded([sources[i] for i in group])
        yield model(input_ids=source.clamp(min=0), attention_mask=source_mask, use_cache=False,
                    decoder_input_ids=ids[:, :-1].clamp(min=0)).logits, ids[:, 1:]
      else:
        yield model(ids.clamp(min=0), attention_mask=mask, use_cache=False).logits[:, :-1], ids[:, 1:]

  @torch.inference_mode()
  def go():
    losses = [torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='sum')
              for logits, targets in batches()]
    return float(sum(losses)) / count
  return go, {'weights': sum(p.numel() for p in model.parameters())}


def ours_import(folder: pathlib.Path) -> Made:
  return (lambda: ours(folder) and None), {}


def transformers_import(folder: pathlib.Path) -> Made:
  torch = pytorch()
  import transformers
  transformers.utils.logging.disable_progress_bar()

  def go():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():   # it maps the file: each page is touched once, as by a first use
      return float(sum(p.float().sum() * 0 for p in model.parameters())) or None
  return go, {}


def read_file(folder: pathlib.Path) -> Made:
  import numpy as np
  return (lambda: np.fromfile(folder / 'model.safetensors', np.uint8) is None or None), {}


def benchmark(*, what: list[What] = get_args(What), families: list[Kind] = get_args(Kind),   # noqa: B008
              rounds: int = 3) -> None:
  """Measures.

  Args:
    families: whose scoring is measured.
    rounds: how often the arms take turns.
  """
  if rounds < 1:
    raise ValueError(f'--rounds={rounds} must be 1 or more')
  table = []
  with tempfile.TemporaryDirectory() as temporary:
    for kind in families if 'scoring' in what else ():
      folder = pathlib.Path(temporary) / kind
      with race.process() as pool:
        pool.submit(new_model, kind, folder).result()
      found = race.race(f'scoring, {kind}', {'ours': (ours_scoring, folder, kind),
                                             'transformers': (transformers_scoring, folder, kind)},
                        work(kind)[2], rounds, 1)
      if len(found) == 2:
        (mine, my_loss), (theirs, their_loss) = found.values()
        table.append(f'  {kind:12} {mine:10,.0f} {theirs:13,.0f} {mine / theirs:6.2f} '
                     f'{abs(my_loss - their_loss):16.1e}')
    if 'import' in what:
      folder = pathlib.Path(temporary) / 'large'
      with race.process() as pool:
        pool.submit(new_large_model, folder).result()
      size = (folder / 'model.safetensors').stat().st_size
      race.race(f'import of {size / 1e9:.2f} GB', {
          'ours': (ours_import, folder), 'transformers': (transformers_import, folder),
          'read': (read_file, folder)}, size // 10 ** 6, rounds, 1, 'MB')
  if table:
    print('\n  scoring      ours, tok/s  transformers  ratio  loss difference', *table, sep='\n')


if __name__ == '__main__':
  launch.tool(benchmark)
