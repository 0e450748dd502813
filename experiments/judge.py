r"""Lets a chat model judge outputs of systems in pairs, in both orders, and compares it with people. Optional.

  python experiments/judge.py --outputs=a.jsonl,b.jsonl --address=http://localhost:8000/v1 --model=judge
  python experiments/judge.py --outputs=a.jsonl,b.jsonl --address=https://api.example.com/v1 --model=large \
      --key_variable=API_KEY --votes=votes.csv

The model is behind any address that speaks OpenAI's protocol. A judge model is no replacement for people: --votes takes
what human_eval.py exports, and says how far it agrees with them.
"""
import json
import os
import pathlib

from lm import launch
from lm.evaluate import chat_endpoint, chat_judge, people
from lm.evaluate.people import exports, system_outputs
from lm.workdir import atomic


def judge(*, outputs: tuple[str, ...], address: str, model: str, key_variable: str | None = None,
          votes: pathlib.Path | None = None, replies: pathlib.Path = pathlib.Path('judge-replies.jsonl'),
          out: pathlib.Path | None = None, parallel: int = 1, max_tokens: int = 1024, seconds: float = 120.,
          attempts: int = 6) -> None:
  """Judges outputs by a chat model. The prompts and outputs are sent to the address, and to nothing else.

  Args:
    outputs: a file of outputs for each system, as file or name=file, as for human_eval.py.
    address: of the server, such as http://localhost:8000/v1.
    model: the name of the model, as the server has it.
    key_variable: the environment variable that holds the key of the server; none sends no key.
    votes: the CSV file of people's votes that human_eval.py exports, to compare with.
    replies: the file that keeps replies; a run that was stopped goes on from it, and asks nothing twice.
    out: a JSON file for the judgements.
    parallel: requests that are sent at once.
    max_tokens: the most tokens of a reply.
    seconds: how long to wait for a reply.
    attempts: how often a request is sent before the run stops.
  """
  files = system_outputs.named_files(outputs)
  if len(files) < 2 or parallel < 1:
    raise ValueError(f'--outputs has {len(files)} systems and --parallel is {parallel}; pairs need two systems, and '
                     'requests are sent at least one at a time')
  key = os.environ.get(key_variable) if key_variable else None
  if key_variable and not key:
    raise ValueError(f'--key_variable={key_variable}, but the environment has no such variable; export it first')
  for file in filter(None, (out, replies)):
    file.parent.mkdir(parents=True, exist_ok=True)
  items, preferred = system_outputs.read(files), chat_judge.preferences(votes) if votes else None
  systems = set().union(*(pair for _, pair in preferred)) if preferred else set()
  if preferred and not systems & files.keys():
    raise ValueError(f'{votes} has votes on {", ".join(sorted(systems))}, and --outputs has {", ".join(files)}; name '
                     'the outputs alike, with name=file')
  endpoint = chat_endpoint.Endpoint(address, model, key, max_tokens, seconds, attempts)
  judge_model = chat_endpoint.KeptReplies(endpoint, replies)
  print(f'asking {model} at {endpoint.url} about {len(items):,} items, each pair in both orders', flush=True)

  def show(count: int, total: int) -> None:
    if count == total or not count % 20:
      print(f'{count:,} of {total:,} pairs', flush=True)

  judgements = chat_judge.judge(items, list(files), judge_model.ask, parallel, show)
  results = chat_judge.summarise(judgements, preferred)
  if out:
    content = {'model': model, 'address': address, 'caution': chat_judge.CAUTION, **exports.as_json(results),
               'judgements': [{**one._asdict(), 'verdict': one.verdict} for one in judgements]}
    atomic.write(out, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + '\n')
  print(f'{judge_model.sent:,} requests were sent, and all replies are in {replies}\n\n{people.as_text(results)}')


if __name__ == '__main__':
  launch.tool(judge)
