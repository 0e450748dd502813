"""A model as lm-evaluation-harness calls it: it scores continuations and documents, and writes text.

All processes of several hosts run the same requests in the same order, since each batch is split over all devices. So
the rank is 0 of 1 for the harness, and process 0 alone writes files. Answers are the same to the last bit for any
batch, except for text that is written, so no setting of a batch size is needed.
"""
import functools
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import generate, sharding
from lm.data.chat import conversation, templates
from lm.data.text import source
from lm.evaluate import continuations, score
from lm.evaluate.harness import requests as harness_requests
from lm.evaluate.harness.requests import Item
from lm.objectives.objective import causal_prompt
from lm.sharding import hosts

CHUNK = 256   # requests between two saves


class _Encoded(conversation.Conversation):
  """A tokenizer for `generate` whose prompts are token ids."""

  def encode_batch(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.int32(ids) for ids in prompts]


class Client:
  """The members of the harness's `TemplateLM`; `client_class` puts the two together."""
  backend = 'causal'
  tokenizer = None   # the harness asks tokenizers of Hugging Face for more than ours have

  def __init__(self, model: Any, params: Any, tokenizer: Any, template: conversation.Template | None = None,
               mark: Callable[[Any], Any] | None = causal_prompt, answers: Mapping[str, Any] | None = None,
               save: Callable[[Mapping[str, Any]], None] = lambda answers: None,
               show: Callable[[int, int], None] | None = None):
    """Makes a client of a decoder.

    Args:
      model: a decoder.
      params: its parameters.
      tokenizer: its tokenizer.
      template: its chat template; None for a model that was not trained to chat.
      mark: marks prompts as in training, as the `prompt` of an objective; None for a model that writes no text.
      answers: answers of an earlier client of the same model, by key; what is there is not computed again.
      save: called with all answers after each chunk of requests.
      show: called with the numbers of answered requests and of all; None shows the progress bars of the harness.

    Raises ValueError if the model is no decoder.
    """
    super().__init__()
    if not model.causal or model.reads_source:
      raise ValueError(f'the harness is for decoders, and a {type(model).__name__} is none; score it with '
                       'experiments/score.py')
    self._model, self._params, self._tokens, self._template, self._mark = model, params, tokenizer, template, mark
    self._answers = {key: tuple(answer) if isinstance(answer, list) else answer
                     for key, answer in hosts.from_process_0(dict(answers or {})).items()}
    self._save, self._show = save, show
    self.notes: list[str] = []   # what a reader of the results has to know

  @property
  def max_length(self) -> int:
    return self._model.max_length

  @property
  def eot_token_id(self) -> int:
    return self._tokens.eos_id

  @property
  def prefix_token_id(self) -> int:
    """bos, which is before a text that has no context."""
    return self._tokens.bos_id

  @property
  def tokenizer_name(self) -> str:
    return f'lm-{self._tokens.fingerprint}'

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the Jinja source of the template, or None if none is asked for. Raises ValueError if there is none."""
    if not chat_template:
      return None
    if isinstance(chat_template, str):
      raise ValueError(f'the chat template {chat_template!r} cannot be chosen by name; leave the name out, and the '
                       'template of the model is used')
    return self._renderer.source

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Returns the text of messages. Without the prompt for an answer, it ends with the content of the last message."""
    text = self._renderer.render(chat_history, add_generation_prompt)
    if add_generation_prompt:
      return text
    content = chat_history[-1]['content']
    place = text.rindex(content.strip())
    is_whole = text[place:].startswith(content.lstrip())
    return text[:place + len(content.lstrip() if is_whole else content.strip())]

  @functools.cached_property
  def _renderer(self) -> templates.JinjaTemplate:
    if self._template is None:
      raise ValueError('this model has no chat template; leave out apply_chat_template, or take a model that was '
                       'trained to chat')
    if isinstance(self._template, templates.JinjaTemplate):
      return self._template
    names = {self._tokens.control_id(name): name for name in self._tokens.control_names}
    variables = {'bos_token': names[self._tokens.bos_id], 'eos_token': names[self._tokens.eos_id]}
    return templates.JinjaTemplate(self._template.jinja(self._tokens), variables)

  @functools.cached_property
  def _control(self) -> re.Pattern[str]:
    return re.compile('|'.join(map(re.escape, self._tokens.control_names)))

  def _encode(self, texts: Sequence[str], bos: bool) -> list[list[int]]:
    """Returns the ids of texts, after bos if `bos` is true and a text does not begin with it.

    Names of control tokens are these tokens, as in the harness's own `hf` backend: chat templates write them.
    """
    plain = [i for i, text in enumerate(texts) if not self._control.search(text)]
    encoded = dict(zip(plain, self._tokens.encode_batch([texts[i] for i in plain])))
    rows = [(encoded[i] if i in encoded else self._tokens.parse(text)[0]).tolist() for i, text in enumerate(texts)]
    first = [self._tokens.bos_id]
    return [first + ids if bos and ids[:1] != first else ids for ids in rows]

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    """Returns the ids of a text, with one bos at most: by default if the tokenizer adds it to a text."""
    if kwargs:
      raise ValueError(f'tok_encode has no setting {next(iter(kwargs))!r}')
    return self._encode([string], self._tokens.adds_bos if add_special_tokens is None else add_special_tokens)[0]

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    return self._encode_pairs([(context, continuation)])[0]

  def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Returns (context ids, continuation ids) of pairs; the context has one token at least, which is bos if it is ''.

    Spaces at the end of a context go to the continuation, and both are encoded together, as the harness does it.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    endings = [context[len(stripped):] + text for stripped, (context, text) in zip(contexts, pairs)]
    bos = self._tokens.adds_bos
    context_ids = self._encode(contexts, bos)
    whole_ids = self._encode([context + text for context, text in zip(contexts, endings)], bos)
    alone_ids = self._encode(endings, False)
    result = []
    for (context, _), stripped_ids, whole, alone in zip(pairs, context_ids, whole_ids, alone_ids):
      continuation = whole[len(stripped_ids):] if context else alone
      if not continuation:   # a token spans the join
        continuation = alone
      if context and stripped_ids:
        result.append((stripped_ids, continuation))
      elif continuation[:1] == [self.prefix_token_id]:
        result.append((continuation[:1], continuation[1:]))
      else:
        result.append(([self.prefix_token_id], continuation))
    return result

  def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """Returns (log-probability of the continuation, whether each of its tokens is the most likely) of each request."""
    pairs = list(dict.fromkeys((context, text) for context, text in (request.args for request in requests)))
    encoded = dict(zip(pairs, self._encode_pairs(pairs)))
    self._note_cuts('loglikelihood', [sum(map(len, ids)) <= self.max_length + 1 for ids in encoded.values()])

    def compute(items: Sequence[Item]) -> list[tuple[float, bool]]:
      return self._loglikelihood_tokens([(item.args, *encoded[item.args]) for item in items])
    return self._answer('loglikelihood', requests, compute, disable_tqdm)

  def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                            ) -> list[tuple[float, bool]]:
    del disable_tqdm   # requests come in chunks, whose progress is shown
    texts = [np.int32([*context, *continuation][-max(len(continuation), self.max_length) - 1:])
             for _, context, continuation in requests]
    starts = [len(tokens) - len(continuation) for tokens, (_, _, continuation) in zip(texts, requests)]
    predicted = continuations.predictions(self._model, self._params, texts, starts)
    return [(float(one.log_p.sum(dtype=np.float64)), bool(one.correct.all())) for one in predicted]

  def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
    """Returns the log-probability of each document after one bos, in windows that score each token once."""
    def compute(items: Sequence[Item]) -> list[float]:
      texts = [np.int32(ids) for ids in self._encode([item.args[0] for item in items], True)]
      predicted = score.predictions(self._model, self._params, texts, window=self.max_length, stride=self.max_length)
      return [float(one.log_p.sum(dtype=np.float64)) for one in predicted]
    return self._answer('loglikelihood_rolling', requests, compute, disable_tqdm)

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    """Returns the continuation of each context, up to a stop string, the end of a text or of an answer.

    Raises ValueError, before anything is written, for a setting that is not obeyed.
    """
    if self._mark is None:
      raise ValueError('this model was trained to fill in tokens that are masked, and writes no text')
    writings = {str(request.args[1]): harness_requests.writing(request.args[1]) for request in requests}
    for writing in writings.values():
      if writing.max_tokens >= self.max_length:
        raise ValueError(f'a task asks for up to {writing.max_tokens} tokens (max_gen_toks), and the model reads '
                         f'{self.max_length} with the context; give fewer, with --gen_kwargs max_gen_toks=... of the '
                         'harness or max_tokens in a suite')
    contexts = list(dict.fromkeys(request.args[0] for request in requests))
    encoded = dict(zip(contexts, self._encode(contexts, self._tokens.adds_bos)))
    self._note_cuts('generate_until', [len(encoded[context]) + writings[str(settings)].max_tokens <= self.max_length
                                       for context, settings in (request.args for request in requests)])
    rows = sharding.padded_rows(16 if sharding.platform() == 'cpu' else 128)
    return self._answer(
        'generate_until', requests, lambda items: self._written(
            [encoded[item.args[0]] for item in items], writings[str(items[0].args[1])], items[0].copy), disable_tqdm,
        lambda args: not writings[str(args[1])].sampling.greedy, lambda item: (str(item.args[1]), item.copy), rows)

  def _written(self, contexts: Sequence[list[int]], writing: harness_requests.Writing, seed: int) -> list[str]:
    room = self.max_length - writing.max_tokens
    prompts = [ids[-room:] for ids in contexts]
    rows = 1 << (len(prompts) - 1).bit_length()   # few numbers of rows, so that few programs are compiled
    encoded = _Encoded(self._tokens, self._template or conversation.Plain())
    texts = generate.generate(self._model, self._params, encoded, prompts + prompts[-1:] * (rows - len(prompts)),
                              writing.sampling, max_tokens=writing.max_tokens, stop=writing.stop, seed=seed,
                              mark=self._mark)
    return texts[:len(prompts)]

  def _note_cuts(self, method: str, fits: Sequence[bool]) -> None:
    """Notes how many requests lose the beginning of their context, and says so on stderr."""
    if all(fits):
      return
    self.notes.append(f'{len(fits) - sum(fits):,} of {len(fits):,} {method} requests are longer, with their answer, '
                      f'than the {self.max_length} tokens that the model reads, and lose the beginning of the context')
    if jax.process_index() == 0:
      print(self.notes[-1], file=sys.stderr)

  def _answer(self, method: str, requests: Sequence[Any], compute: Callable[[Sequence[Item]], list[Any]],
              disable_tqdm: bool, is_drawn: Callable[[tuple[Any, ...]], bool] = lambda args: False,
              group: Callable[[Item], Any] = lambda item: 0, size: int | None = None) -> list[Any]:
    """Returns the answers to requests in their order; what has no answer yet is computed in chunks, and saved."""
    items = harness_requests.keys(method, [request.args for request in requests], is_drawn)
    new = list({item.key: item for item in items if item.key not in self._answers}.values())
    digest = hash(tuple(int(item.key[:8], 16) for item in new))
    if hosts.from_process_0(digest) != digest:
      raise ValueError(f'process {jax.process_index()} has other requests than process 0, since its cache has other '
                       'answers; delete the caches of the harness (--use_cache) of all processes')
    count = 0
    with self._bar(method, len(new), disable_tqdm) as bar:
      for chunk in harness_requests.chunks(new, group, size or CHUNK):
        for item, answer in zip(chunk, compute(chunk)):
          self._answers[item.key] = answer
          self.cache_hook.add_partial(method, item.args, answer)
        bar.update(len(chunk))
        count += len(chunk)
        self._save(self._answers)
        if self._show is not None:
          self._show(count, len(new))
    return [self._answers[item.key] for item in items]

  def _bar(self, method: str, total: int, disable_tqdm: bool) -> Any:
    from tqdm import tqdm
    hidden = disable_tqdm or self._show is not None or jax.process_index() > 0
    return tqdm(total=total, desc=f'Running {method} requests', disable=hidden)


def client_class(members: Mapping[str, Any] = types.MappingProxyType({})) -> type:
  """Returns `Client` as a class of the harness's models, with further members.

  Raises ImportError, which names the extra, without lm-evaluation-harness.
  """
  base = source.require('lm_eval.api.model', 'eval').TemplateLM
  return type('Client', (Client, base), dict(members))
