"""A folder of files gives a tokenizer with the control tokens and the spans of these files."""
import dataclasses
import json
import pickle
import warnings

import numpy as np
import pytest
from helpers.byte_level import byte_level

from lm.data.tokenizers import folder as tokenizer


def folder_with(tmp_path, documents, post_processor=None, **files):
  t = json.loads(byte_level(documents).model)
  t['post_processor'] = post_processor
  for i, name in enumerate(['<x>', '<y>', '<z>']):
    t['added_tokens'].append({**t['added_tokens'][0], 'id': 600 + i, 'content': name})
  (tmp_path / 'tokenizer.json').write_text(json.dumps(t))
  for name, value in files.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(value))
  return tokenizer.load(tmp_path)


def test_spans_include_the_spaces_that_the_file_would_trim(tmp_path, documents):
  trims = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
  t = folder_with(tmp_path, documents, trims)
  spans = t.parse('def  self ')[1].tolist()
  assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), 10]


def test_bos_that_the_file_would_add_is_not_added(tmp_path, documents):
  tokenizers = pytest.importorskip('tokenizers')
  adds = {'type': 'TemplateProcessing', 'pair': [],
          'special_tokens': {'<x>': {'id': '<x>', 'ids': [600], 'tokens': ['<x>']}},
          'single': [{'SpecialToken': {'id': '<x>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]}
  t = folder_with(tmp_path, documents, adds, tokenizer_config={'bos_token': '<x>', 'eos_token': {'content': '<y>'}})
  assert tokenizers.Tokenizer.from_str(t.model).encode('def').ids[0] == t.bos_id == 600
  np.testing.assert_array_equal(t.encode('def'), byte_level(documents).encode('def'))
  np.testing.assert_array_equal(t.parse('def')[0], t.encode('def'))


@pytest.mark.parametrize('files, ends', [
    ({'generation_config': {'eos_token_id': [601, 602, 9]}, 'config': {'eos_token_id': 600}}, (601, 602, 9)),
    ({'config': {'eos_token_id': [602, 601, 9999]}}, (602, 601)),
    ({'tokenizer_config': {'eos_token': '<z>'}, 'generation_config': {'eos_token_id': 601}}, (602, 601)),
    ({'tokenizer_config': {'eos_token': '<y>'}, 'config': {'eos_token_id': 601}}, (601,)),
    ({'tokenizer_config': {'eos_token': '<y>'}, 'config': {'eos_token_id': None}}, (601,))])
def test_all_end_tokens_are_read_and_saved(files, ends, tmp_path, documents):
  t = folder_with(tmp_path, documents, **files)
  assert t.eos_ids == ends and t.eos_id == ends[0]
  t.save(tmp_path / 'saved')
  for other in (tokenizer.load(tmp_path / 'saved'), pickle.loads(pickle.dumps(t))):
    assert other.eos_ids == ends
  bare = dataclasses.replace(t, ends=())   # end tokens change no encoding
  assert bare == t and bare.fingerprint == t.fingerprint


XY = ['<x>', '<y>']


@pytest.mark.parametrize('files, expected', [
    ({'tokenizer_config': {'bos_token': '<x>', 'eos_token': {'content': '<y>'}, 'add_bos_token': True}}, XY),
    ({'special_tokens_map': {'bos_token': '<x>', 'eos_token': '<z>'}, 'tokenizer_config': {'eos_token': '<y>'}}, XY),
    ({'special_tokens_map': {'bos_token': None, 'eos_token': '<y>'}, 'config': {'bos_token_id': 600}}, XY),
    ({'generation_config': {'eos_token_id': [601, 602]}, 'config': {'bos_token_id': 600, 'eos_token_id': 602}}, XY),
    ({'separators': {'bos': '<x>', 'eos': '<y>'}, 'tokenizer_config': {'bos_token': '<z>', 'eos_token': '<z>'}}, XY),
    ({'config': {'is_encoder_decoder': True, 'decoder_start_token_id': 600, 'pad_token_id': 602, 'eos_token_id': 601},
      'tokenizer_config': {'bos_token': '<z>'}}, XY),
    ({'config': {'is_encoder_decoder': True, 'pad_token_id': 600, 'eos_token_id': 601}}, XY),
    ({'tokenizer_config': {'bos_token': 'no such token'}, 'config': {'eos_token_id': [7]}}, ['<|endoftext|>'] * 2)])
def test_bos_and_eos_are_those_of_the_files_beside_the_tokenizer(files, expected, tmp_path, documents):
  t = folder_with(tmp_path, documents, **files)
  assert (t.bos_id, t.eos_id) == tuple(map(t.control_id, expected))


@pytest.mark.parametrize('lower_case', [True, False])
def test_a_vocab_txt_of_bert_gives_the_tokens_of_transformers(lower_case, tmp_path):
  pytest.importorskip('tokenizers')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    transformers = pytest.importorskip('transformers')
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'the', 'The', 'cafe', 'Café', ',', '!', 'un', '##believ',
           '##able', '##s', '我', '你', '[', ']', 'cl']
  (tmp_path / 'vocab.txt').write_text('\n'.join(words) + '\n')
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'do_lower_case': lower_case}))
  ours = tokenizer.load(tmp_path)
  theirs = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=lower_case)
  for text in ('The  unbelievables, Café!', '我你 the', 'the\tqqq\u200b cafés', ''):
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
  assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (2, 3, True)
  assert ours.encode('[CLS]').tolist() != [2]   # a name of a control token in a text is text
  (tmp_path / 'vocab.txt').write_text('a\nb\n')
  with pytest.raises(ValueError, match=r'it lacks \[UNK\], \[CLS\], \[SEP\]'):
    tokenizer.load(tmp_path)
