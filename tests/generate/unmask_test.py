"""Texts are written by unmasking: draws of the exact distribution, prompts that stay, requests that are refused."""
import functools

import jax
import numpy as np
import pytest
from helpers.exact_denoiser import BOS, JOINT, LENGTH, MASK, Exact, placed

from lm import sharding
from lm.data import tokenizers
from lm.generate import Sampling, unmask
from lm.models import transformer


class Three:
  """A tokenizer of three words: 0, 1, 2."""
  vocab_size, bos_id, eos_id, eos_ids = 5, BOS, 9, (9,)

  def encode_batch(self, texts):
    return [np.int32([int(c) for c in text]) for text in texts]

  def decode(self, ids):
    return ''.join(map(str, ids))

  def control_id(self, name):
    return {'<|mask|>': MASK}[name]


DRAWS = 4096


def draw(denoising, prompts=('',) * DRAWS, length=LENGTH, seed=0):
  return unmask.generate(Exact(), JOINT, Three(), list(prompts), denoising, length=length, seed=seed)


def chi_square(counts, p):
  expected = counts.sum() * p
  assert counts[expected == 0].sum() == 0
  few = expected < 5   # the test needs at least 5 expected draws per cell
  counts, expected = (np.append(x[~few], x[few].sum()) for x in (counts, expected))
  return np.square(counts - expected)[expected > 0] @ (1 / expected[expected > 0]), (expected > 0).sum() - 1


@pytest.mark.parametrize('blocks', [1, 3], ids=['any order', 'left to right'])
def test_one_token_at_a_time_draws_the_exact_distribution(blocks):
  denoising = unmask.Denoising(3, blocks, unmask.random)
  drawn = np.array([int(text, 3) for text in draw(denoising)])
  value, degrees = chi_square(np.bincount(drawn, minlength=27), JOINT.ravel().astype('f8'))
  assert value < degrees + 3.7 * np.sqrt(2 * degrees)   # fails by chance in fewer than 1 of 1000 draws
  assert len(set(draw(denoising, seed=1)[:50])) > 1 and draw(denoising, seed=1)[:50] != draw(denoising)[:50]


def test_tokens_revealed_in_one_step_are_independent():
  drawn = np.array([[int(c) for c in text] for text in draw(unmask.Denoising(1))])
  apart = np.einsum('i,j,k->ijk', *(JOINT.sum(axis) for axis in ((1, 2), (0, 2), (0, 1))))
  value, degrees = chi_square(np.bincount(drawn @ [9, 3, 1], minlength=27), apart.ravel() / apart.sum())
  assert value < degrees + 3.7 * np.sqrt(2 * degrees)


def test_low_confidence_keeps_the_most_probable_token_each_time():
  """By hand: the token with the largest marginal first, then the next one given it."""
  text, = draw(unmask.Denoising(3, sampling=Sampling(0.)), [''])
  revealed = {}
  for _ in range(3):
    index = tuple(revealed.get(i, slice(None)) for i in range(3))
    table = JOINT[index]
    free = [i for i in range(3) if i not in revealed]
    marginals = {i: table.sum(tuple(set(range(len(free))) - {n})) / table.sum() for n, i in enumerate(free)}
    best = max(free, key=lambda i: marginals[i].max())
    revealed[best] = int(marginals[best].argmax())
  assert text == ''.join(str(revealed[i]) for i in range(3))


def test_prompts_stay_and_a_completion_does_not_depend_on_its_batch():
  model, words = transformer.llama(321, 16, 1, heads=2, hidden=16, max_length=32), tokenizers.Bytes()
  rng = np.random.default_rng(3)
  weights = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype('f4'),
                         jax.eval_shape(model.init, jax.random.key(0)))
  denoising = unmask.Denoising(4, 2)
  make = functools.partial(unmask.generate, model, weights, words, denoising=denoising, length=8, seed=1)
  together = make(['ab', '', 'ab', 'a longer one'])
  assert together[0] == make(['ab'])[0] != together[2] and together[1] == make([''])[0]
  with jax.set_mesh(sharding.make_mesh('fsdp:2,tensor:2', jax.devices()[:4])):
    assert unmask.generate(model, placed(model, weights), words, ['ab', '', 'ab'], denoising, length=8,
                              seed=1) == together[:3]


def test_a_completion_ends_at_eos():
  assert unmask._text(Three(), np.int32([1, 2]), np.array([0, 1, 9, 2])) == '01'


def test_bad_requests_are_refused():
  for error, make, length in [('steps=3 are not a positive multiple of blocks=2', lambda: unmask.Denoising(3, 2), 3),
                              ('repetition_penalty=2', lambda: unmask.Denoising(sampling=Sampling(
                                 repetition_penalty=2.)), 3),
                              ('length=3 must be a multiple of blocks=2', lambda: unmask.Denoising(2, 2), 3),
                              ('at least steps=4', lambda: unmask.Denoising(4), 3),
                              ('length=16 are more than the 16', lambda: unmask.Denoising(1), 16)]:
    with pytest.raises(ValueError, match=error):
      draw(make(), [''], length)
  assert draw(unmask.Denoising(1), []) == []
