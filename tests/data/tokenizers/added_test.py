"""Files beside a vocabulary add tokens to it, which are read as transformers reads them, or refused."""
import json

import pytest
from helpers.tokenizers import CHATML, byte_level, piece_model

from lm.data.chat import conversation, templates
from lm.data.tokenizers import folder as tokenizer

transformers = pytest.importorskip('transformers')
FLAGS = dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False)
MARKS = ['<|im_start|>', '<|im_end|>']


def pieces(path, marks=MARKS, special=True, files='both', **config):
  model = piece_model(normalization_rule_name='identity', remove_extra_whitespaces=False)   # like Llama's
  import sentencepiece
  n = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
  (path / 'tokenizer.model').write_bytes(model)
  if files != 'config':
    (path / 'added_tokens.json').write_text(json.dumps({name: n + i for i, name in enumerate(marks)}))
  if files != 'added':
    config['added_tokens_decoder'] = {str(n + i): {'content': name, 'special': special, **FLAGS}
                                      for i, name in enumerate(marks)}
  (path / 'tokenizer_config.json').write_text(json.dumps({
      'tokenizer_class': 'LlamaTokenizer', 'bos_token': '<s>', 'eos_token': '<|im_end|>', 'unk_token': '<unk>',
      'chat_template': CHATML, **config}))
  return n


def in_transformers(path, text='hi'):
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  return theirs, theirs.apply_chat_template([{'role': 'user', 'content': text}], add_generation_prompt=True,
                                            return_dict=True)['input_ids']


@pytest.mark.parametrize('files', ['both', 'config', 'added'])
@pytest.mark.parametrize('config', [{}, {'legacy': False}, {'legacy': True}, {'add_bos_token': True}])
def test_marks_beside_a_model_of_pieces(tmp_path, files, config):
  pytest.importorskip('jinja2')
  n = pieces(tmp_path, files=files, **config)
  ours, (theirs, expected) = tokenizer.load(tmp_path), in_transformers(tmp_path)
  assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs)) == (n + 1, n + 2)
  assert conversation.Conversation(ours, templates.load(tmp_path)).encode_batch(['hi'])[0].tolist() == expected
  assert not {n, n + 1} & {*ours.encode('a <|im_start|> b').tolist()} and ours.decode([n, n + 1]) == ''
  ours.save(tmp_path / 'saved')
  again = tokenizer.load(tmp_path / 'saved')
  assert again == ours and again.parse('<|im_end|>anna')[0].tolist() == ours.parse('<|im_end|>anna')[0].tolist()


def test_added_text_is_one_token_as_in_transformers(tmp_path):
  n = pieces(tmp_path, ['[TABLE]'], special=False, files='config', eos_token='</s>')
  ids = tokenizer.load(tmp_path).encode('anna[TABLE]bert').tolist()
  assert n in ids and n in transformers.AutoTokenizer.from_pretrained(tmp_path)('anna[TABLE]bert').input_ids
  assert tokenizer.load(tmp_path).decode([n]) == '[TABLE]'


@pytest.mark.parametrize('token, id, special', [('[X]', 258, True), ('[Y]', 259, True), ('[Y]', 259, False)])
def test_tokens_beside_a_tokenizer_json(tmp_path, token, id, special):
  import tokenizers
  t = byte_level(['<s>', '</s>'])
  t.add_tokens([tokenizers.AddedToken('[X]', special=False, normalized=False)])
  t.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({
      'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>',
      'added_tokens_decoder': {id: {'content': token, 'special': special, **FLAGS}}}))
  ours, theirs = tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert ours.vocab_size == len(theirs) and ours.parse('a[X]b[Y]')[0].tolist() == theirs('a[X]b[Y]').input_ids
  assert ours.decode([id]) == theirs.decode([id], skip_special_tokens=True) == ('' if special else token)
  assert (id in ours.encode(token)) != special


@pytest.mark.parametrize('kind', ['json', 'pieces'])
def test_an_id_that_transformers_would_not_give_is_refused(tmp_path, kind):
  for where, message in ((5, 'token 5, '), (999, 'token 999, ')):
    if kind == 'json':
      byte_level(['<s>', '</s>']).save(str(tmp_path / 'tokenizer.json'))
    else:
      (tmp_path / 'tokenizer.model').write_bytes(piece_model())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
        {'added_tokens_decoder': {where: {'content': '[X]', 'special': True, **FLAGS}}}))
    with pytest.raises(ValueError, match=f"add '\\[X\\]' as {message}"):
      tokenizer.load(tmp_path)
