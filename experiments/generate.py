r"""Generates text with a trained run or a Hugging Face model, and prints it token by token.

  python experiments/generate.py --workdir=runs/quickstart --prompt="def " --temperature=0.8 --max_tokens=200
  python experiments/generate.py --workdir=runs/ahead --prompt="def " --draft=2
  python experiments/generate.py --workdir=runs/finetune_chat --chat --prompt="Reverse abcd"
  python experiments/generate.py --workdir=runs/finetune_chat --chat --prompt="Reverse abcd" --best_of=8 \
    --reward=runs/reward
  python experiments/generate.py --workdir=runs/quickstart --prompt="x = " --regex="[0-9]{1,4}"
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
         reward: pathlib.Path | None = None, json_schema: pathlib.Path | None = None, regex: str | None = None,
         mesh: str | None = None) -> None:
  """Prints the prompt and its completions; of an encoder-decoder, only the output.

  Args:
    workdir: workdir of the run; none for runs/quickstart.
    model: a Hugging Face folder, an imported model, an id on the hub or the workdir of a run, in place of --workdir.
    prompt: beginning of the text; an empty prompt begins a new document. For an encoder-decoder, the input.
    temperature: divisor of the logits; 0 chooses the most probable token each time.
    top_k: sample from the k most probable tokens; 0 for all.
    top_p: sample from the smallest set of tokens whose probabilities reach this sum; 1 for all.
    min_p: sample from the tokens with at least this share of the highest probability; 0 for all.
    repetition_penalty: values above 1 make tokens that are already in the text less probable.
    max_tokens: largest number of tokens to generate; none for 128, or fewer if the context of the model has room for
      fewer.
    window: continue beyond the context of the model; when it is full, its last half is read again.
    stop: end the text before this string; may be repeated for several strings, as in --stop=END --stop=STOP.
    n: number of completions.
    seed: seed of the sampling.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
    best: use the best checkpoint by the metric of the run, mostly the validation loss, instead of the newest.
    chat: use the prompt as the message of a user, with the chat template of the model, and print only the answer.
    bos: begin the prompt with the token bos, or not (--nobos); none does as the tokenizer or the chat template does.
    best_of: generate this many completions, and print the --n that the reward model rates highest; 0 for no reward
      model.
    reward: workdir of the reward model, see preference.py.
    json_schema: file of a JSON schema, which each completion has to match (pip install 'lm[serve]').
    regex: a regular expression, which each completion has to match as a whole.
    draft: number of tokens that are drafted at a time (speculative decoding), for a model trained with --predict_ahead;
      0 for no drafting.
  """
  workdir, model = load.run_or_model(workdir, model, best)
  sampling = generate.Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
  seeds.check(seed)
  if max_tokens is not None and max_tokens < 1 or '' in stop:
    raise ValueError(f'--max_tokens={max_tokens} must be at least 1, and no --stop may be empty')
  if n < 1 or min(draft, best_of) < 0:
    raise ValueError(f'--n={n} must be at least 1, and --draft={draft} and --best_of={best_of} must be 0 or more')
  if (best_of > 0) != (reward is not None) or 0 < best_of < n:
    raise ValueError(f'--best_of={best_of} and --reward={reward} go together, and --best_of must be at least --n={n}; '
                     'give both flags, or none')
  if max(n, best_of) > 1 and sampling.greedy:
    raise ValueError(f'all {max(n, best_of)} completions would be equal with --temperature=0; leave out this flag, or '
                     '--n and --best_of')
  grammar_text = generate.read_grammar(json_schema, regex)
  with jax.set_mesh(sharding.make_mesh(mesh)):
    loaded = pretrained.load(model) if model else load.open_trained(workdir, best)
    mark = causal_prompt if model else loaded.run.objective.prompt
    if mark is None:
      raise ValueError(f'the run in {workdir} was trained to fill in masked tokens, and does not generate text from '
                       'left to right; choose a run with another objective, such as next_token')
    if isinstance(loaded.model, Reward):
      raise ValueError(f'{workdir} is a reward model, which generates no text. To choose among the texts of another '
                       f'model, use --workdir=... --best_of=8 --reward={workdir}')
    if bos is not None and loaded.model.reads_source:
      raise ValueError(f'--{"" if bos else "no"}bos is for decoders; the output of an encoder-decoder always begins '
                       'with bos')
    tokens = load.chat_tokenizer(loaded) if chat else loaded.tokenizer
    grammar = None if grammar_text is None else generate.Grammars(tokens, loaded.model.vocab).compile(grammar_text)
    judge = None if reward is None else load.open_trained(reward)
    if judge and not isinstance(judge.model, Reward):
      raise ValueError(f'--reward={reward} is {load.kind(judge.model)}, and what is needed is a reward model; '
                       '"experiments/preference.py --method=reward" makes one')
    room = generate.room(loaded.model, tokens, [prompt], bos)
    if max_tokens is None and not window and room < generate.DEFAULT:
      print(f'up to {room} tokens, to the end of the context; --window continues beyond it', file=sys.stderr)
    shown = '' if chat or loaded.model.reads_source else prompt
    if judge is not None:
      texts = generate.generate(loaded.model, loaded.params, tokens, [prompt] * best_of, sampling, seed=seed, stop=stop,
                                max_tokens=max_tokens, mark=mark, bos=bos, window=window, grammar=grammar)
      show_best(judge, prompt, texts, n, shown)
      return
    drafting = speculative.SelfSpeculation(draft) if draft else None
    texts, prefix = [''] * n, shown
    for pieces in generate.stream(loaded.model, loaded.params, tokens, [prompt] * n, sampling,
                                  max_tokens=max_tokens, stop=stop, seed=seed, mark=mark, draft=drafting,
                                  bos=bos, window=window, grammar=grammar):
      print(prefix + pieces[0], end='', flush=True)   # only the first text is printed while it is generated
      prefix = ''
      texts = [text + piece for text, piece in zip(texts, pieces)]
    print()
    for text in texts[1:]:
      print(f'\n{"-" * 80}\n{shown}{text}')
    if drafting:
      print(f'drafts: {drafting.acceptance:.1%} accepted, {drafting.tokens_per_pass:.2f} tokens a forward pass',
            file=sys.stderr)


def show_best(judge: load.TrainedModel, prompt: str, texts: list[str], count: int, shown: str) -> None:
  """Prints the `count` texts with the highest rewards, the best first. `shown` is printed before each."""
  template = judge.run.data.template
  values = rewards.Judge(judge.model, judge.params, judge.tokenizer, template).answers([prompt] * len(texts), texts)
  for place, i in enumerate(sorted(range(len(texts)), key=lambda i: -values[i])[:count]):
    print(('' if place == 0 else f'\n{"-" * 80}\n') + shown + texts[i])
    print(f'reward {values[i]:.4f}, number {place + 1} of {len(texts)}', file=sys.stderr)


if __name__ == '__main__':
  launch.tool(main)
