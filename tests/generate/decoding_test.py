"""Cached decoding equals the full forward pass up to the last slot of the cache, and then stops."""
import functools
import json
import types

import generate as generate_script
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import GREEDY, PROMPTS, Bytes, make, text_of, tokens_of
from helpers.slow import slow

from lm import generate, signature
from lm.data.batch import Batch
from lm.evaluate import text_scores
from lm.generate import beam_search, completion, filters
from lm.hf import pretrained
from lm.models import stack, transformer
from lm.models.rotary import LongRope, Rotary

model_of = functools.cache(make)


class Copier:
  """An encoder-decoder that shares no class with the others: it writes its source, whatever it wrote before."""
  causal, reads_source, vocab, max_length, depths, original_context = True, True, 258, 64, 0, None

  def apply(self, params, batch, *, key=None, cache=None):
    source = cache if batch.source is None else batch.source
    next_tokens = jnp.take_along_axis(source, batch.positions, axis=1)
    hidden = jax.nn.one_hot(next_tokens, self.vocab)
    return types.SimpleNamespace(hidden=hidden, head=lambda hidden: hidden, cache=source)

  def prompt(self, texts, rows, bos, eos, adds_bos=True):
    source = np.stack([np.pad([*ids, eos], (0, self.max_length - len(ids) - 1)) for ids in texts]).astype(np.int32)
    start = np.zeros((rows, 1), np.int32)
    return Batch(start + bos, positions=start, segments=start + 1, source=source)

  def init_cache(self, batch_size, slots):
    return None

  def unstack(self, params):
    return params


def test_a_model_says_that_a_prompt_is_its_source():
  model, prompts = Copier(), ['on the mat', '', 'so']
  assert generate.generate(model, {}, Bytes(), prompts, GREEDY, max_tokens=10) == prompts   # no bos in the source
  ids = Bytes().encode_batch(prompts)
  for text, copy in zip(ids, generate.tokens(model, {}, Bytes(), ids, GREEDY, max_tokens=20)):
    np.testing.assert_array_equal(copy, text)
  with pytest.raises(ValueError, match='window=True .* decoders alone'):
    generate.generate(model, {}, Bytes(), prompts, GREEDY, window=True)
  with pytest.raises(ValueError, match='give --source'):
    text_scores.check_flags(model, has_source=False, bos=None)


@pytest.mark.parametrize('slots', [64, *slow(63, 65, 129)])
def test_cached_decoding_is_the_full_forward_around_a_full_cache(slots):
  """Prompts take 32 slots (the longest has 28 tokens), and the cache has a multiple of 64 slots."""
  model, params = model_of(transformer.gpt2)
  count = slots - 32
  generated = tokens_of(model, params, PROMPTS, GREEDY, count)

  @jax.jit
  def forward(params, tokens):
    out = model.apply(params, Batch(tokens))
    return out.head(out.hidden)

  rows = [[Bytes.bos_id, *prompt.encode(), *row] for prompt, row in zip(PROMPTS, generated)]
  logits = forward(params, np.stack([np.pad(row, (0, 128 - len(row))) for row in np.array(rows, object)]).astype('i4'))
  assert max(map(len, rows)) <= model.max_length
  for row, row_logits, text in zip(generated, logits, rows):
    best = np.argmax(row_logits[:, :Bytes.vocab_size], axis=-1)[len(text) - count - 1:len(text) - 1]
    end = np.argmax(row == Bytes.eos_id) + 1 if Bytes.eos_id in row else count
    np.testing.assert_array_equal(row[:end], best[:end])


class Counts(transformer.LanguageModel):
  """A model that writes 1 while what it has read fits its cache, and 2 after that."""
  vocab: int = 6
  max_length: int = 1024

  def unstack(self, params):
    return params

  def init_cache(self, batch_size, slots):
    return jnp.full(batch_size, slots)

  def apply(self, params, batch, *, key=None, cache=None):
    free = cache - batch.tokens.shape[1]
    token = jnp.where(free < 0, 2, 1)[:, None]
    return transformer.Output(batch.tokens, lambda h: jnp.broadcast_to(jax.nn.one_hot(token, 6), (*h.shape, 6)), free)


