"""How fast are texts scored under each Hugging Face family, compared with `transformers`, on this CPU?

  python experiments/benchmarks/scoring.py --families=gpt2,llama

Models are random and made on the spot: 4 layers of width 512, float32. Texts have 8 to 512 tokens. `transformers` gets
them sorted by length, in padded batches of 8. BERT reads the texts unmasked, in one pass, and scores each token at its
own position. T5 reads the texts as sources, and scores targets of about their length. Use the machine for nothing else
meanwhile. Linux only. Install PyTorch and transformers with pip install 'lm[benchmark]'.
"""
import dataclasses
import pathlib
import tempfile
from typing import Any, Literal, get_args

import interleaved
from interleaved import Prepared

from lm import launch  # nothing slow here: the imports of an arm count in its memory and its start-up time

Kind = Literal['gpt2', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'olmo2', 'olmo3',
               'smollm3', 'phi3', 'mixtral', 'qwen2_moe', 'qwen3_moe', 'gpt_oss', 'deepseek_v3', 'llama4_text', 'bert',
               't5']
VOCAB, LENGTH = 16_384, 512
SIZES = {'vocab_size': VOCAB, 'hidden_size': 512, 'num_hidden_layers': 4, 'num_attention_heads': 8,
         'num_key_value_heads': 4, 'intermediate_size': 1408, 'max_position_embeddings': LENGTH, 'pad_token_id': None,
         'bos_token_id': None, 'eos_token_id': None}
EXPERTS = {'moe_intermediate_size': 704, 'num_experts_per_tok': 2}
# Fields of families that have others, or other values.
OTHER_FIELDS = {
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
WITHOUT_SIZES = 'gpt2', 'bert', 't5'   # families whose configs have none of SIZES
CLASSES = {'bert': 'AutoModelForMaskedLM', 't5': 'AutoModelForSeq2SeqLM'}


def texts(number: int) -> list[Any]:
  """Returns texts, int64 [T] each, of 8 to 512 tokens."""
  import numpy as np
  rng = np.random.default_rng(0)
  return [rng.integers(0, VOCAB, int(n)) for n in np.clip(rng.lognormal(4.6, 0.8, number), 8, LENGTH)]


def targets(number: int) -> list[Any]:
  """Returns a target for each text, of 0.7 to 1.3 times its length, for T5."""
  import numpy as np
  rng = np.random.default_rng(1)
  return [rng.integers(0, VOCAB, int(len(text) * rng.uniform(0.7, 1.3))) for text in texts(number)]


def count_tokens(kind: Kind, number: int) -> int:
  """Returns the number of tokens that are scored; for T5, with those of the sources."""
  if kind == 't5':
    return sum(map(len, texts(number) + targets(number)))
  unscored = 0 if kind == 'bert' else 1   # a decoder does not score the first token of a text
  return sum(len(text) - unscored for text in texts(number))


def write_model(kind: Kind, folder: pathlib.Path) -> None:
  """Writes a random model of a family, as `transformers` does."""
  transformers = interleaved.transformers_library()
  fields = OTHER_FIELDS[kind] if kind in WITHOUT_SIZES else SIZES | OTHER_FIELDS.get(kind, {})
  if kind == 'gpt_neox':   # has as many heads of keys and values as heads
    fields = {name: value for name, value in fields.items() if name != 'num_key_value_heads'}
  config = transformers.AutoConfig.for_model(kind, **fields)
  getattr(transformers, CLASSES.get(kind, 'AutoModelForCausalLM')).from_config(config).save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class Unmasked:
  """An encoder that reads the tokens that it predicts, in place of masks."""
  model: Any
  max_length: int
  causal = True

  def apply(self, params: Any, batch: Any) -> Any:
    return self.model.apply(params, batch._replace(tokens=batch.targets))


def ours(folder: pathlib.Path, kind: Kind, number: int) -> Prepared:
  """An arm that scores all texts with `evaluate.log_probabilities`."""
  model, params = interleaved.open_folder(folder)
  import jax
  import numpy as np

  from lm import evaluate
  documents, sources = texts(number), None
  if kind == 'bert':
    model, documents = Unmasked(model, model.max_length), [np.r_[0, text] for text in documents]
  if kind == 't5':
    sources, documents = documents, [np.r_[0, text] for text in targets(number)]

  def step():
    scores = evaluate.log_probabilities(model, params, documents, sources=sources)
    return -float(np.concatenate(scores).mean())
  return step, {'weights': sum(x.size for x in jax.tree.leaves(params))}


def theirs(folder: pathlib.Path, kind: Kind, number: int) -> Prepared:
  """An arm that scores all texts with `transformers`."""
  torch, transformers = interleaved.torch_library(), interleaved.transformers_library()
  model = getattr(transformers, CLASSES.get(kind, 'AutoModelForCausalLM')).from_pretrained(
      folder, dtype=torch.float32).eval()
  pairs = [list(map(torch.from_numpy, pair)) for pair in zip(texts(number), targets(number))]
  pairs.sort(key=lambda pair: len(pair[0]), reverse=True)

  def forward(batch):
    """Returns logits [B, T, V] and the tokens that they predict [B, T]; -100 is padding."""
    ids, labels = (torch.nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=-100) for side in zip(*batch))
    inputs = {'input_ids': ids.clamp(min=0), 'attention_mask': (ids >= 0).long()}
    if kind == 'bert':
      return model(**inputs).logits, ids
    if kind == 't5':
      shifted = torch.nn.functional.pad(labels[:, :-1].clamp(min=0), (1, 0))
      return model(**inputs, decoder_input_ids=shifted, use_cache=False).logits, labels
    return model(**inputs, use_cache=False).logits[:, :-1], ids[:, 1:]

  @torch.inference_mode()
  def step():
    loss = count = 0
    for start in range(0, len(pairs), 8):
      logits, labels = forward(pairs[start:start + 8])
      loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction='sum')
      count += int((labels >= 0).sum())
    return float(loss) / count
  return step, {'weights': sum(p.numel() for p in model.parameters())}


def measure(folder: pathlib.Path, kind: Kind, number: int, rounds: int) -> str:
  """Measures a family. Returns its line of the table."""
  interleaved.in_process(write_model, kind, folder)
  arms = {'ours': (ours, folder, kind, number), 'transformers': (theirs, folder, kind, number)}
  results = interleaved.compare(f'scoring, {kind}', arms, count_tokens(kind, number), rounds, 1)
  if len(results) < 2:
    return f'  {kind:12} failed'
  a, b = results['ours'], results['transformers']
  return (f'  {kind:12}{a.rate:11,.0f}{b.rate:14,.0f}{a.rate / b.rate:7.2f}{a.cpu / b.cpu:7.2f}'
          f'{abs(a.loss - b.loss):17.1e}{a.peak / b.peak:13.2f}')


def benchmark(*, families: list[Kind] = get_args(Kind), number: int = 64, rounds: int = 3) -> None:
  """Prints a table with a row for each family.

  Args:
    families: the families to measure.
    number: number of texts.
    rounds: number of rounds.
  """
  if min(number, rounds) < 1:
    raise ValueError(f'--number={number} and --rounds={rounds} must be 1 or more')
  interleaved.machine('jax', 'jaxlib', 'torch', 'transformers')
  with tempfile.TemporaryDirectory() as root:
    lines = [measure(pathlib.Path(root) / kind, kind, number, rounds) for kind in families]
  print('\n  scoring     ours, tok/s  transformers  ratio    CPU  loss difference  peak memory', *lines, sep='\n')


if __name__ == '__main__':
  launch.tool(benchmark)
