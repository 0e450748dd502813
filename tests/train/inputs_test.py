"""Inputs of any shape beside the tokens: the same loop classifies images, on any mesh, in parts."""
import dataclasses
import importlib.util
import sys

import jax
import numpy as np
import pytest
from helpers.documents import SPECIAL, documents
from helpers.meshes import mesh_of
from helpers.runs import RUN, Data, V, go, logged
from helpers.slow import slow

from lm import models, optim, train
from lm.data import Example, Form, batches
from lm.data.rows import stages
from lm.data.rows.packed_documents import Stream
from lm.data.rows.stages import Stage
from lm.objectives import token_objective

pytestmark = pytest.mark.usefixtures('compiled_once')

FILE = '''
"""Images of one of several classes: the data, the objective and the model."""
import dataclasses
import hashlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data import Batch, Batches, Example, Form, Special, dataset
from lm.models import layers, transformer
from lm.objectives import Objective
from lm.objectives.objective import cross_entropy

CLASSES, SHAPE = 4, (3, 5, 2)


class Classifier(nn.Module):
  width: int
  max_length = 1   # it reads no tokens

  def init(self, key):
    rows = sharding.parts('B')
    return super().init(key, jnp.zeros((rows, *SHAPE)))['params']

  def apply(self, params, batch, *, key=None, cache=None):
    return super().apply({'params': params}, batch.inputs['image'])

  @nn.compact
  def __call__(self, image_BHWC):
    image_BHWC = sharding.constrain(image_BHWC, 'B---')
    pixels = layers.weight(self, 'pixels', '---F', (*SHAPE, 2 * self.width), nn.initializers.normal(0.3))
    out = layers.weight(self, 'out', 'FD', (2 * self.width, self.width), nn.initializers.normal(0.3))
    classes = layers.weight(self, 'classes', 'VD', (CLASSES, self.width), nn.initializers.normal(0.3))
    x_BF = jnp.maximum(layers.einsum('BHWC,HWCF->BF', image_BHWC, pixels), 0)
    x_BD = layers.einsum('BF,FD->BD', x_BF, out)
    return transformer.Output(x_BD[:, None], transformer.Head(classes), None)


def example(label, rng, special):
  return Example(np.zeros(len(label), np.int32), label, np.ones(len(label), np.float32))


def loss(apply, params, batch, key):
  out = apply(params, batch, key=key)
  loss_sum, sums = cross_entropy(out.head(out.hidden), batch.targets, batch.weights)
  return loss_sum, jnp.sum(batch.weights), sums


CLASSIFY = Objective((Form(example),), loss)


@dataclasses.dataclass(frozen=True)
class ImageBatches(Batches):
  images: np.ndarray = dataclasses.field(kw_only=True)
  labels: np.ndarray = dataclasses.field(kw_only=True)

  @property
  def rows_per_epoch(self):
    return len(self.labels)

  def _fill(self, row, epoch, index, rng):
    example = self.objective.forms[0].example(self.labels[index:index + 1], rng, self.special)
    row.add(example._replace(inputs={'image': self.images[index]}))


class Labels:
  """The vocabulary, of classes, which stand for no text."""
  vocab_size, fingerprint, lossless = CLASSES, 'labels', False

  def byte_lengths(self):
    return np.zeros(CLASSES, np.int32)


class Images:
  """A blob whose place says the class, in noise."""
  length, source_length, kind, columns, validation_sets = 1, None, np.ndarray, {}, ()
  inputs = {'image': (np.float32, SHAPE)}
  tokenizer, fingerprint = Labels(), 'blobs'

  def open(self, workdir, *, control=(), check=dataset.unchecked):
    check(self.fingerprint, self.tokenizer.fingerprint)
    return self

  def batches(self, split, objective, rows, seed=0, repeat=True):
    rng = np.random.default_rng([split == 'train', 5])
    labels = rng.integers(CLASSES, size=84).astype(np.int32)
    images = rng.normal(0, 0.3, (84, *SHAPE)).astype(np.float32)
    images[np.arange(84), labels % 3, labels, labels % 2] += 3
    return ImageBatches(objective, Special(0, 1, CLASSES, ()), 1, rows, seed, repeat, inputs=self.inputs,
                        images=images, labels=labels)
'''


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  path = tmp_path_factory.mktemp('images') / 'images.py'
  path.write_text(FILE)
  spec = importlib.util.spec_from_file_location('images', path)
  sys.modules['images'] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def run(images):
  return train.Run(images.Classifier(8), images.CLASSIFY, images.Images(), optim.adamw(lambda step: 0.02), steps=30,
                   batch=16, evaluate_every=15, save_every=10)


@pytest.fixture(scope='module')
def alone(run, tmp_path_factory):
  """Returns the workdir of a run on one device."""
  workdir = tmp_path_factory.mktemp('alone')
  go(workdir, run, 'fsdp:1')
  return workdir


