"""The block of docs/extend.md trains, and decodes as its full forward pass says."""
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import declarations
from lm.data.batch import Batch
from lm.models import transformer
from lm.objectives.next_token import next_token
from lm.optim import groups

DOCS = pathlib.Path(__file__).parents[2] / 'docs'


def test_a_block_in_a_file_of_its_own_trains_and_decodes():
  text, = re.findall(r'^```python\n(# rezero.py.*?)^```', (DOCS / 'extend.md').read_text(), re.DOTALL | re.MULTILINE)
  names = {'__name__': 'rezero'}
  exec(compile(text, 'rezero.py', 'exec'), names)
  model = names['model'](16, 8, 2, 2, 8)
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 16, (2, 8)).astype('i4')
  batch = Batch(tokens, tokens, np.ones((2, 8), 'f4'))
  identity = jax.jit(lambda params: model.apply(params, batch).hidden)(params)
  embedded = params['embedding'][tokens]
  np.testing.assert_allclose(identity, embedded / np.sqrt((embedded ** 2).mean(-1, keepdims=True) + 1e-6), rtol=1e-4)
  grads = jax.jit(jax.grad(lambda params: next_token().loss(model.apply, params, batch, None)[0]))(params)
  assert np.abs(grads['blocks']['0']['scale']).min() > 0
  weights = declarations.of(model)
  assert not groups.decay_mask(weights)['blocks']['0']['scale']
  assert groups.hidden_mask(weights)['blocks']['0']['attention']['out']
  params['blocks']['0']['scale'] = jnp.ones((2, 2))
  full = jax.jit(lambda params: model.apply(params, batch).hidden)(params)
  out = jax.jit(lambda params: model.apply(params, Batch(tokens[:, :5]), cache=model.init_cache(2, 8)))(params)
  last = jax.jit(lambda params, cache: model.apply(params, Batch(tokens[:, 5:]), cache=cache))(params, out.cache)
  np.testing.assert_allclose(np.concatenate([out.hidden, last.hidden], axis=1), full, atol=1e-5)


def test_commands_of_the_documentation_train_in_folders_of_their_own():
  text = ''.join(path.read_text() for path in sorted(DOCS.glob('*.md')))
  # A command that resumes a run has only the flag of its workdir, and one that replays a step that of the step. A
  # command that two pages have trains once.
  every = dict.fromkeys(re.findall(r'^python experiments/(\w+)\.py((?:\\\n|(?<=;)\n|[^\n])*)', text, re.MULTILINE))
  commands = [(script, flags) for script, flags in every if flags.split(' --replay=')[0] != ' --workdir=runs/books']
  trains = {'pretrain', 'distill', 'finetune_chat', 'preference', 'denoise', 'diffusion', 'infill', 'quickstart',
            'customer_service', 'summarise', 'sweep', 'compare', 'mup', 'optimizers', 'overfit', 'scaling'}
  folders = [(re.findall(r'--workdir=(\S+)', flags) or [f'runs/{script}'])[0] for script, flags in commands
             if script in trains]
  assert len(folders) > 25 and sorted(folders) == sorted(set(folders))


def test_a_model_with_a_field_that_cannot_be_hashed_is_refused():
  class Listed(transformer.LanguageModel):
    sizes: tuple[int, ...]

  with pytest.raises(ValueError, match='the field sizes of the model Listed is a ndarray, .* give a tuple'):
    jax.eval_shape(Listed(np.array([1, 2])).init, jax.random.key(0))
