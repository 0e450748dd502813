"""Records that become dialogues of bytes, and how these are shown."""
import json

from lm.data.batch import Dialogue
from lm.data.chat import dialogues
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes

USER, SAYS = (lambda text: {'role': 'user', 'content': text}), (lambda text: {'role': 'assistant', 'content': text})

B = Bytes()

END = B.control_id('<|end|>')


def opened(folder, records, kind=Dialogue, held_out=(), length=64, **options):
  texts = [json.dumps(record) for record in records]
  source = Source('made', {'train': texts, 'validation': [json.dumps(x) for x in held_out] or texts[:1]}, str(records))
  if not held_out:   # what is held out is dropped from train
    source = Source('made', {'train': texts}, str(records))
  lines = []
  data = dialogues.Dialogues(source, options.pop('tokenizer', B), length, kind, **options)
  return data.open(folder, lines.append), lines


def shown(dialogue: Dialogue) -> tuple[str, str]:
  """Returns the text of a dialogue, with the tokens that train in capitals and control tokens by their names."""
  names = {B.control_id(name): name for name in B.control_names}
  text = lambda i: names.get(int(i)) or chr(i)
  return ''.join(text(i).upper() if is_answer else text(i) for i, is_answer in zip(*dialogue))


TALK = '<s><|user|>hi<|end|><|assistant|>YO<|END|>'
