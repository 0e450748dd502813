"""Held-out questions, and replies of models beside the answers in the records."""
from collections.abc import Mapping, Sequence

from lm.data.chat import conversation, dialogues, messages

Question = tuple[messages.Messages, str]   # the dialogue up to an answer, and that answer


def held_out(data: dialogues.Dialogues, tokenizer: conversation.Conversation, count: int, room: int,
             split: str = 'validation', longest: int | None = None) -> list[Question]:
  """Returns those of the first `count` questions of a split whose answers have fewer than `room` tokens.

  The questions have fewer than `longest` tokens, with all that is before them; None for `room`.
  """
  limit = room if longest is None else longest
  return [(question, answer) for question, answer in data.questions(split, count)
          if len(tokenizer.encode_batch([question])[0]) < limit and len(tokenizer.encode(answer)) < room]


def show(questions: Sequence[Question], replies: Mapping[str, Sequence[str]], answer_name: str) -> None:
  """Prints the first four questions, each with the replies of the models, by name, and the answer in the record."""
  for i, (question, answer) in list(enumerate(questions))[:4]:
    print(f'\n> {question[-1]["content"]}')
    for name, text in (*((name, texts[i]) for name, texts in replies.items()), (answer_name, answer)):
      print(f'{name:6}  {text[:200]!r}')
