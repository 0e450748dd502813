r"""Write text with a trained run or a Hugging Face model, as it comes.

  python experiments/generate.py --workdir=runs/quickstart --prompt="def " --temperature=0.8 --max_tokens=200
  python experiments/generate.py --workdir=runs/ahead --prompt="def " --draft=2
  python experiments/generate.py --workdir=runs/finetune_chat --chat --prompt="Reverse abcd"
  python experiments/generate.py --workdir=runs/finetune_chat --chat --prompt="Reverse abcd" --best_of=8 \
    --reward=runs/reward
  python experiments/generate.py --model=t5-small --prompt="translate English to German: Hello" --temperature=0
"""
import pathlib
import sys

import jax

from lm import generate, launch, load, seeds, sharding
from lm.evaluate import rewards
from lm.generate import speculative
from lm.hf import pretrained
from lm.models.reward import Reward
from lm.objectives.objective import causal_prompt


def main(*, workdir: pathlib.Path | None = None, model: str | None = None, prompt: str = '',
         temperature: float = 1., top_k: int = 0, top_p: float = 1., min_p: float = 0., repetition_penalty: float = 1.,
         max_tokens: int | None = None, window: bool = False, stop: launch.Texts = (), n: int = 1, seed: int = 0,
         best: bool = False, chat: bool = False, bos: bool | None = None, draft: int = 0, best_of: int = 0,
         reward: pathlib.Path | None = None, mesh: str | None = None) -> None:
  """Prints the prompt and its completion, or what an encoder-decoder makes of it; several one after the other.

  Args:
    workdir: of the run; none for runs/quickstart.
    model: a Hugging Face folder, an imported one, an id on the hub or the workdir of a run, in place of --workdir.
    prompt: what the text begins with; nothing begins a new document. An encoder-decoder reads it, and writes anew.
    temperature: divides the logits; 0 takes the most probable token each time.
    top_k: draw among the k most probable tokens; 0 among all.
    top_p: draw among the fewest tokens whose probabilities reach this sum; 1 among all.
    min_p: draw among tokens of at least this share of the greatest probability; 0 among all.
    repetition_penalty: above 1, makes tokens that are already in the text less likely.
    max_tokens: the most tokens to write; none writes 128, or as many as the context of the model has room for.
    window: go on past the context; where it is full, the last half of it is read again.
    stop: the text ends before any of these, of which each is a flag of its own: --stop=, --stop=END.
    n: completions to write.
    seed: of the draws.
    mesh: the size of each mesh axis, such as data:4,model:2; none puts all devices on data.
    best: take the best checkpoint by the metric of the run, mostly the validation loss, not the newest.
    chat: the prompt is what a user says, to a model with a chat template; only the answer is written.
    bos: begin the prompt with bos, or with --nobos not; none does as the model's own tokenizer or chat template does.
    best_of: writes so many completions, and shows the --n that the reward model prefers.
    reward: the workdir of that model, see preference.py.
    draft: tokens that a model trained with --predict_ahead drafts at a time, speculative decoding.
  """
  workdir, model = load.run_or_model(workdir, model)
  sampling = generate.Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
  seeds.check(seed)
  if n < 1:
    raise ValueError(f'--n={n} must be at least 1')
  if max_tokens is not None and max_tokens < 1 or '' in stop:
    raise ValueError(f'--max_tokens={max_tokens} must be at least 1, and no --stop may be empty')
  if min(draft, best_of) < 0:
    raise ValueError(f'--draft={draft} and --best_of={best_of} must be 0 or more')
  if (best_of > 0) != (reward is not None) or 0 < best_of < n:
    raise ValueError(f'--best_of={best_of} --reward={reward}: the best of so many answers, at least --n={n}, by the '
                     'reward model in a workdir; give both flags, or none')
  if max(n, best_of) > 1 and sampling.greedy:
    raise ValueError(f'{max(n, best_of)} completions would all be equal at --temperature=0; leave out either this '
                     'flag, or --n and --best_of')
  with jax.set_mesh(sharding.make_mesh(mesh)):
    loaded = pretrained.load(model) if model else load.open_trained(workdir, best)
    mark = causal_prompt if model else loaded.run.objective.prompt
    if mark is None:
      raise ValueError(f'the run in {workdir} was trained to fill in tokens that are masked, and writes no text from '
                       'left to right; take one that was trained with another objective, such as next_token')
    if isinstance(loaded.model, Reward):
      raise ValueError(f'{workdir} is a reward model, which writes no text; it chooses among what another writes: '
                       f'--workdir=... --best_of=8 --reward={workdir}')
    if bos is not None and loaded.model.reads_source:
      raise ValueError(f'--{"" if bos else "no"}bos is for decoders; what an encoder-decoder writes begins with it')
    tokens = load.chat_tokenizer(loaded) if chat else loaded.tokenizer
    judge = None if reward is None else load.open_trained(reward)
    if judge and not isinstance(judge.model, Reward):
      raise ValueError(f'--reward={reward} is {load.kind(judge.model)}, and what is needed is a reward model; '
                       '"experiments/preference.py --method=reward" makes one')
    room = generate.room(loaded.model, tokens, [prompt], bos)
    if max_tokens is None and not window and room < generate.DEFAULT:
      print(f'up to {room} tokens, to the end of the context; --window goes on past it', file=sys.stderr)
    shown = '' if chat or loaded.model.reads_source else prompt
    if judge is not None:
      texts = generate.generate(loaded.model, loaded.params, tokens, [prompt] * best_of, sampling, seed=seed, stop=stop,
                                max_tokens=max_tokens, mark=mark, bos=bos, window=window)
      show_best(judge, prompt, texts, n, shown)
      return
    rest = [''] * n
    begun, drafting = False, speculative.SelfSpeculation(draft) if draft else None
    for pieces in generate.stream(loaded.model, loaded.params, tokens, [prompt] * n, sampling,
                                  max_tokens=max_tokens, stop=stop, seed=seed, mark=mark, draft=drafting,
                                  bos=bos, window=window):
      print(pieces[0] if begun else shown + pieces[0], end='', flush=True)   # the first is shown as it is written
      begun = True
      rest = [text + piece for text, piece in zip(rest, pieces)]
    print()
    for text in rest[1:]:
      print(f'\n{"-" * 80}\n{shown}{text}')
    if drafting:
      print(f'drafts: {drafting.acceptance:.1%} accepted, {drafting.tokens_per_pass:.2f} tokens a forward pass',
            file=sys.stderr)


def show_best(judge: load.TrainedModel, prompt: str, texts: list[str], count: int, shown: str) -> None:
  """Prints the `count` texts of the highest rewards, the best first, after what is `shown` before each."""
  template = load.chat_template(judge.run.data)
  values = rewards.Judge(judge.model, judge.params, judge.tokenizer, template).answers([prompt] * len(texts), texts)
  for place, i in enumerate(sorted(range(len(texts)), key=lambda i: -values[i])[:count]):
    print(('' if place == 0 else f'\n{"-" * 80}\n') + shown + texts[i])
    print(f'reward {values[i]:.4f}, number {place + 1} of {len(texts)}', file=sys.stderr)


if __name__ == '__main__':
  launch.tool(main)