@pytest.mark.parametrize('slots', [17, 63, 64, 65, 66, 127, 128, 129, 130, 193])
def test_what_is_written_fits_the_cache(slots):
  class Six(Bytes):
    vocab_size, bos_id, eos_id = 6, 0, 77   # never ends

  generated = tokens_of(Counts(), None, [''], GREEDY, slots - 16, tokenizer=Six())
  assert generated.shape == (1, slots - 16) and (generated == 1).all()


def best_next(model, params, text, padded=64):
  """The token of the highest logit after `text`, by a full forward of one length, so that it is compiled once."""
  tokens, segments = np.pad(np.int32(text), (0, padded - len(text)))[None], (np.arange(padded) < len(text))[None]
  logits = full(model)(params, tokens, segments.astype('i4'))
  return int(np.argmax(logits[0, len(text) - 1, :Bytes.vocab_size]))


@pytest.mark.slow
def test_text_past_the_original_context_is_that_of_full_forwards():
  """LongRoPE uses other frequencies for all of a text that exceeds the original context, so its keys are recomputed."""
  model, params = model_of(transformer.llama, tied=False)
  rotary = Rotary(100., scaling=LongRope((1.,) * 4, (3., 5., 9., 20.), 24, 1.1))
  block = model.layers[0]
  block = block.clone(attention=block.attention.clone(rotary=rotary))
  model = model.clone(blocks=stack.stacks([block] * 2))
  prompts = [np.int32([*text.encode()]) for text in PROMPTS[:3]]   # 9, 1 and 28 tokens with bos
  generated = generate.tokens(model, params, Bytes(), prompts, GREEDY, max_tokens=30)
  passed = 0
  for prompt, row in zip(prompts, generated):
    text = [256, *prompt]
    for token in row:
      assert token == best_next(model, params, text), len(text)
      text.append(int(token))
    passed += len(text) > 26 > len(prompt) + 2
  assert passed == 2


@functools.lru_cache
def full(model):
  return jax.jit(lambda params, tokens, segments: (lambda out: out.head(out.hidden))(
      model.apply(params, Batch(tokens, positions=jnp.arange(tokens.shape[1])[None], segments=segments))))


def test_the_default_fills_the_context_and_a_window_goes_on_past_it():
  model, params = make(transformer.gpt2)
  model = model.clone(max_length=24)
  params = {**params, 'positions': params['positions'][:24]}

  class Endless(Bytes):
    eos_id = 999

  tokenizer, prompt = Endless(), 'def f(x):'
  assert generate.room(model, tokenizer, [prompt]) == 14
  ids = [np.int32([*prompt.encode()])]
  generated, = generate.tokens(model, params, tokenizer, ids, GREEDY)
  assert len(generated) == 14
  with pytest.raises(ValueError, match='max_tokens=15 .*--window'):
    generate.generate(model, params, tokenizer, [prompt], GREEDY, max_tokens=15)
  text = [256, *ids[0]]
  def past(sampling, count):
    request = completion.Completion(model, params, tokenizer, sampling, count, 0)
    batch = completion.prompt_batch(model, [np.int32(text)], tokenizer, adds_bos=False)
    return np.concatenate([row for row, in completion.complete_past_context(request, [np.int32(text)], batch)])

  generated = past(GREEDY, 40)
  read = list(text)
  for token in generated:
    if len(read) >= 24:
      read = [256, *read[-12:]]
    assert token == best_next(model, params, read, 24)
    read.append(int(token))
  # No token occurs twice, counting those outside the window.
  never = generate.Sampling(temperature=0, repetition_penalty=1e9)
  assert len({*text, *past(never, 60).tolist()}) == len({*text}) + 60
  assert generate.generate(model, params, tokenizer, [prompt], GREEDY, max_tokens=40, window=True) == [
      ''.join(text_of(generated, tokenizer, prompt=ids[0]))]


