"""Held-out questions that are put to a model, and its replies beside the answers of the records."""
from collections.abc import Mapping, Sequence

from lm.data.chat import conversation, dialogues, messages

Question = tuple[messages.Messages, str]   # the dialogue up to an answer, and that answer


def held_out(data: dialogues.Dialogues, tokenizer: conversation.Conversation, count: int, room: int) -> list[Question]:
  """Returns those of the first `count` held-out questions that are, as their answers, below `room` tokens."""
  return [(question, answer) for question, answer in data.questions('validation', count)
          if max(len(tokenizer.encode_batch([question])[0]), len(tokenizer.encode(answer))) < room]


def show(questions: Sequence[Question], replies: Mapping[str, Sequence[str]], answer_name: str) -> None:
  """Prints the first four questions, the replies of each model by its name, and the answer of the record."""
  for i, (question, answer) in list(enumerate(questions))[:4]:
    print(f'\n> {question[-1]["content"]}')
    for name, text in (*((name, texts[i]) for name, texts in replies.items()), (answer_name, answer)):
      print(f'{name:6}  {text[:200]!r}')
