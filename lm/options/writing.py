"""Flags of the texts that a model writes: how tokens are drawn, how long texts are, and prompts from a file."""
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Literal

from lm import seeds
from lm.generate import Drafter, DraftModel, Engine, PromptLookup, Sampling, read_grammar
from lm.generate.beam_search import Beams
from lm.generate.drafted_steps import MOST
from lm.generate.module_drafts import SelfSpeculation
from lm.signature import Texts


@dataclasses.dataclass(frozen=True)
class Drawing:
  """How a token is drawn.

  Args:
    temperature: divisor of the logits; 0 chooses the most probable token each time.
    top_k: sample from the k most probable tokens; 0 for all.
    top_p: sample from the smallest set of tokens whose probabilities reach this sum; 1 for all.
    min_p: sample from the tokens with at least this share of the highest probability; 0 for all.
    typical_p: sample from the tokens whose information is the nearest to the entropy, until their probabilities reach
      this sum; 1 for all.
    eta_cutoff: sample from the tokens with at least this probability, or less where the model is unsure; 0 for all.
    repetition_penalty: values above 1 make tokens that are already in the text less probable.
    seed: seed of the sampling.
  """
  temperature: float = 1.
  top_k: int = 0
  top_p: float = 1.
  min_p: float = 0.
  typical_p: float = 1.
  eta_cutoff: float = 0.
  repetition_penalty: float = 1.
  seed: int = 0

  def __post_init__(self):
    seeds.check(self.seed)
    self.sampling()

  def sampling(self) -> Sampling:
    return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
                    typical_p=self.typical_p, eta_cutoff=self.eta_cutoff)


@dataclasses.dataclass(frozen=True)
class Extent:
  """What is written.

  Args:
    max_tokens: largest number of tokens to generate; none for 128, or fewer if the context of the model has room for
      fewer.
    stop: end the text before this string; may be repeated for several strings, as in --stop=END --stop=STOP.
    n: number of completions.
    window: continue beyond the context of the model; when it is full, its last half is read again.
    bos: begin the prompt with the token bos, or not (--nobos); none does as the tokenizer or the chat template does.
  """
  max_tokens: int | None = None
  stop: Texts = ()
  n: int = 1
  window: bool = False
  bos: bool | None = None

  def __post_init__(self):
    if self.n < 1:
      raise ValueError(f'--n={self.n} must be at least 1')
    if self.max_tokens is not None and self.max_tokens < 1 or '' in self.stop:
      raise ValueError(f'--max_tokens={self.max_tokens} must be at least 1, and no --stop may be empty')


@dataclasses.dataclass(frozen=True)
class Form:
  """What each text has to match as a whole (pip install 'lm[serve]').

  Args:
    json_schema: file of a JSON schema.
    regex: a regular expression.
  """
  json_schema: pathlib.Path | None = None
  regex: str | None = None

  def grammar(self) -> str | None:
    """Returns the text of a grammar; None for any text. Raises ValueError for what is none, or for both flags."""
    return read_grammar(self.json_schema, self.regex)


@dataclasses.dataclass(frozen=True)
class Search:
  """Beam search, which prints the --n texts of the highest scores, and draws no tokens.

  Args:
    beams: number of beams; 0 for no search.
    length_penalty: the power of the number of tokens by which the log-probability of a text is divided.
    early_stopping: when the search ends after as many texts as beams are finished. true is at once, false is when no
      beam, with its present length, scores higher than these texts, and never is when none would with any length.
  """
  beams: int = 0
  length_penalty: float = 1.
  early_stopping: Literal['true', 'false', 'never'] = 'false'

  def __post_init__(self):
    if self.beams < 0:
      raise ValueError(f'--beams={self.beams} must be 0 or more')
    if self.beams:
      self.settings()
    elif (self.length_penalty, self.early_stopping) != (1., 'false'):
      raise ValueError(f'--length_penalty={self.length_penalty:g} and --early_stopping={self.early_stopping} are for '
                       '--beams, which is not given; leave them out')

  def settings(self) -> Beams:
    return Beams(self.beams, self.length_penalty, self.early_stopping)


def _check_lookup(lookup: int) -> None:
  """Raises ValueError for a number of tokens that cannot be drafted at a time."""
  if not 0 <= lookup <= MOST:
    raise ValueError(f'--lookup={lookup} must be from 0 (for no drafts) to {MOST}')


@dataclasses.dataclass(frozen=True)
class Drafts:
  """Tokens that are drafted, and verified in one pass of the model (speculative decoding).

  Args:
    draft: number of tokens that are drafted at a time, for a model trained with --predict_ahead; 0 for no drafting.
    lookup: number of tokens that are drafted at a time from where the last ones stood before in the text, for any
      decoder; 0 for no drafting.
  """
  draft: int = 0
  lookup: int = 0

  def __post_init__(self):
    _check_lookup(self.lookup)
    if self.draft < 0:
      raise ValueError(f'--draft={self.draft} must be 0 or more')

  def make(self) -> SelfSpeculation | PromptLookup | None:
    if self.lookup:
      return PromptLookup(self.lookup)
    return SelfSpeculation(self.draft) if self.draft else None


