"""Continuous batching: requests join the rows of a decoding state and leave them between steps, in arrival order.

  scheduler = Scheduler(Engine(model, model.unstack(params), slots=1024, vocab=tokenizer.vocab_size, ends=eos_ids))
  scheduler.warm_up()                                  # compiles everything; `scheduler.compilations` then stays 0
  request = Request(ids, Sampling(0.8, top_p=0.95), max_tokens=100, seed=7)
  scheduler.submit(request)                            # ValueError if it can never run
  while scheduler.is_busy:
    for event in scheduler.step():                     # reads a part of a prompt, then draws the next tokens of rows
      event.request, event.choice, event.ids, event.log_probabilities, event.finish_reason
  scheduler.abort(request)                             # its rows are free at once, and its last events say 'abort'
  scheduler.abort(request, choice)                     # this row alone is

All is synchronous, and one thread may use it. Token ids go in and come out; stop strings are of the layer of text,
which holds back partial matches and calls `abort`. The last event of each choice has a `finish_reason`: 'stop' (its
last id is one of the engine's ends or of the request's `stop_ids`), 'length', 'abort', or 'grammar' (the parser of the
request's grammar has reached its limits).

In float32, the ids and log-probabilities of a request depend, to the last bit, on the request alone: not on the
requests beside it, nor on the order of arrival. They do depend on the number of rows, because other shapes are rounded
differently.

With a `drafter`, a step gives a row one token or more (`drafted_steps`), and all this holds too. The tokens and numbers
of a request are then those without one, up to rounding.
"""
import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from lm import sharding
from lm.generate import compilations
from lm.generate.drafted_steps import Drafter
from lm.generate.engine import CHUNK, Engine, Tokens, longest_text
from lm.generate.grammars import allowed_tokens
from lm.generate.page_pool import prefix_keys
from lm.generate.request import Event, Request, Scores
from lm.generate.sampling import Sampling
from lm.generate.scheduled import NO_SCORES, PromptReading, WrittenChoice, row_scores
from lm.generate.slots import WIDTHS, Slots, usable_widths
from lm.models import paged


