"""With drafts, right or wrong, requests have the answers that they have without, and the same bits in any company."""
import functools

import numpy as np
import pytest
from helpers.decoders import PROMPTS, Bytes, make

from lm import generate
from lm.generate import Request, Sampling, Scheduler
from lm.generate.draft_model import DraftModel
from lm.generate.drafted_steps import Drafter
from lm.generate.prompt_lookup import PromptLookup
from lm.models import encoder_decoder, transformer


class Guesses(Drafter):
  """Drafts any tokens, most of them wrong, and those of a text that only it knows."""
  text = ()

  def draft(self, state, texts):
    guesses = np.random.default_rng(len(texts[0] if texts[0] is not None else ())).integers(0, 258, (len(texts), 3))
    for row, text in enumerate(texts):
      if text is not None and list(text) == list(self.text[:len(text)]):
        right = self.text[len(text):len(text) + 2]
        guesses[row, :len(right)] = right
    return guesses


@functools.cache
def model_and_params():
  return make(kv_heads=2, tied=False)


def engine(model=None, params=None, slots=96):
  model, params = (model, params) if model else model_and_params()
  return generate.Engine(model, model.unstack(params), slots, Bytes.vocab_size, Bytes().eos_ids)


@functools.cache
def scheduler(drafter=None, pages=None):
  subject = Scheduler(engine(), 3, (8, 1), drafter=drafter, pages=pages)
  subject.warm_up()
  return subject


def requests():
  ids = [Bytes.bos_id, *b'abcabcabcabc']
  return [Request(ids, Sampling(0), 30), Request(ids, Sampling(0.2, 60, 0.95, 0.001), 21, seed=2 ** 40, top=2),
          Request(ids[:8], Sampling(0.5, repetition_penalty=1.2, presence_penalty=0.5), 20, seed=1, choices=2),
          Request(ids[:3], Sampling(0, min_tokens=3, stop_ids=tuple(range(0, 64, 4)), bad_words=((65, 65),)), 40),
          Request([*ids, *ids, *ids, *b'the end of the context'], Sampling(top_k=3), None, 4, scores_prompt=True)]


def answers(subject, order):
  """Returns {(number, choice): (ids, log-probabilities, alternatives, reason)} of requests in an order."""
  new, result = requests(), {}
  for number in order:
    subject.submit(new[number])
  while subject.is_busy:
    for event in subject.step():
      ids, scores, top, reason = result.setdefault((new.index(event.request), event.choice), ([], [], [], []))
      ids += event.ids
      scores += event.log_probabilities
      top += event.scores.top_ids_TK.tolist()
      reason += [event.finish_reason] if event.finish_reason else []
  return result


@functools.cache
def plain():
  return answers(scheduler(), range(5))


def guesses():
  subject = Guesses(3)
  subject.text = [*requests()[0].ids, *plain()[0, 0][0]]
  return subject


def small_model():
  model = transformer.llama(264, 16, 1, 2, max_length=128)
  return DraftModel(engine(*make(lambda *sizes, **kwargs: model), slots=128), 3)


@pytest.mark.parametrize('make_drafter, pages', [
    (lambda: PromptLookup(3), None), (guesses, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (lambda: PromptLookup(3), 0), (lambda: DraftModel(engine(), 3), None), (small_model, 0)))])
def test_answers_are_those_without_drafts_and_the_same_bits_in_any_company(make_drafter, pages):
  expected, subject = plain(), scheduler(make_drafter(), pages)
  together = answers(subject, range(5))
  for key, (ids, scores, top, reason) in expected.items():
    assert (ids, top, reason) == (together[key][0], *together[key][2:])
    np.testing.assert_allclose(together[key][1], scores, rtol=0, atol=1e-5)
  for order in ([4, 2, 0, 3, 1], *([number] for number in range(5))):
    assert answers(subject, order).items() <= together.items()
  drafter = subject.drafter
  assert subject.compilations == 0 and drafter.accepted > 0
  if isinstance(drafter, DraftModel) and drafter.engine.model == subject.engine.model:
    assert drafter.acceptance > 0.8   # all but those behind the end of a text
  else:
    assert drafter.acceptance < 0.9
  assert subject.pool is None or subject.pool.used == 0


@pytest.mark.slow
@pytest.mark.parametrize('make_drafter', [lambda: PromptLookup(3), small_model])
def test_streams_are_those_without_drafts_also_past_the_context(make_drafter):
  drafter, sampling = make_drafter(), Sampling(0.5, top_k=40, repetition_penalty=1.1)
  write = functools.partial(generate.generate, *model_and_params(), Bytes(), PROMPTS, sampling, max_tokens=150, seed=3,
                            window=True)
  assert write(draft=drafter) == write()
  assert 0 < drafter.acceptance < 1


def test_what_cannot_be_drafted_is_refused():
  other = transformer.llama(300, 16, 1, 2, max_length=128)
  for drafter, subject, options, message in [
      (PromptLookup(2), engine(), {'tokens_per_step': 2}, 'tokens_per_step=2 must be 1'),
      (PromptLookup(2), engine(*make(lambda *sizes, **kwargs: encoder_decoder.t5(264, 16, 1, 2, 8, 24))), {},
       'have keys and values for each token'),
      (DraftModel(engine(*make(lambda *sizes, **kwargs: other)), 2), engine(), {}, 'padded to 300'),
      (DraftModel(engine(slots=64), 2), engine(), {}, 'reads 64 tokens at once, and the texts may have 96')]:
    with pytest.raises(ValueError, match=message):
      Scheduler(subject, 3, drafter=drafter, **options)
