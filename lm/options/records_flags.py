"""Flags of records: prompts and answers, dialogues, or pairs of answers."""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from lm import load
from lm.data.chat import conversation, dialogues
from lm.data.chat.messages import Keys
from lm.data.text import compressed, corpora
from lm.data.text.source import unescaped
from lm.signature import AnyText


@dataclasses.dataclass(frozen=True)
class Records:
  r"""Records.

  Args:
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern; none generates puzzles.
    prompt: the field with the prompt, a text or messages.
    completion: the field with the answer to learn, a text or messages.
    encoding_errors: treatment of a line that is not valid UTF-8, an error, repair, or dropping it.
    decompressed_limit: limit on the size of a file after decompression, in GiB.
    validation: share of the records that is held out, above 0.
    plain: text between prompt and answer, such as \n, in place of a chat template.
    length: positions of a row; longer records are left out.
    allow_left_out: train even where half of the records or more are left out.
  """
  jsonl: str | None = None
  prompt: str = 'prompt'
  completion: str = 'completion'
  encoding_errors: corpora.Errors = 'strict'
  decompressed_limit: float = 64.
  validation: float = 0.05
  plain: AnyText | None = None
  length: int = 256
  allow_left_out: bool = False

  def __post_init__(self):
    corpora.check_validation(self.validation)
    compressed.check_limit(self.decompressed_limit)

  def source(self, puzzles: Callable[[], Any]) -> Any:
    """Returns the records of --jsonl; without it, those of `puzzles()`."""
    if not self.jsonl:
      return puzzles()
    return corpora.jsonl(self.jsonl, None, self.validation, self.encoding_errors, self.decompressed_limit)

  def template(self, default: conversation.Template | None) -> conversation.Template:
    """Returns the template of --plain, else that of the model, else one of turns."""
    if self.plain is not None:
      return conversation.Plain(unescaped(self.plain))
    return default or conversation.Turns()

  def dialogues(self, source: Any, base: load.BaseModel | None, tokenizer: Any, answer: str | None = None,
                messages: str = 'messages') -> dialogues.Dialogues:
    """Returns the records of a source as dialogues, in the tokens of the initial model, or of a tokenizer without one.

    `answer` is that of `Dialogues`, and `messages` the field with a whole dialogue.
    """
    return dialogues.Dialogues(
        source, base.tokenizer if base else tokenizer, self.length,
        template=self.template(base.template if base else None), allow_left_out=self.allow_left_out, answer=answer,
        longest=base.model.max_length if base else math.inf,
        keys=Keys(prompt=self.prompt, completion=self.completion, messages=messages))