class Scheduler:
  """Serves requests with an engine; see the docstring of the module.

  Args:
    engine: decodes; `engine.slots` is the longest text, prompt and output together.
    rows: the number of choices that are written at once, a multiple of the parts into which the mesh splits rows.
    widths: of the chunks in which prompts are read; 1 is one of them. A step reads about as many tokens as the largest
      while rows are being written.
    tokens_per_step: the number of tokens of each row in a step; fewer let requests join and leave earlier. While a row
      has a grammar, it is 1.
    pages: the number of pages of the cache, each of which has as many slots as the largest width. A request takes those
      for its prompt and its new tokens when it joins, and shares those of a prefix that another prompt has too, which
      is then not read again. None for as many as all rows can need, or for 0 where the cache cannot have pages, see
      `paged.obstacle`. With 0, each row has `engine.slots` slots of its own. Layers with a window have at most as many
      pages, see `page_pools`. No text is longer than all pages together.
    drafter: drafts tokens, if any; it may not serve another scheduler. Rows with a grammar have no drafts.

  Raises:
    ValueError: a number is out of range; the mesh, the engine, its cache or the drafter does not fit.
  """

  def __init__(self, engine: Engine, rows: int = 8, widths: Sequence[int] = WIDTHS, tokens_per_step: int = 1,
               pages: int | None = None, drafter: Drafter | None = None):
    if engine.spare_slots:
      raise ValueError(f'{type(engine).__name__} of {type(engine.model).__name__} cannot read prompts in chunks; give '
                       'an Engine')
    model, parts = engine.model, sharding.parts('B')
    if rows < 1 or rows % parts or not 1 <= tokens_per_step <= CHUNK:
      raise ValueError(f'rows={rows} must be a positive multiple of {parts}, into which the mesh splits them, '
                       f'and tokens_per_step={tokens_per_step} from 1 to {CHUNK}')
    self.context = int(min(engine.slots, longest_text(model)))   # the tokens of the longest text, also of a scored one
    self.engine, self.tokens_per_step = engine, tokens_per_step
    widths = usable_widths(widths, self.context)
    if pages is None:
      pages = rows * -(-engine.slots // widths[0]) + 1 if paged.obstacle(model) is None else 0
    if pages < 0 or pages == 1:
      raise ValueError(f'pages={pages} must be 0 or at least 2, because no text uses page 0')
    self.drafter = drafter
    if drafter is not None:
      if tokens_per_step != 1:
        raise ValueError(f'tokens_per_step={tokens_per_step} must be 1 with drafts, which follow each pass')
      drafter.prepare(engine, rows, widths, self.context)
    slots = engine.slots + (0 if drafter is None else drafter.drafts)   # drafts may be behind the last token
    self._slots = Slots(dataclasses.replace(engine, slots=slots), rows, widths, pages)
    self._state = self._slots.empty()
    self.pool = self._slots.pools()   # which pages are used; None without pages
    if self.pool is not None:
      self.context = min(self.context, self.pool.longest)
    self.sharing_obstacle = self._sharing_obstacle()   # why prompts do not share prefixes; None if they do
    self.prompt_tokens = 0   # of all prompts so far
    self.shared_tokens = 0   # those of them that were in pages, and not read again
    self._waiting: collections.deque[Request] = collections.deque()
    self._reading: PromptReading | None = None
    self._rows: list[WrittenChoice | None] = [None] * rows
    self._events: list[Event] = []
    self._compiled_before = compilations.count()

  def _sharing_obstacle(self) -> str | None:
    if self.pool is None:
      return paged.obstacle(self.engine.model) or 'pages=0'
    return None if paged.has_all_in_pages(self._state.cache) else 'some layers keep a state that is not in pages'

  @property
  def running(self) -> int:
    """The number of rows that are being written."""
    return sum(row is not None for row in self._rows)

  @property
  def waiting(self) -> int:
    """The number of requests that are not, or not wholly, in rows."""
    return len(self._waiting) + (self._reading is not None)

  @property
  def is_busy(self) -> bool:
    """Whether `step` has anything to do."""
    return bool(self.running or self.waiting or self._events)

  @property
  def compilations(self) -> int:
    """How many programs this process has compiled since `warm_up`; see `compilations`."""
    return compilations.count() - self._compiled_before

  def warm_up(self) -> None:
    """Compiles all programs that requests need. Call it before the first request."""
    reads_source = self.engine.model.reads_source
    source = [0] if reads_source else None
    count = min(2, self.context - 1)   # of tokens that are written
    for seed in 0, 2 ** 40:   # seeds of one and of two words
      self.submit(Request([0], Sampling(min_tokens=count), max_tokens=count, seed=seed, source=source))
    for width in self._slots.widths:
      self.submit(Request([0] * (width + reads_source), max_tokens=0, source=source))
    for width in self._slots.source_widths() if reads_source else ():
      self.submit(Request([0], max_tokens=0, source=[0] * width))
    while self.is_busy:
      self.step()
    if self.drafter is not None:
      for width in self._slots.widths:
        self.drafter.join(np.zeros(width, np.int32), 0)
      self.drafter.clear()
    self._state = self.engine.evict(self._state, [])
    if self.pool is not None:
      self._slots.read_prefix(self._state, self.pool.find([]))
    self.prompt_tokens = 0
    self._compiled_before = compilations.count()

  def submit(self, request: Request) -> None:
    """Adds a request behind those that wait. Raises ValueError, which names the value, if it can never run."""
    request.check(self.engine, self.context, self._slots.adapters)
    if self.pool is not None:
      length = len(request.ids)
      full = length // self._slots.size if self.sharing_obstacle is None else 0
      self.pool.check(full, length, length + request.limit(self.context))
    self._waiting.append(request)

  def abort(self, request: Request, choice: int | None = None) -> None:
    """Ends a request, or one choice that is being written: rows are free at once, the next step gives the last events.

    A choice that waits for a row, or that has ended, is left alone.
    """
    aborted = []
    if choice is None and request in self._waiting:
      self._waiting.remove(request)
      aborted += range(request.choices)
    elif choice is None and self._reading is not None and self._reading.request is request:
      aborted += range(self._reading.choice, request.choices)
      self._reading = None
    rows = [i for i, row in enumerate(self._rows)
            if row is not None and row.request is request and choice in (None, row.choice)]
    aborted += [self._rows[i].choice for i in rows]
    self._free(rows)
    self._events += [Event(request, each, [], NO_SCORES, 'abort') for each in sorted(aborted)]

  def step(self) -> list[Event]:
    """Lets requests join as far as rows are free, then draws the next tokens of each row. Returns what is new."""
    self._admit()
    if self.running:
      matchers = [row and row.matcher for row in self._rows]
      allowed = allowed_tokens(matchers, self.engine.model.vocab)
      if self.drafter is None:
        self._state, tokens = self.engine.step(self._state, self.tokens_per_step if allowed is None else 1, allowed)
      else:
        texts = [row.text[:row.size] if row is not None and row.matcher is None else None for row in self._rows]
        self._state, tokens = self.drafter.step(self.engine, self._state, texts, allowed)
      self._collect(tokens)
    events, self._events = self._events, []
    return events

  def _admit(self) -> None:
    """Reads prompts and lets them join: about one chunk while rows are written, as much as needed if none is."""
    budget = self._slots.widths[0]
    while budget > 0 or not (self.running or self._events):
      reading = self._reading
      if reading is None:
        if not self._waiting or None not in self._rows:
          return
        self._reading = self._begin(self._waiting.popleft())
      elif reading.count < len(reading.ids):
        budget -= self._read(reading)
      elif not self._join(reading):
        return

  def _begin(self, request: Request) -> PromptReading:
    """Begins to read a prompt, after the pages that it shares with others. One token at least is read."""
    ids, size = np.asarray(request.ids, np.int32), self._slots.size
    keys = prefix_keys(ids, size, request.adapter) if self.sharing_obstacle is None else []
    prefix = None
    if self.pool is not None:
      prefix = self.pool.find([] if request.scores_prompt else keys[:(len(ids) - 1) // size])
    shared = 0 if prefix is None else prefix.count * size
    cache = self._slots.read_prefix(self._state, prefix) if shared else self._slots.empty_cache()
    self.prompt_tokens += request.prompt_size
    self.shared_tokens += shared
    return PromptReading(request, ids, keys, prefix, cache, shared, shared)

  def _read(self, reading: PromptReading) -> int:
    """Reads a chunk of a prompt. Returns the number of tokens that are read."""
    request, start = reading.request, reading.count
    source = None if request.source is None else np.asarray(request.source, np.int32)
    reading.prompt, tokens = self._slots.read(reading.cache, reading.ids, start, request.scores_prompt, source,
                                               request.adapter)
    reading.cache = reading.prompt.cache
    reading.count += tokens.ids_BT.shape[1]
    if request.scores_prompt:
      reading.scores.append(row_scores(tokens, 0, reading.count - start, request.top))
    return reading.count - start + (len(source) if source is not None and not start else 0)

  def _join(self, reading: PromptReading) -> bool:
    """Lets the next choice of a request join a row, and draws its first token. Returns whether it has room."""
    request, choice, pages = reading.request, reading.choice, None
    limit = request.limit(self.context)
    if limit and None not in self._rows:
      return False
    if limit and self.pool is not None:
      pages = self.pool.take(reading.keys, reading.prefix.first_G, len(reading.ids), len(reading.ids) + limit)
      if pages is None:
        return False
    reading.choice += 1
    if reading.choice == request.choices:
      self._reading = None
    prompt_scores = None
    if request.scores_prompt:
      columns = (np.concatenate(parts)[:-1] for parts in zip(*reading.scores))   # nothing follows the last token
      prompt_scores = Scores(*columns)
    if not limit:
      self._events.append(Event(request, choice, [], NO_SCORES, 'length', prompt_scores, reading.start, reading.shared))
      return True
    row = self._rows.index(None)
    matcher = request.grammar and request.grammar.start(request.sampling.stop_ids)
    allowed = allowed_tokens([matcher], self.engine.model.vocab)
    start = self._slots.start(reading.ids, request.sampling, limit, request.top, request.seed, choice, allowed,
                              request.adapter)
    self._state, tokens = self._slots.join(self._state, reading.prompt, start, row, pages)
    text = np.r_[reading.ids, np.zeros(limit, np.int32)]
    self._rows[row] = WrittenChoice(request, choice, limit, text, matcher, () if pages is None else pages.used_pages)
    if self.drafter is not None:
      self.drafter.join(reading.ids, row)
    has_ended = self._add_event(row, tokens, 0)
    self._events[-1] = self._events[-1]._replace(prompt_scores=prompt_scores, reading_start=reading.start,
                                                 shared_tokens=reading.shared)
    if has_ended:
      self._free([row])
    return True

  def _free(self, rows: Sequence[int]) -> None:
    """Ends rows, so that other requests may join them."""
    if rows:
      self._state = self.engine.evict(self._state, rows)
    for i in rows:
      if self.pool is not None:
        self.pool.release(self._rows[i].pages)
      self._rows[i] = None

  def _collect(self, tokens: Tokens) -> None:
    counts = np.asarray(tokens.count_B)
    tokens = tokens._replace(ids_BT=np.asarray(tokens.ids_BT), count_B=counts,
                             log_probabilities_BT=np.asarray(tokens.log_probabilities_BT))
    self._free([row for row in np.flatnonzero(counts).tolist() if self._add_event(row, tokens, row)])

  def _add_event(self, row: int, tokens: Tokens, column: int) -> bool:
    """Adds the event of a row, whose new tokens are in row `column` of `tokens`. Returns whether the row ends."""
    own = self._rows[row]
    count = int(tokens.count_B[column])
    ids = np.asarray(tokens.ids_BT)[column, :count].tolist()
    own.add(ids)
    if own.matcher is not None:
      own.matcher.add(ids)
    reason = None
    if own.matcher is not None and own.matcher.failure:
      reason = 'grammar'
    elif ids[-1] in self.engine.ends or ids[-1] in own.request.sampling.stop_ids:
      reason = 'stop'
    elif own.written >= own.limit:
      reason = 'length'
    scores = row_scores(tokens, column, count, own.request.top)
    self._events.append(Event(own.request, own.choice, ids, scores, reason))
    return reason is not None
