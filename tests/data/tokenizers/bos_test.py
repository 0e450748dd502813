"""A text begins with bos if the files of its tokenizer say so, as transformers reads them."""
import dataclasses
import json

import generate as generate_script
import jax
import numpy as np
import pytest
from helpers.tokenizers import CHATML, byte_level, piece_model, tokenizers

from lm import generate, signature
from lm.data.chat import conversation, templates
from lm.data.tokenizers import folder as tokenizer
from lm.data.tokenizers.base import Bytes
from lm.evaluate import text_scores
from lm.hf import pretrained
from lm.models import transformer


def folder(path, kind):
  """Returns a folder of tokenizer files as a family of models publishes them."""
  config = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  match kind:
    case 'gpt2':
      ids = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
      (path / 'vocab.json').write_text(json.dumps({**ids, '<|endoftext|>': 256}))
      (path / 'merges.txt').write_text('#version: 0.2\n')
      config = {'tokenizer_class': 'GPT2Tokenizer'}
    case 'opt':
      folder(path, 'gpt2')
      config = {'tokenizer_class': 'GPT2Tokenizer', 'add_bos_token': True}
    case 'llama':
      byte_level(['<s>', '</s>'], '<s> $A').save(str(path / 'tokenizer.json'))
      config |= {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': False}   # the post-processor decides
    case 'gemma':
      byte_level(['<pad>', '<eos>', '<bos>'], '<bos> $A').save(str(path / 'tokenizer.json'))
      config |= {'bos_token': '<bos>', 'eos_token': '<eos>'}
    case 'qwen':
      byte_level(['<|endoftext|>', '<|im_start|>', '<|im_end|>']).save(str(path / 'tokenizer.json'))
      config |= {'bos_token': None, 'eos_token': '<|im_end|>', 'add_bos_token': False, 'chat_template': CHATML}
      (path / 'generation_config.json').write_text(json.dumps({'bos_token_id': 0, 'eos_token_id': [2, 0]}))
    case 't5':
      byte_level(['<pad>', '</s>'], '$A </s>').save(str(path / 'tokenizer.json'))
      config |= {'eos_token': '</s>', 'pad_token': '<pad>'}
      (path / 'config.json').write_text(json.dumps({'is_encoder_decoder': True, 'decoder_start_token_id': 0}))
    case 'bert':
      byte_level(['[CLS]', '[SEP]'], '[CLS] $A [SEP]').save(str(path / 'tokenizer.json'))
      config |= {'cls_token': '[CLS]', 'sep_token': '[SEP]'}
    case 'pieces' | 'pieces without':
      (path / 'tokenizer.model').write_bytes(piece_model())
      config = {'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': kind == 'pieces'}
  (path / 'tokenizer_config.json').write_text(json.dumps(config))
  return path


KINDS = {'gpt2': False, 'opt': True, 'llama': True, 'gemma': True, 'qwen': False, 't5': False, 'bert': True,
         'pieces': True, 'pieces without': False}


@pytest.mark.parametrize('kind', KINDS)
def test_a_text_begins_as_with_the_tokenizer_of_transformers(kind, tmp_path):
  transformers = pytest.importorskip('transformers')
  ours = tokenizer.load(folder(tmp_path, kind))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)('anna bert').input_ids
  assert ours.adds_bos == KINDS[kind]
  ends = [ours.eos_id] if kind in ('t5', 'bert') else []   # callers of these models add the end
  assert theirs == [*[ours.bos_id] * ours.adds_bos, *ours.encode('anna bert').tolist(), *ends]
  ours.save(tmp_path / 'saved')
  assert tokenizer.load(tmp_path / 'saved').adds_bos == ours.adds_bos


def test_a_text_that_begins_with_another_token_is_refused(tmp_path):
  byte_level(['<s>', '</s>', '<x>'], '<x> $A').save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ValueError, match=r'puts the tokens \(2,\) in front of a text, and bos is 0'):
    tokenizer.load(tmp_path)
  assert tokenizer.load(tmp_path, bos='<x>').adds_bos


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Returns a random model beside the tokenizer of each of two families: texts of one begin with bos, of the other not.
  """
  folders = {}
  for kind in ('llama', 'qwen'):
    path = folders[kind] = tmp_path_factory.mktemp(kind)
    side = folder(tmp_path_factory.mktemp('side'), kind)
    (side / 'config.json').write_text('{}')
    model = transformer.llama(260, 32, 2, 4, max_length=64)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda like: rng.normal(0, 0.4, like.shape).astype(np.float32),   # noqa: B023
                          jax.eval_shape(model.init, jax.random.key(0)))
    path.rmdir()
    pretrained.write(path, model, params, tokenizer.load(side), like=side)
  return folders


@pytest.mark.parametrize('kind, flag, begins', [
    ('llama', None, True), ('qwen', None, False), ('llama', False, False), ('qwen', True, True)])
def test_scores_and_text_follow_the_bos_rule_of_the_tokenizer(models, kind, flag, begins, capsys, monkeypatch):
  loaded = pretrained.load(str(models[kind]))
  ids = [*[loaded.tokenizer.bos_id] * begins, *loaded.tokenizer.encode('anna')]
  scores, = text_scores.scored(loaded, ['anna'], None, text_scores.begins(loaded, flag))
  assert scores.tokens == ids[1:]
  output = capsys.readouterr().out
  assert 'is put in front' in output and output.startswith('no ') != begins
  assert ('as asked for' if flag is not None else 'as the tokenizer does') in output
  read = []
  monkeypatch.setattr('lm.generate.text._pieces', lambda request, prompts, batch:
                      read.append(batch) or iter(()))
  signature.call(generate_script.main, model=str(models[kind]), prompt='anna', bos=flag, max_tokens=4)
  assert read[0].tokens[read[0].segments > 0].tolist() == ids
  # Without a token there is nothing to continue.
  signature.call(generate_script.main, model=str(models[kind]), prompt='', bos=flag, max_tokens=4)
  assert read[1].tokens[read[1].segments > 0].tolist() == [loaded.tokenizer.bos_id]


def test_a_dialogue_has_the_ids_of_transformers(tmp_path):
  transformers, _ = pytest.importorskip('transformers'), pytest.importorskip('jinja2')
  ours = tokenizer.load(folder(tmp_path, 'qwen'))
  dialogue = [{'role': 'user', 'content': 'hi'}]
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
      dialogue, add_generation_prompt=True, return_dict=True)['input_ids']
  assert conversation.Conversation(ours, templates.load(tmp_path)).encode_batch(['hi'])[0].tolist() == theirs


def test_a_sampled_text_is_the_same_whoever_puts_bos_in_front():
  """The random stream of a prompt depends on its text, not on who adds bos."""
  ids = Bytes().encode('hi')
  assert generate.random_streams([ids], 1, 256) == generate.random_streams([np.r_[256, ids]], 1, 256)


def test_documents_begin_with_bos_whatever_the_rule_was(tmp_path):
  from lm.data import dataset
  from lm.data.text import corpora
  (tmp_path / 'texts.txt').write_text('\n\n'.join(f'document {i}' for i in range(40)))
  ours = dataclasses.replace(tokenizer.load(folder(tmp_path, 'qwen')), bos='<|endoftext|>')
  assert not ours.adds_bos
  data = dataset.Text(corpora.text(str(tmp_path / 'texts.txt'), 0.2, '\n\n'), ours, 16)
  assert data.open(tmp_path / 'run', progress=lambda line: None).tokenizer.adds_bos
  assert data.load_tokenizer(tmp_path / 'run').adds_bos
