"""Our chat templates equal the same templates in Jinja, and templates without generation blocks are handled."""
import dataclasses
import json
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lm.data import tokenizers
from lm.data.chat import conversation, templates
from lm.data.tokenizers.folder import Bytes

pytest.importorskip('jinja2')
TURNS = ('{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == "assistant" %}'
         '{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}'
         '{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}')
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
MARKED = CHATML.replace("{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}",
                        "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
                        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
                        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}")
FORGETFUL = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].upper())")
JINJA = templates.JinjaTemplate(TURNS, {'bos_token': '<s>'})
UNMARKED, BLOCKS = templates.JinjaTemplate(CHATML), templates.JinjaTemplate(MARKED)
CONTROL = ('<|im_start|>', '<|im_end|>', *tokenizers.CONTROL)
MESSAGES = st.lists(st.fixed_dictionaries({
    'role': st.sampled_from(conversation._ROLES),
    'content': st.text(st.characters(exclude_categories=['Cs']) | st.sampled_from(' \n<|>'), max_size=8)
    | st.sampled_from(['<|end|>', 'a<|im_end|>\n', '</s>'])}), min_size=1, max_size=5)
TALK = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'},
        {'role': 'user', 'content': 'and'}, {'role': 'assistant', 'content': 'so on'}]


@pytest.fixture(scope='module')
def tokens():
  return tokenizers.train_sentencepiece([json.dumps(TALK) + CHATML * 3 + 'many words and such ' * 9], 400,
                                       control=CONTROL)


@given(MESSAGES, st.booleans(), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_ours_is_the_template_in_jinja(messages, prompt, first):
  ids, answer_mask = conversation.Turns().encode(Bytes(), messages, prompt, first=first)
  expected, mask = JINJA.encode(Bytes(), messages, prompt, first=first)
  assert ids.tolist() == expected.tolist() and ids.dtype == np.int32
  no_content = any(not m['content'] for m in messages)   # Jinja reports no span for an empty text
  assert answer_mask.tolist() == mask.tolist() or no_content
  assert answer_mask.dtype == bool


@given(messages=MESSAGES.filter(lambda m: m[0]['role'] != 'assistant'), first=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_template_without_generation_blocks_has_the_mask_of_one_with_them(tokens, messages, first):
  actual, expected = (template.encode(tokens, messages, first=first) for template in (UNMARKED, BLOCKS))
  assert actual[0].tolist() == expected[0].tolist() and actual[1].tolist() == expected[1].tolist()


@pytest.mark.parametrize('messages, source', [(TALK, FORGETFUL), (TALK[1:], CHATML)])
def test_a_template_that_hides_where_answers_begin_is_refused(tokens, messages, source):
  with pytest.raises(ValueError, match='does not show where message [01].* generation'):
    templates.JinjaTemplate(source).encode(tokens, messages)


ZEPHYR = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}")


def test_our_template_needs_its_control_tokens(tokens):
  assert conversation.Turns().check(tokens) == ''
  with pytest.raises(ValueError, match='would be read as text'):
    conversation.Turns().check(Bytes(('<|im_start|>',)))


@pytest.mark.parametrize('source, control, note', [
    (CHATML, CONTROL, ''), (MARKED, CONTROL, ''),
    (CHATML, ('<|im_end|>',), 'writes <|im_start|> as plain text'),
    (CHATML, ('<|im_start|>',), 'marks the end of answers with no token of .*; .* writes <|im_end|> as plain text'),
    (ZEPHYR, (), 'writes <|user|>, <|assistant|> as plain text'),
    (ZEPHYR.replace('eos_token', "(eos_token if loop.index0 < 2 else '')"), CONTROL,
     'the end of the last answer with')])
def test_a_template_with_unmarked_ends_or_roles_is_reported_and_trains(source, control, note):
  template, tokens = templates.JinjaTemplate(source, {'eos_token': '</s>'}), Bytes(control)
  notes = template.check(tokens)
  assert re.search(note, notes) if note else not notes
  assert ('marks the end' in notes) == ('the end' in note)
  ids, answer_mask = template.encode(tokens, TALK[:2])
  assert tokens.decode(ids[answer_mask]).startswith('yo')


@pytest.mark.parametrize('template', [conversation.Turns(), UNMARKED, conversation.Plain('\n')])
def test_the_prompt_of_a_conversation_is_the_beginning_of_its_dialogue(template, tokens):
  speaker = conversation.Conversation(tokens, template)
  ids, answer_mask = template.encode(tokens, TALK[:2])
  prompt, = speaker.encode_batch(['hi'])
  assert prompt.tolist() == speaker.encode_batch([TALK[:1]])[0].tolist() == ids[:int(answer_mask.argmax())].tolist()
  # For Jinja templates, files beside them name the end of a turn.
  if not isinstance(template, templates.JinjaTemplate):
    assert ids[-1] in speaker.eos_ids
  assert speaker.vocab_size == tokens.vocab_size and tokens.eos_id in speaker.eos_ids
  assert speaker.decode(ids[answer_mask]) == 'yo'


def test_the_template_of_a_conversation_decides_whether_it_begins_with_bos(tokens):
  template = templates.JinjaTemplate('{{ bos_token }}' + CHATML, {'bos_token': '<s>'})
  without = dataclasses.replace(tokens, adds_bos=False)
  for each, of, begins in ((template, without, True), (UNMARKED, tokens, False), (conversation.Plain(), tokens, True),
                           (conversation.Plain(), without, False), (conversation.Turns(), without, False)):
    speaker = conversation.Conversation(of, each)
    ids, = speaker.encode_batch(['hi'])
    assert ids.tolist().count(tokens.bos_id) == begins == (ids[0] == tokens.bos_id) and not speaker.adds_bos