def test_the_program_says_where_the_context_ends(monkeypatch, capsys):
  model, params = make(transformer.gpt2)
  model, params = model.clone(max_length=24), {**params, 'positions': params['positions'][:24]}
  opened = types.SimpleNamespace(model=model, params=params, tokenizer=Bytes())
  monkeypatch.setattr(pretrained, 'load', lambda name, check: opened)

  def warning(**flags):
    signature.call(generate_script.main, model='a', prompt='def f(x):', temperature=0., mesh='fsdp:8', **flags)
    return capsys.readouterr().err
  line = warning()
  assert line == 'up to 14 tokens, to the end of the context; --window continues beyond it\n'
  assert warning(window=True) == warning(max_tokens=14) == ''
  with pytest.raises(ValueError, match='max_tokens=15 .*--window'):
    warning(max_tokens=15)


@pytest.mark.slow
def test_the_program_writes_beams_and_answers_to_a_file(monkeypatch, capsys, tmp_path):
  model, params = make(transformer.gpt2)
  opened = types.SimpleNamespace(model=model, params=params, tokenizer=Bytes(), folder=tmp_path)
  monkeypatch.setattr(pretrained, 'load', lambda name, check: opened)
  run = functools.partial(signature.call, generate_script.main, model='a', mesh='fsdp:8')
  run(prompt='def f(x):', beams=3, n=2, max_tokens=6, length_penalty=0.5)
  shown = capsys.readouterr()
  expected, = beam_search.search(model, params, Bytes(), ['def f(x):'], beam_search.Beams(3, 0.5), max_tokens=6)
  assert shown.out == f'\n{"-" * 80}\n'.join(f'def f(x):{text}\n' for text, _ in expected[:2])
  assert [float(line.split()[1]) for line in shown.err.splitlines()] == pytest.approx(
      [score for _, score in expected[:2]], abs=2e-4)
  prompts, out = tmp_path / 'prompts.jsonl', tmp_path / 'out.jsonl'
  prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "temperature": 0}\n')
  run(prompts=prompts, out=out, max_tokens=5)
  assert '2 of 2 answers' in capsys.readouterr().err
  lines = {line['id']: line for line in map(json.loads, out.read_text().splitlines())}
  assert lines['2']['answers'][0]['text'] == generate.generate(model, params, Bytes(), ['b'], GREEDY, max_tokens=5)[0]
  with pytest.raises(ValueError, match="top_k=0, and now it has top_k=3"):
    run(prompts=prompts, out=out, max_tokens=5, top_k=3)
  with pytest.raises(ValueError, match='no chat template; .*put a chat_template.jinja into the folder'):
    run(chat=True)


def test_the_kth_greatest_is_that_of_a_sort_with_ties_zeros_of_both_signs_and_infinities():
  rng = np.random.default_rng(0)
  for values in (rng.normal(size=(6, 300)), rng.integers(-3, 4, (6, 300)) * 1., np.full((6, 300), -np.inf),
                 rng.choice([0., -0., 1e-40, -1e-40, np.inf, -np.inf, 3e38], (6, 300))):
    values, k = np.float32(values), np.int32([1, 2, 50, 299, 300, 7])
    expected = np.sort(values, axis=-1)[np.arange(6), 300 - k]
    actual = jax.jit(filters.kth_greatest)(values, k[:, None])
    assert np.array_equal(actual[:, 0], expected)
    mask = np.isfinite(jax.jit(filters.keep_top_k)(values, np.int32([1, 2, 50, 0, -1, 400])))
    expected = np.sort(values, axis=-1)[np.arange(6), 300 - np.array([1, 2, 50, 300, 300, 300])]
    assert np.array_equal(mask, (values >= expected[:, None]) & np.isfinite(values))
