"""An exported chat model gives the same answer in transformers, and ends it with the same token."""
import json
import warnings

import jax
import numpy as np
import pytest

from lm import generate
from lm.data.chat import conversation, templates
from lm.data.tokenizers import folder as tokenizer
from lm.hf import pretrained
from lm.models import transformer

torch = pytest.importorskip('torch')
with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')

MESSAGES = [{'role': 'system', 'content': 'be brief'}, {'role': 'user', 'content': 'say "é"'}]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def chatml_folder(folder, *further):
  """Returns a folder of a tokenizer whose files name one end token, and whose chat template writes another."""
  level = tokenizers.pre_tokenizers.ByteLevel
  tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokens.pre_tokenizer, tokens.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
  tokens.train_from_iterator([], tokenizers.trainers.BpeTrainer(
      special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>', *further], show_progress=False,
      initial_alphabet=sorted(level.alphabet())))
  folder.mkdir()
  tokens.save(str(folder / 'tokenizer.json'))
  files = {'tokenizer_config': {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|endoftext|>'},
           'generation_config': {'eos_token_id': 0, 'temperature': 0.7}, 'config': {
               'architectures': ['Phi3ForCausalLM'], 'pad_token_id': 0}}
  for name, values in files.items():
    (folder / f'{name}.json').write_text(json.dumps(values))


def speaker(tokens, template, end):
  """Returns (model, params) of a model that answers a few letters and then ends: in the head, the rows of the next
  letter and of `end` are exchanged.
  """
  model = transformer.llama(tokens.vocab_size, 32, 2, 2, hidden=48, max_length=96, tied=False)
  params = jax.tree.map(lambda x: 12 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0)))
  letters = np.concatenate([tokens.encode(letter) for letter in 'abcdefghijklmnopqrstuvwxyz'])
  head = np.array(params['head'])
  head = np.where(np.isin(np.arange(len(head)), letters)[:, None], head, 0)
  ids = tokens.encode(answer(model, {**params, 'head': head}, tokens, template))
  new = [i for n, i in enumerate(ids.tolist()) if i not in ids[:n]]
  head[[new[3], end]] = head[[end, new[3]]]
  return model, {**params, 'head': head}


def answer(model, params, tokens, template):
  text, = generate.generate(model, params, conversation.Conversation(tokens, template), [MESSAGES],
                            generate.Sampling(temperature=0.), max_tokens=20)
  return text


@pytest.mark.slow
@pytest.mark.parametrize('kind, keeps', [('turns', False), ('plain', False), ('chatml', False), ('chatml', True),
                                         ('turns on chatml', True)])
def test_an_exported_chat_gives_the_same_answer_and_ends(kind, keeps, tmp_path):
  like = None
  if kind == 'turns':
    tokens, template = tokenizer.Bytes(), conversation.Turns()
    end = tokens.control_id('<|end|>')
  elif kind == 'plain':
    tokens, template = tokenizer.Bytes(), conversation.Plain('\n')
    end = tokens.eos_id
  else:
    chatml_folder(tmp_path / 'in', *(('<|user|>', '<|system|>', '<|assistant|>') if 'turns' in kind else ()))
    tokens, like = tokenizer.load(tmp_path / 'in'), tmp_path / 'in' if keeps else None
    template = templates.JinjaTemplate(CHATML) if kind == 'chatml' else conversation.Turns('<|im_end|>')
    end = tokens.control_id('<|im_end|>')
  model, params = speaker(tokens, template, end)
  expected = answer(model, params, tokens, template)
  assert 3 <= len(expected) < 20   # so it ends by itself
  pretrained.write(tmp_path / 'out', model, params, tokens, like=like, template=template)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  their_tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  prompt = their_tokens.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors='pt', return_dict=True)
  assert prompt['input_ids'][0].tolist() == template.encode(tokens, MESSAGES, add_generation_prompt=True)[0].tolist()
  new_ids = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt['input_ids'].shape[1]:]
  assert new_ids[-1] == end
  assert their_tokens.decode(new_ids[:-1]) == expected
  if keeps:
    stored = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
    assert stored == {'eos_token_id': [0, end], 'temperature': 0.7}
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (config['architectures'], config['pad_token_id']) == (['Phi3ForCausalLM'], 0)
  again = pretrained.load(str(tmp_path / 'out'))
  assert end in again.tokenizer.eos_ids and pretrained.folder_template(again.folder) is not None
