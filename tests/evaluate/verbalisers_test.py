"""The score of a verbaliser is that of its row alone; of a context that is too long, the end is read."""
import jax
import numpy as np
import pytest

from lm import models, sharding
from lm.data import tokenizers
from lm.data.batch import Batch
from lm.evaluate import verbalisers


def test_scores_are_those_of_rows_alone():
  tokens = tokenizers.Bytes()
  model = models.llama(tokens.vocab_size, 16, 1, heads=2, max_length=24)
  contexts, words = ['ab', '', 'a context of many letters'], [' good', 'no']
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    params = jax.jit(model.init)(jax.random.key(0))
    ours = verbalisers.log_probabilities(model, params, tokens, contexts, words)
    for i, context in enumerate(contexts):
      for j, word in enumerate(words):
        before = [tokens.bos_id, *tokens.encode(context)][-(24 + 1 - len(' good')):]
        ids = np.int32([*before, *tokens.encode(word)])[None]
        outputs = model.apply(params, Batch(ids[:, :-1], ids[:, 1:]))
        log_p = np.asarray(jax.nn.log_softmax(outputs.head(outputs.hidden))[0])
        assert ours[i, j] == pytest.approx(sum(log_p[len(before) - 1 + n, token]
                                               for n, token in enumerate(tokens.encode(word))), rel=1e-5)
    with pytest.raises(ValueError, match='different texts, none of them empty'):
      verbalisers.log_probabilities(model, params, tokens, contexts, ['a', ''])