@pytest.mark.slow
def test_a_classifier_of_images_learns(run, alone, images):
  losses, accuracy = logged(alone), logged(alone, 'validation/accuracy')
  assert losses[1] > 1 and losses[30] < 0.3 and accuracy[30] > 0.9
  assert not logged(alone, 'validation/perplexity')   # classes are no text
  with jax.set_mesh(mesh_of('fsdp:1')):   # the first step, in NumPy
    params = jax.tree.map(np.float64, jax.jit(lambda: train.init(run))().params)
  batch = run.data.batches('train', run.objective, 16)(0)
  assert batch.inputs['image'].shape == (16, *images.SHAPE)
  hidden = np.maximum(np.einsum('bhwc,hwcf->bf', batch.inputs['image'], params['pixels']), 0)
  logits = hidden @ params['out'] @ params['classes'].T
  log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  assert losses[1] == pytest.approx(-log_probabilities[np.arange(16), batch.targets[:, 0]].mean(), rel=1e-5)


@pytest.mark.parametrize('mesh, accumulate', [('fsdp:4,tensor:2', 4), *slow(('fsdp:8', 2), ('fsdp:1', 8))])
def test_losses_are_the_same_on_any_mesh_and_in_any_number_of_parts(run, alone, tmp_path, mesh, accumulate):
  go(tmp_path, run, mesh, accumulate=accumulate)
  for name in ('loss', 'grad_norm', 'validation/loss', 'validation/accuracy'):
    actual, expected = logged(tmp_path, name), logged(alone, name)
    assert list(actual) == list(expected)
    np.testing.assert_allclose([*actual.values()], [*expected.values()], rtol=1e-4)


def test_each_row_keeps_its_input_through_shuffling_stages_and_shards(images):
  """Wherever a row lies, its image is that of its label."""
  data = images.Images().batches('train', images.CLASSIFY, 4)
  staged = stages.Staged(data, stages.Schedule((Stage(3, 2, 1),), 4, 1))
  contents = []
  for step in range(30):
    batch = staged(step)
    assert len(batch.tokens) == (2 if step < 3 else 4)
    blob = batch.inputs['image'].max(axis=(1, 3)).argmax(axis=1)
    np.testing.assert_array_equal(blob, batch.targets[:, 0])
    parts = [staged(step, rows) for rows in (range(1), range(1, len(batch.tokens)))]
    np.testing.assert_array_equal(np.concatenate([part.inputs['image'] for part in parts]), batch.inputs['image'])
    contents += [image.tobytes() for image in batch.inputs['image']]
  assert len(set(contents[:84])) == 84   # an epoch has each once
  last = images.Images().batches('validation', images.CLASSIFY, 16, repeat=False)(5)
  assert not last.inputs['image'][4:].any() and not last.weights[4:].any()   # rows after the last are empty


def captioned(tokens, rng, special):
  return Example(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, np.float32), inputs={'image': np.ones((2, 3), 'f4')})


def test_what_would_lose_an_input_is_refused():
  stream = Stream(token_objective(Form(captioned, ahead=True)), SPECIAL, 8, 2, store=documents([30, 3, 3]), seed=None)
  assert stream(0).inputs['image'].shape == (2, 2, 3)   # only the first document
  with pytest.raises(ValueError, match='several examples, and inputs .image. are of the whole row'):
    stream(1), stream(2)
  with pytest.raises(ValueError, match='rows with inputs .image. cannot be cut'):
    stages.cut(stream(0), 2)
  row = batches.Row(dataclasses.replace(stream, objective=RUN.objective)(0), 0)
  with pytest.raises(ValueError, match=r'input image of shape \[2, 3\], and its row none of that name; declare'):
    row.add(captioned(np.arange(3), None, None))
  row = batches.Row(batches.blank(stream(0), 1), 0)
  with pytest.raises(ValueError, match=r'image of shape \[3\], and its row one of shape \[2, 3\]'):
    row.add(captioned(np.arange(3), None, None)._replace(inputs={'image': np.zeros(3)}))


class Captioned(Data):
  inputs = {'image': (np.float32, (2, 3))}


def test_a_run_whose_parts_do_not_agree_on_inputs_is_refused(tmp_path):
  decoder = models.llama(V, 8, 1, 2, max_length=16)
  with pytest.raises(ValueError, match='inputs .image., which this model does not read'):
    go(tmp_path, model=decoder, data=Captioned())
  with pytest.raises(ValueError, match='with inputs cannot be cut into shorter ones'):
    go(tmp_path, data=Captioned(), stages=(Stage(2, 8, 8),))
  with pytest.raises(ValueError, match=r'(?s)batch of other arrays.*inputs.image.*float32\[8, 2, 3\]'):
    go(tmp_path, data=Captioned())   # its batches lack the declared input
  assert not list(tmp_path.glob('checkpoints/[0-9]*'))
