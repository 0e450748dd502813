"""A run learns from a teacher or from its stored predictions, and what does not fit is refused."""
import dataclasses

import jax
import pytest
from helpers.meshes import on

from lm import optim, train
from lm.data import dataset
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import annotate
from lm.models import transformer
from lm.objectives import distillation
from lm.objectives.distillation import JensenShannon, TopK, distil, distil_stored
from lm.objectives.next_token import next_token
from lm.optim import schedules

TEXTS = ['abc', 'of many lines ' * 20, 'a longer text, which is cut', 'xyz' * 9, 'more', 'and more of it']
SOURCE = Source('tiny', {'train': TEXTS, 'validation': ['not in the other']}, 'fingerprint')
TOKENIZER = Bytes()
V = TOKENIZER.vocab_size


def llama(vocab=V, width=8):
  return transformer.llama(vocab, width, 1, heads=2, hidden=8, max_length=16)


def load(model):
  return jax.jit(lambda: model.init(jax.random.key(7)))()


def run(goal, model, constants=()):
  data = dataset.Text(SOURCE, TOKENIZER, 16, rules=())
  return train.Run(model, goal, data, optim.adam(schedules.warmup_constant(1e-2, 10, 1)), steps=2, batch=2,
                   evaluate_batches=1, constants=constants)


@pytest.mark.slow
def test_a_run_learns_from_stored_predictions_and_validates_the_divergence(tmp_path):
  top_k = TopK(4, V)
  configured = run(distil_stored(next_token(), top_k), llama())
  teacher = train.Constants('teacher', llama(width=16), load)
  data = annotate.Annotated(configured.data, teacher, top_k.columns, top_k)
  with on('fsdp:1'):
    result = train.train(dataclasses.replace(configured, data=data), tmp_path, jax.sharding.get_mesh())
  divergence, loss = (result.metrics[f'validation/{name}'] for name in ('divergence', 'loss'))
  assert result.finished and 0 < divergence == pytest.approx(loss, rel=1e-5)


def test_what_does_not_fit_is_refused_before_anything_runs():
  teacher, top_k = train.Constants('teacher', llama(300), None), TopK(4, 300)
  fits = run(distil_stored(next_token(), top_k), llama())
  annotated = dataclasses.replace(fits, data=annotate.Annotated(fits.data, teacher, top_k.columns, top_k))
  with on('fsdp:1'):
    for configured, message in (
        (run(distil(next_token(), teacher.model.apply), llama(), constants=(teacher,)), f'for 300 .* student for {V}'),
        (annotated, f'for 300 .* student for {V}'), (fits, 'no columns teacher_ids and teacher_log_probs')):
      with pytest.raises(ValueError, match=message):
        train.check(configured, jax.sharding.get_mesh())
  for call, message in ((lambda: distil(next_token(), None, temperature=0.), 'temperature=0.0'),
                        (lambda: distil(next_token(), None, hard=1.), 'hard=1.0'),
                        (lambda: JensenShannon(1.), 'beta=1.0'), (lambda: TopK(5, 4), 'k=5 is not from 1 to the 4')):
    with pytest.raises(ValueError, match=message):
      call()
  distillation.check_tokenizers(TOKENIZER, Bytes())
  other = Bytes(('<|mask|>',))
  with pytest.raises(ValueError, match=f'{V} tokens, fingerprint {TOKENIZER.fingerprint}.*{other.fingerprint}'):
    distillation.check_tokenizers(TOKENIZER, other)
