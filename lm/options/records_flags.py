"""Flags that name records: prompts and answers, dialogues, pairs."""
import dataclasses
from collections.abc import Callable
from typing import Any

from lm.data.chat import conversation
from lm.data.text import compressed, corpora
from lm.data.text.source import unescaped
from lm.signature import AnyText


@dataclasses.dataclass(frozen=True)
class Records:
  r"""Records.

  Args:
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern; none makes puzzles up.
    prompt: the field with what is asked, a text or messages.
    completion: the field with what is to be learned, a text or messages.
    encoding_errors: what happens to a line that is no UTF-8, an error, repair, or dropping it.
    decompressed_limit: GiB that a compressed file may unpack to.
    validation: share of the records that is held out, above 0.
    plain: write prompt and answer one after the other with this between them, such as \n, and no chat template.
    length: positions a row; longer records are left out.
    allow_left_out: train also where half of the records or more are left out.
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
    """The records of --jsonl; without it, those that `puzzles()` makes up."""
    if not self.jsonl:
      return puzzles()
    return corpora.jsonl(self.jsonl, None, self.validation, self.encoding_errors, self.decompressed_limit)

  def template(self, of_model: conversation.Template | None) -> conversation.Template:
    """How prompt and answer are written: as --plain says, or as the model's template does, or in turns."""
    if self.plain is not None:
      return conversation.Plain(unescaped(self.plain))
    return of_model or conversation.Turns()