@dataclasses.dataclass(frozen=True)
class ServedDrafts:
  """Tokens that are drafted, and read in one pass of the model (speculative decoding); answers stay the same.

  Args:
    lookup: number of tokens that are drafted at a time from where the last ones stood before in the text; 0 for none.
    draft_model: a smaller model with the same tokens, like --model, which drafts them instead.
    drafts: number of tokens that it drafts at a time.
  """
  lookup: int = 0
  draft_model: str | None = None
  drafts: int = 4

  def __post_init__(self):
    if self.lookup and self.draft_model is not None:
      raise ValueError(f'--lookup={self.lookup} and --draft_model={self.draft_model} exclude each other; leave one of '
                       'them out')
    if self.draft_model is None and self.drafts != 4:
      raise ValueError(f'--drafts={self.drafts} is for --draft_model, which is not given; leave it out')
    _check_lookup(self.lookup)
    if not 1 <= self.drafts <= MOST:
      raise ValueError(f'--drafts={self.drafts} must be from 1 to {MOST}')

  def make(self, engine: Callable[[str], Engine]) -> Drafter | None:
    """Returns the drafter; `engine` opens a model."""
    if self.lookup:
      return PromptLookup(self.lookup)
    return None if self.draft_model is None else DraftModel(engine(self.draft_model), self.drafts)


@dataclasses.dataclass(frozen=True)
class BestOf:
  """The choice among texts by a reward model.

  Args:
    best_of: generate this many completions, and print the --n that the reward model rates highest; 0 for no reward
      model.
    reward: workdir of the reward model, see preference.py.
  """
  best_of: int = 0
  reward: pathlib.Path | None = None

  def __post_init__(self):
    if self.best_of < 0:
      raise ValueError(f'--best_of={self.best_of} must be 0 or more')
    if (self.best_of > 0) != (self.reward is not None):
      raise ValueError(f'--best_of={self.best_of} and --reward={self.reward} go together; give both flags, or none')


@dataclasses.dataclass(frozen=True)
class PromptsFile:
  """Prompts from a file.

  Args:
    prompts: a file with a prompt in each line, as {"prompt": "some text"}, beside which settings such as "temperature",
      "max_tokens", "n", "seed", "stop" and an "id" may stand; with --chat also as {"messages": [...]}.
    out: the file of the answers, one line each. The same command continues a file that was interrupted.
    rows: number of texts that are written at the same time.
  """
  prompts: pathlib.Path | None = None
  out: pathlib.Path | None = None
  rows: int = 8

  def __post_init__(self):
    if (self.prompts is None) != (self.out is None):
      raise ValueError(f'--prompts={self.prompts} and --out={self.out} go together; give both flags, or none')
    if self.prompts is not None and self.prompts.resolve() == self.out.resolve():
      raise ValueError(f'--out={self.out} is the file of --prompts; give another one')
    if self.rows < 1:
      raise ValueError(f'--rows={self.rows} must be at least 1')
    if self.rows != 8 and self.prompts is None:
      raise ValueError(f'--rows={self.rows} is for --prompts, which is not given; leave it out')


def check_together(is_session: bool, prompt: str, drawing: Drawing, extent: Extent, drafts: Drafts, search: Search,
                   best_of: BestOf, file: PromptsFile, form: Form) -> None:
  """Raises ValueError for flags that contradict one another, or have no effect beside others.

  `is_session` says whether messages are read from the terminal.
  """
  ways = {'--prompts': file.prompts, '--chat without --prompt': is_session, '--beams': search.beams,
          '--best_of': best_of.best_of, '--draft': drafts.draft, '--lookup': drafts.lookup}
  used = [name for name, value in ways.items() if value]
  if len(used) > 1:
    raise ValueError(f'{used[0]} and {used[1]} exclude each other; leave one of them out')
  for flag, value in (('--json_schema', form.json_schema), ('--regex', form.regex)):
    if value is not None and used and used[0] in ('--beams', '--draft', '--lookup'):
      raise ValueError(f'{used[0]} and {flag} exclude each other; leave one of them out')
  count = max(extent.n, best_of.best_of)
  for flag, most in (('best_of', best_of.best_of), ('beams', search.beams)):
    if 0 < most < extent.n:
      raise ValueError(f'--{flag}={most} must be at least --n={extent.n}')
  if count > 1 and drawing.sampling().greedy:
    raise ValueError(f'all {count} completions would be equal with --temperature=0; leave out this flag, or '
                     '--n and --best_of')
  unused = {}
  if file.prompts is not None:
    unused = {'prompt': prompt, 'window': extent.window}
  elif is_session:
    unused = {'window': extent.window, 'n': extent.n if extent.n > 1 else 0}
  elif search.beams:
    changed = {field.name: getattr(drawing, field.name) for field in dataclasses.fields(drawing)
               if getattr(drawing, field.name) != field.default}
    unused = {'window': extent.window, 'stop': extent.stop, **{name: f'{value:g}' for name, value in changed.items()}}
  for name, value in unused.items():
    if value:
      raise ValueError(f'--{name}={value} has no effect with {used[0]}; leave one of them out')
