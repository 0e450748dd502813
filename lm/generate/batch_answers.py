"""Answers to the prompts of a file, written by a scheduler into the file of answers."""
import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm import sharding
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.choice_text import Piece
from lm.generate.completion import round_up_slots
from lm.generate.engine import Engine, longest_text
from lm.generate.grammars import Grammar
from lm.generate.prompts_file import AnswersFile, PromptLine, Prompts, raise_all
from lm.generate.request import Request
from lm.generate.scheduler import Scheduler
from lm.generate.text import DEFAULT
from lm.generate.text_stream import text_and_source, with_bos
from lm.generate.written_requests import TextRequest, pieces

_TOKENS_PER_STEP = 4     # tokens of each row between which requests join and leave


def _encode(line: PromptLine, model: Any, tokenizer: Tokenizer, bos: bool | None) -> np.ndarray:
  """Returns the ids of a prompt, one at least. Raises ValueError where a chat template does not take the messages."""
  ids = np.asarray(tokenizer.encode_batch([line.prompt])[0], np.int32)
  if model.reads_source:
    return np.int32([*ids, tokenizer.eos_id])
  ids = with_bos(ids, tokenizer, bos)
  return ids if len(ids) else np.int32([tokenizer.bos_id])


def make_scheduler(model: Any, params: Any, tokenizer: Tokenizer, slots: int, rows: int) -> Scheduler:
  """Returns a scheduler for texts of up to `slots` tokens, or as many as the model reads at once.

  It has `rows` rows, or more where a mesh cannot split as few.
  """
  slots = min(round_up_slots(slots), model.max_length)
  engine = Engine(model, model.unstack(params), slots, tokenizer.vocab_size, tuple(tokenizer.eos_ids))
  return Scheduler(engine, sharding.padded_rows(rows), tokens_per_step=_TOKENS_PER_STEP if rows > 1 else 1)


def answer_prompts(model: Any, params: Any, tokenizer: Tokenizer, prompts: Prompts, answers: AnswersFile,
                   bos: bool | None, rows: int, report: Callable[[int], None] = lambda count: None,
                   grammar: Grammar | None = None) -> None:
  """Answers the prompts that have no answers yet. Each line of answers is written when it is whole.

  Args:
    model: a decoder that writes from left to right after any prompt, or an encoder-decoder, whose source it is.
    params: its parameters.
    tokenizer: that of the model, or of a conversation.
    prompts: those of a file.
    answers: the file of answers.
    bos: whether a prompt begins with bos; None decides as the tokenizer or the chat template does.
    rows: the number of texts that are written at the same time.
    report: is called with the number of prompts that have answers, after each.
    grammar: what each answer has to match; None for any text.

  Raises:
    ValueError: lines cannot be answered, such as those that are longer than the context; it names them, before
      anything is computed.
  """
  requests, problems = {}, []
  context = longest_text(model)
  for line in prompts.lines:
    if line.id in answers.finished:
      continue
    try:
      ids, max_tokens = _encode(line, model, tokenizer, bos), line.settings['max_tokens']
    except ValueError as error:
      problems.append((line.number, str(error)))
      continue
    ids, source = text_and_source(model, tokenizer.bos_id, ids)
    if max_tokens is None:
      max_tokens = max(min(DEFAULT, context - len(ids)), 1)
    request = Request(ids, line.sampling, max_tokens, line.settings['seed'], line.settings['n'], grammar=grammar,
                      source=source)
    requests[request] = line
  needed = max((max(len(request.ids) + request.max_tokens, request.prompt_size) for request in requests), default=1)
  scheduler = make_scheduler(model, params, tokenizer, needed, rows)
  for request, line in requests.items():
    try:
      request.check(scheduler.engine, scheduler.context)
    except ValueError as error:
      problems.append((line.number, str(error)))
  raise_all(sorted(problems), prompts.path)
  written = collections.defaultdict(list)
  text_requests = (TextRequest(request, tuple(line.settings['stop'])) for request, line in requests.items())
  for (request, _), piece in pieces(scheduler, tokenizer, text_requests):
    written[request].append(piece)
    if sum(piece.finish is not None for piece in written[request]) == request.choices:
      own = written.pop(request)
      answers.add(requests[request], [_answer(own, choice) for choice in range(request.choices)])
      report(len(answers.finished))


def _answer(own: Sequence[Piece], choice: int) -> dict[str, Any]:
  """Returns what the file says of a choice, given the pieces of all choices."""
  own = [piece for piece in own if piece.choice == choice]
  scores = [token.log_probability for piece in own for token in piece.tokens]
  return {'text': ''.join(piece.text for piece in own), 'finish_reason': own[-1].finish, 'tokens': len(scores),
          'log_probability': sum(scores)}
