"""Beam search finds what `transformers` finds, and the best of all texts where it has beams for all."""
import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import PROMPTS, Bytes, make

from lm import sharding
from lm.data.tokenizers import folder
from lm.generate import beam_search
from lm.generate.beam_search import Beams
from lm.hf import pretrained
from lm.models import encoder_decoder, transformer

TOKENIZER = folder.Bytes(('<pad>',))
VOCAB, PADDING = TOKENIZER.vocab_size, TOKENIZER.control_id('<pad>')
ENDS = TOKENIZER.eos_id, *range(0, 256, 12)   # many, so that texts end at different lengths
TEXTS = [np.int32([1, 5, 9, 13]), np.int32([3]), np.int32([20, 21, 22, 23, 25, 26, 27])]
MODELS = {'gpt2': transformer.gpt2(VOCAB, 16, 2, 2, 64),
          'llama': transformer.llama(VOCAB, 16, 2, 2, kv_heads=1, max_length=64, tied=False),
          't5': encoder_decoder.t5(VOCAB, 16, 2, 2, 8, 24, gated=True, tied=False)}
SETTINGS = Beams(4), Beams(4, 2., 'true'), Beams(4, -1.), Beams(4, 1.5, 'never'), Beams(4, 0., 'never')


@functools.cache
def params_of(kind):
  rng = np.random.default_rng(1)
  return jax.tree.map_with_path(lambda path, x: rng.normal(path[-1].key.endswith('scale'), 0.5, x.shape).astype('f4'),
                                jax.eval_shape(MODELS[kind].init, jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize('kind', MODELS)
def test_texts_and_scores_are_those_of_transformers(kind, tmp_path):
  torch = pytest.importorskip('torch')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    transformers = pytest.importorskip('transformers')
  model, params = MODELS[kind], params_of(kind)
  pretrained.write(tmp_path / kind, model, params, TOKENIZER)
  auto = transformers.AutoModelForSeq2SeqLM if kind == 't5' else transformers.AutoModelForCausalLM
  theirs = auto.from_pretrained(tmp_path / kind).eval()
  lengths, batch = set(), model.prompt(TEXTS, 3, PADDING, ENDS[0], adds_bos=False)
  source = batch.tokens if batch.source is None else batch.source
  mask = batch.segments if batch.source is None else np.arange(source.shape[1])[None] <= [[len(t)] for t in TEXTS]
  for settings in SETTINGS:
    ours = beam_search.search_ids(model, params, batch, 3, VOCAB, ENDS, settings, 9)
    with torch.no_grad():
      out = theirs.generate(
          torch.tensor(source, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long),
          num_beams=settings.count, num_return_sequences=settings.count, max_new_tokens=9, do_sample=False,
          length_penalty=settings.length_penalty, output_scores=True, return_dict_in_generate=True,
          early_stopping={'true': True, 'false': False, 'never': 'never'}[settings.early_stopping],
          eos_token_id=list(ENDS), pad_token_id=PADDING, decoder_start_token_id=PADDING)
    new = out.sequences[:, batch.tokens.shape[1]:].numpy()
    for row, text in zip(new, itertools.chain.from_iterable(ours), strict=True):
      assert row[:len(text.ids)].tolist() == text.ids.tolist() and set(row[len(text.ids):]) <= {PADDING}
      lengths.add(len(text.ids))
    np.testing.assert_allclose(out.sequences_scores, [text.score for texts in ours for text in texts],
                               rtol=1e-5, atol=1e-5)
  assert len(lengths) > 3   # otherwise the test shows little


class Chain(transformer.LanguageModel):
  """A model whose next token depends on the last one alone, by a table of probabilities."""
  vocab: int = 5
  max_length: int = 64

  def unstack(self, params):
    return params

  def init_cache(self, batch_size, slots):
    return jnp.zeros(batch_size)

  def apply(self, params, batch, *, key=None, cache=None):
    return transformer.Output(batch.tokens, lambda tokens: jnp.log(params)[tokens], cache)


@pytest.mark.parametrize('penalty', [0., 1., 2.])
def test_with_beams_for_all_texts_the_best_of_all_is_found(penalty):
  table = np.random.default_rng(3).dirichlet(np.ones(5), 5).astype('f4')
  batch = Chain().prompt([np.int32([2])], 1, 0, 4, adds_bos=False)
  hypotheses, = beam_search.search_ids(Chain(), table, batch, 1, 5, (4,), Beams(256, penalty, 'never'), 4)
  scores = {}
  for length in 1, 2, 3, 4:
    for ids in itertools.product(range(5), repeat=length):
      if 4 not in ids[:-1] and (ids[-1] == 4 or length == 4):
        scores[ids] = sum(np.log(table[a, b]) for a, b in itertools.pairwise([2, *ids])) / length ** penalty
  texts = hypotheses[:20]   # some have the same score, because they have the same transitions
  assert len({tuple(text.ids) for text in texts}) == 20
  np.testing.assert_allclose([text.score for text in texts], [scores[tuple(text.ids.tolist())] for text in texts],
                             rtol=1e-5)
  np.testing.assert_allclose([text.score for text in texts], sorted(scores.values(), reverse=True)[:20], rtol=1e-5)


def test_texts_do_not_depend_on_the_other_prompts():
  model, params = make(kv_heads=2, tied=False)
  texts = beam_search.search(model, params, Bytes(), PROMPTS, Beams(3), max_tokens=8)
  assert texts[0] == texts[3] and len({row[0].text for row in texts}) == 3
  others = beam_search.search(model, params, Bytes(), ['other', PROMPTS[2], 'and others', PROMPTS[0]], Beams(3),
                              max_tokens=8)
  for row, other in (texts[2], others[1]), (texts[0], others[3]):
    assert [text for text, _ in row] == [text for text, _ in other]
    np.testing.assert_allclose([score for _, score in row], [score for _, score in other], rtol=1e-5)
  with pytest.raises(ValueError, match='max_tokens=200 are more than the 128'):
    beam_search.search(model, params, Bytes(), [''], Beams(3), max_tokens=200)


@pytest.mark.slow
def test_a_mesh_finds_the_same_texts():
  model, params = make(kv_heads=2, tied=False)
  expected = beam_search.search(model, params, Bytes(), PROMPTS[:3], Beams(3), max_tokens=6)
  with jax.set_mesh(sharding.make_mesh('fsdp:4,tensor:2')) as wide:
    texts = beam_search.search(*make(kv_heads=2, tied=False, mesh=wide), Bytes(), PROMPTS[:3], Beams(3), max_tokens=6)
  assert [[text for text, _ in row] for row in texts] == [[text for text, _ in row] for row in expected]


@pytest.mark.parametrize('settings', [{'count': 0}, {'early_stopping': 'yes'}, {'length_penalty': float('nan')}])
def test_bad_settings_are_refused(settings):
  with pytest.raises(ValueError, match='must be'):
    Beams(**settings)


def test_more_beams_than_memory_has_room_for_are_refused(monkeypatch):
  model, params = MODELS['gpt2'], params_of('gpt2')
  batch = model.prompt(TEXTS[:1], 1, PADDING, ENDS[0], adds_bos=False)
  # Twice 64 slots of keys and values of 2 layers of width 16, a segment and a position; an index; logits twice.
  row = 2 * (64 * (2 * 2 * 16 + 2) + 1) * 4 + 2 * VOCAB * 4
  monkeypatch.setattr(beam_search.sharding, 'free_memory', lambda: 5 * row - 1)
  message = f'beams=100000 need {100_000 * row:,} bytes .* {5 * row - 1:,} bytes are free; at most 4 beams fit'
  with pytest.raises(ValueError, match=message):
    beam_search.search_ids(model, params, batch, 1, VOCAB, ENDS, Beams(100_000), 9)
  with pytest.raises(ValueError, match='beams=5 need'):
    beam_search.search_ids(model, params, batch, 1, VOCAB, ENDS, Beams(5), 9)
  assert len(beam_search.search_ids(model, params, batch, 1, VOCAB, ENDS, Beams(4), 2)[0]) == 4
