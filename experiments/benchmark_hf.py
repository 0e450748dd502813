"""How fast are Hugging Face models here, beside `transformers`? Scoring, a row a family, and import, on this CPU.

  python experiments/benchmark_hf.py --what=scoring --families=gpt2,llama

Models are random and made on the spot. Scoring: 64 texts of 8 to 512 tokens under 4 layers x 512, float32; transformers
gets them sorted by length, in padded batches of 8. BERT reads the texts unmasked, in one pass, and is asked for each
token at its place; T5 gets the texts as sources, and targets of about their length. Import: 1.2 billion parameters in
bfloat16; the last arm only reads the file. Leave the machine alone meanwhile. For Linux. PyTorch: pip install
'lm[benchmark]'.
"""
import dataclasses
import os
import pathlib
import tempfile
from typing import Any, Literal, get_args

from lm import launch, race  # nothing heavy here: what an arm imports counts in its memory and in its start
from lm.race import Made

What = Literal['scoring', 'import']
Kind = Literal['gpt2', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'olmo2', 'olmo3',
               'smollm3', 'phi3', 'mixtral', 'qwen2_moe', 'qwen3_moe', 'gpt_oss', 'deepseek_v3', 'llama4_text', 'bert',
               't5']
VOCAB, LENGTH = 16_384, 512
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


def texts() -> list[Any]:
  import numpy as np
  rng = np.random.default_rng(0)
  return [rng.integers(0, VOCAB, int(n)) for n in np.clip(rng.lognormal(4.6, 0.8, 64), 8, LENGTH)]


def targets() -> list[Any]:
  """Of T5: one for each text, of its length, more or less."""
  import numpy as np
  rng = np.random.default_rng(1)
  return [rng.integers(0, VOCAB, int(len(text) * rng.uniform(0.7, 1.3))) for text in texts()]


def count(kind: Kind) -> int:
  """Tokens that are scored; of T5 also those of the sources."""
  if kind == 't5':
    return sum(map(len, texts() + targets()))
  return sum(len(text) - (kind != 'bert') for text in texts())


def pytorch() -> Any:
  import torch
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  return torch


def new_model(kind: str, folder: pathlib.Path) -> None:
  pytorch()
  import transformers
  transformers.utils.logging.disable_progress_bar()
  sizes = OWN[kind] if kind in WHOLE else SIZES | OWN.get(kind, {})
  if kind == 'gpt_neox':   # which has no such thing
    sizes = {name: size for name, size in sizes.items() if name != 'num_key_value_heads'}
  config = transformers.AutoConfig.for_model(kind, **sizes)
  getattr(transformers, CLASSES.get(kind, 'AutoModelForCausalLM')).from_config(config).save_pretrained(folder)


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


@dataclasses.dataclass(frozen=True)
class InPlace:
  """An encoder that reads what it is asked for."""
  model: Any
  max_length: int
  causal = True

  def apply(self, params: Any, batch: Any) -> Any:
    return self.model.apply(params, batch._replace(tokens=batch.targets))


def ours_scoring(folder: pathlib.Path, kind: Kind) -> Made:
  model, params = ours(folder)
  import jax
  import numpy as np

  from lm import evaluate
  documents, sources = texts(), None
  if kind == 'bert':
    model, documents = InPlace(model, model.max_length), [np.r_[0, text] for text in documents]
  if kind == 't5':
    sources, documents = documents, [np.r_[0, text] for text in targets()]
  return (lambda: -float(np.concatenate(evaluate.log_probabilities(model, params, documents, sources=sources)).mean()),
          {'weights': sum(x.size for x in jax.tree.leaves(params))})


def transformers_scoring(folder: pathlib.Path, kind: Kind) -> Made:
  torch = pytorch()
  import transformers
  transformers.utils.logging.disable_progress_bar()
  model = getattr(transformers, CLASSES.get(kind, 'AutoModelForCausalLM')).from_pretrained(
      folder, dtype=torch.float32).eval()
  pairs = [list(map(torch.from_numpy, pair)) for pair in zip(texts(), targets())]
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
                        count(kind), rounds, 1)
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
