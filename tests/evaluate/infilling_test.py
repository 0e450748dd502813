"""The cost of a middle, given its prefix, is that of the model for this row alone; cases are parts of documents."""
import jax
import numpy as np

from lm import models, sharding
from lm.data import tokenizers
from lm.data.batch import Batch
from lm.evaluate import infilling


def test_the_nats_of_a_middle_are_those_of_its_row_alone():
  model = models.llama(64, 16, 1, heads=2, max_length=24)
  rng = np.random.default_rng(1)
  before = [rng.integers(0, 64, size).astype('i4') for size in rng.integers(3, 12, 40)]
  middles = [rng.integers(0, 64, size).astype('i4') for size in rng.integers(1, 9, 40)]
  with jax.set_mesh(sharding.make_mesh('fsdp:1,tensor:1', jax.devices()[:1])):
    params = jax.jit(model.init)(jax.random.key(0))
    nats, right = infilling.judge(model, params, before, middles)
    for i in (0, 17, 39):
      ids = np.concatenate([before[i], middles[i]])
      outputs = model.apply(params, Batch(ids[None, :-1], ids[None, 1:]))
      logits = np.asarray(outputs.head(outputs.hidden))[0, -len(middles[i]):]
      expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(middles[i])), middles[i]]
      np.testing.assert_allclose(nats[i], expected, rtol=1e-5)
      assert (right[i] == (logits.argmax(-1) == middles[i])).all()


def test_cases_are_parts_of_documents_with_as_much_on_both_sides():
  tokens = tokenizers.Bytes()
  documents = [np.array(tokens.encode(f'line {i} of some text\n' * 8), 'i4') for i in range(3)]
  for lines in (False, True):
    cases = infilling.cases(documents, tokens, 20, lines, 16)
    assert len(cases) == 16
    for prefix, middle, suffix in cases:
      assert len(prefix) == len(suffix) == 10 and (2 <= len(middle) <= 16 if lines else len(middle) == 1)
      text = tokens.decode(np.concatenate([prefix, middle, suffix]))
      assert any(text in tokens.decode(document) for document in documents)
      assert not lines or tokens.decode(suffix).startswith('\n') and '\n' not in tokens.decode(middle)
  assert infilling.cases([documents[0][:10]], tokens, 20, False, 16) == []
