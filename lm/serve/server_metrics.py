"""The figures of a server for Prometheus, by the names that vLLM gives them, so that its dashboards fit."""
import threading
import time
from collections.abc import Sequence
from typing import Any

from lm.data.text.source import require
from lm.generate import Event, Request
from lm.serve.engine_thread import StepEngine

_FIRST = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_BETWEEN = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


def token_buckets(most: int) -> list[int]:
  """Returns 1, 2, 5, 10, 20, ... up to `most`: the buckets of numbers of tokens."""
  buckets, unit = [], 1
  while unit <= most:
    buckets += [digit * unit for digit in (1, 2, 5) if digit * unit <= most]
    unit *= 10
  return buckets


class ServerMetrics:
  """Counts requests and tokens. All methods may be called by any thread."""

  def __init__(self, model: str, most_tokens: int, engine: StepEngine):
    """Makes the metrics of a model and its engine."""
    self._library = prometheus = require('prometheus_client', 'serve')
    self._registry = registry = prometheus.CollectorRegistry()
    labels, values = ('model_name', 'engine'), (model, '0')
    tokens = token_buckets(most_tokens)

    def counter(name: str, note: str) -> Any:
      return prometheus.Counter(f'vllm:{name}', note, labels, registry=registry).labels(*values)

    def histogram(name: str, note: str, buckets: Sequence[float]) -> Any:
      return prometheus.Histogram(f'vllm:{name}', note, labels, registry=registry, buckets=buckets).labels(*values)

    self._prompt = counter('prompt_tokens', 'Tokens of prompts.')
    self._written = counter('generation_tokens', 'Tokens of answers.')
    self._ended = prometheus.Counter('vllm:request_success', 'Answers that ended.', (*labels, 'finished_reason'),
                                     registry=registry)
    self._values = values
    self._first = histogram('time_to_first_token_seconds', 'From the arrival to the first token.', _FIRST)
    self._between = histogram('inter_token_latency_seconds', 'Between tokens of an answer.', _BETWEEN)
    self._whole = histogram('e2e_request_latency_seconds', 'From the arrival to the last token.', _WHOLE)
    self._queue = histogram('request_queue_time_seconds', 'From the arrival until the prompt is being read.', _WHOLE)
    self._prefill = histogram('request_prefill_time_seconds', 'From then to the first token.', _WHOLE)
    self._decode = histogram('request_decode_time_seconds', 'From the first to the last token.', _WHOLE)
    self._prompt_size = histogram('request_prompt_tokens', 'Tokens of a prompt.', tokens)
    self._answer_size = histogram('request_generation_tokens', 'Tokens of an answer.', tokens)
    self._limit = histogram('request_params_max_tokens', 'The largest number of tokens of an answer.', tokens)
    self._choices = histogram('request_params_n', 'Answers to a prompt.', (1, 2, 5, 10, 20))
    for name, note, figure in (
        ('vllm:num_requests_running', 'Answers that are being written.', lambda: engine.running),
        ('vllm:num_requests_waiting', 'Requests that wait for a row.', lambda: engine.waiting),
        ('lm:compilations_after_warmup', 'Programs compiled since the start, of embeddings too.',
         lambda: engine.compilations)):
      prometheus.Gauge(name, note, labels, registry=registry).labels(*values).set_function(figure)
    if engine.pool is not None:
      gauge = prometheus.Gauge('vllm:kv_cache_usage_perc', 'The used share of the pages; 1 is all.', labels,
                               registry=registry)
      gauge.labels(*values).set_function(lambda: engine.pool.used / engine.pool.total)
    # Figures that the engine counts itself: the counter, and the function that gives the total so far.
    self._totals = []
    if engine.pool is not None:
      self._totals += [
          (counter('prefix_cache_queries', 'Tokens of prompts that were looked up in pages.'),
           lambda: engine.prompt_tokens),
          (counter('prefix_cache_hits', 'Those of them that were not read again.'), lambda: engine.shared_tokens)]
    drafter = engine.drafter
    if drafter is not None:
      self._totals += [
          (counter('spec_decode_num_drafts', 'Passes of the model over drafts of an answer.'), lambda: drafter.passes),
          (counter('spec_decode_num_draft_tokens', 'Drafted tokens.'), lambda: drafter.proposed),
          (counter('spec_decode_num_accepted_tokens', 'Those of them that are in answers.'), lambda: drafter.accepted)]
    self._counted = [0] * len(self._totals)
    # Of each choice: the arrival, the first and the last token, and the number of tokens.
    self._times: dict[tuple[Request, int], list[float]] = {}
    self._lock = threading.Lock()

  def arrive(self, requests: Sequence[Request]) -> None:
    """Counts answers that are to be written."""
    for request in requests:
      with self._lock:
        for choice in range(request.choices):
          self._times[request, choice] = [time.perf_counter(), 0., 0., 0]
      self._prompt.inc(request.prompt_size)
      self._prompt_size.observe(request.prompt_size)
      self._limit.observe(request.max_tokens or 0)
      self._choices.observe(request.choices)

  def observe(self, event: Event) -> None:
    """Counts new tokens of an answer, and its end."""
    times, now, count = self._times.get((event.request, event.choice)), time.perf_counter(), len(event.ids)
    if times is None:
      return
    if count:
      self._written.inc(count)
      if times[3] == 0:
        self._first.observe(now - times[0])
        self._queue.observe(event.reading_start - times[0])
        self._prefill.observe(now - event.reading_start)
        times[1] = now
      else:
        for _ in range(count):
          self._between.observe((now - times[2]) / count)
      times[2], times[3] = now, times[3] + count
    if event.finish_reason is not None:
      self.end(event.request, event.choice, event.finish_reason)

  def end(self, request: Request, choice: int, reason: str) -> None:
    """Counts the end of an answer, once: a reason of `Event`; 'abort' where nobody reads it any more."""
    with self._lock:
      times = self._times.pop((request, choice), None)
    if times is None:
      return
    now = time.perf_counter()
    self._ended.labels(*self._values, reason).inc()
    self._answer_size.observe(times[3])
    if reason != 'abort':
      self._whole.observe(now - times[0])
      self._decode.observe(now - (times[1] or now))

  def text(self) -> bytes:
    """Returns all figures."""
    with self._lock:
      totals = [function() for _, function in self._totals]
      for (counter, _), total, before in zip(self._totals, totals, self._counted):
        counter.inc(total - before)
      self._counted = totals
    return self._library.generate_latest(self._registry)
