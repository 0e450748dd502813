"""Cleaning rules repair published examples, and leave correct text alone."""
import ast
import pathlib
import pickle
import string
import sysconfig
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.data.text import clean
from lm.data.text.clean import Drop

anything = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates too
rough = st.text(st.sampled_from(' \t\n\r\x0b\x0c\x1b[3mA;é，　\u2028\x85\ufeffÃ¶\xa0'), max_size=30)


@pytest.mark.parametrize('broken, repaired', [
    ('schÃ¶n', 'schön'), ('âœ” No problems', '✔ No problems'),  # examples of ftfy's documentation
    ('lone \ud800 surrogate', 'lone \ufffd surrogate'), ('pair \ud83d\ude00', 'pair 😀'),
    ('naÃ¯ve\nna\u00efve', 'na\u00efve\nna\u00efve'),  # each line by itself: the second is correct already
])
def test_unicode_repairs(broken, repaired):
  assert clean.Unicode()(broken) == repaired


@pytest.mark.parametrize('right', [
    '你好，世界！（测试）', 'ＬＯＵＤ　ＮＯＩＳＥＳ', "s = '&lt;é&amp;'", 'say “é” and ‘é’', 'ﬁ é',
    '\uf914樂', 'e\u0301', '\u212b', 'é\t\x1b'])
def test_unicode_leaves_what_is_right(right):
  assert clean.Unicode()(right) == right


def test_unicode_reads_back_any_text_decoded_as_latin_1():
  for text in ['Größe: Äpfel, Öl, Übermut', 'Le cœur déçu mais l’âme plutôt naïve', '今天天气很好，我们去公园吧']:
    assert clean.Unicode()(text.encode().decode('latin-1')) == text


def test_control_characters_are_removed_and_joiners_of_letters_stay():
  rule = clean.ControlCharacters()
  assert rule('a\r\nb\rc\td\n') == 'a\nb\nc\td\n'
  assert rule('\ufeff\x00a\x08b\x7f\x9f') == 'ab'
  assert rule('\x1b[31;1mred\x1b[0m') == 'red'
  assert rule('👩\u200d💻 می\u200cخواهم') == '👩\u200d💻 می\u200cخواهم'  # joiners belong to letters


@given(st.one_of(anything, rough))
def test_no_control_character_is_left(text):
  remaining = {c for c in clean.ControlCharacters()(text) if unicodedata.category(c) == 'Cc'}
  assert remaining <= {'\n', '\t'}


def test_whitespace_keeps_indentation():
  assert clean.Whitespace()('\n\n  def f(): \t\n\n\n\n\n\n\treturn 1  \n\n') == '  def f():\n\n\n\treturn 1'
  assert clean.Whitespace()('　　第一段　\n') == '　　第一段'


@pytest.mark.parametrize('rule', [*clean.DEFAULT, clean.Length(3, 5)], ids=repr)
@given(text=st.one_of(anything, rough))
@settings(max_examples=60)
@example(text='\x85Ã¶\u2028')
def test_rules_are_total_and_idempotent(rule, text):
  once = rule(text)
  assert isinstance(once, Drop) or rule(once) == once


@given(st.one_of(anything, rough))
def test_cleaned_text_is_utf8_and_not_empty(text):
  once = clean.apply(clean.DEFAULT, text)
  if not isinstance(once, Drop):
    assert once.encode().decode() == once and once.strip() and once == clean.Whitespace()(once)


def test_source_code_means_the_same_after_cleaning():
  for name in ['argparse.py', 'textwrap.py', 'smtplib.py', 'locale.py']:
    code = pathlib.Path(sysconfig.get_paths()['stdlib'], name).read_text('utf-8')
    assert ast.dump(ast.parse(clean.apply(clean.DEFAULT, code))) == ast.dump(ast.parse(code))


def test_documents_outside_the_range_of_lengths_are_dropped():
  rule = clean.Length(2, 4)
  assert [rule('x' * n) for n in range(1, 6)] == [Drop('too short'), 'xx', 'xxx', 'xxxx', Drop('too long')]
  assert clean.apply(clean.DEFAULT, ' \n\t\n') == Drop('too short')
  with pytest.raises(ValueError, match='max=1 is below min=2'):
    clean.Length(2, 1)


def test_stop_words_are_removed_as_whole_words():
  assert clean.StopWords('en')('The cat is on the mat, and I don’t care.\n  the end') == 'cat mat, care.\n  '
  assert clean.StopWords('en')('theatre others-wise') == 'theatre others-wise'  # whole words only
  # jieba's published segmentation is 我/来到/北京/清华大学: the stop words 来, 到 and 大 within words stay.
  assert clean.StopWords('zh')('我来到北京清华大学') == '来到北京清华大学'
  assert clean.StopWords('de')('Der Hund und die Katze') == 'Hund Katze'
  with pytest.raises(ValueError, match="no list for 'xx'; there is af, ar"):
    clean.StopWords('xx')
  with pytest.raises(ValueError, match="'ja' is written without spaces"):
    clean.StopWords('ja')


def test_rules_are_pickled_and_named_by_their_repr():
  for rule in [*clean.DEFAULT, clean.StopWords('en')]:
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert repr(rule).startswith(type(rule).__name__ + '(') and ' at 0x' not in repr(rule)


def test_workers_give_the_same_in_order():
  documents = [f'document {i % 90} \r\n' if i % 7 else ' ' for i in range(300)]
  alone = list(clean.clean(documents))
  assert list(clean.clean(iter(documents), workers=2)) == alone
  texts = [d for d in alone if not isinstance(d, Drop)]
  assert texts == list(dict.fromkeys(d.strip() for d in documents if d.strip()))
  assert alone.count(Drop('too short')) == sum(not d.strip() for d in documents)
  assert len(alone) == len(documents) == len(texts) + alone.count(Drop('duplicate')) + alone.count(Drop('too short'))


def test_documents_are_read_as_needed():
  read = []
  stream = (read.append(i) or letter for i, letter in enumerate(string.ascii_letters * 100))
  results = clean.clean(stream, workers=2)
  assert [next(results) for _ in range(3)] == ['a', 'b', 'c']
  results.close()
  assert len(read) < 600


def test_duplicates_are_shared_between_splits():
  deduplicate = clean.Deduplicate()
  assert list(clean.clean(['a', 'b', 'a '], deduplicate=deduplicate)) == ['a', 'b', Drop('duplicate')]
  assert list(clean.clean(['b\n', 'c'], deduplicate=deduplicate)) == [Drop('duplicate'), 'c']


def test_an_error_in_a_worker_is_raised_here():
  with pytest.raises(AttributeError, match='NoneType'):
    list(clean.clean(['a', None], workers=2))


@pytest.mark.parametrize('mark', ['\f', '\v', '\x1c', '\x1d', '\x1e', '\x1f', '\x85'])
def test_separators_of_lines_and_pages_become_line_breaks(mark):
  assert clean.ControlCharacters()(f'one{mark}two') == 'one\ntwo'


@given(st.text(st.characters(codec='utf-8'), min_size=1, max_size=1500), st.data())
@settings(max_examples=50, deadline=None)
def test_texts_that_differ_in_any_one_character_are_kept(text, data):
  place = data.draw(st.integers(0, len(text) - 1))
  other = data.draw(st.one_of(st.just(text[place].swapcase()), st.characters(codec='utf-8')))
  changed = text[:place] + other + text[place + 1:]
  results = list(clean.clean([text, changed, text], rules=()))
  assert results[2] == clean.Drop('duplicate') and (results[1] == changed) == (changed != text)


def test_texts_that_differ_late_or_in_case_alone_are_kept():
  texts = ['x' * 200_000 + 'a', 'x' * 200_000 + 'b', 'Case', 'case', 'caf\u00e9', 'cafe\u0301', ' a', 'a']
  assert list(clean.clean(texts, rules=())) == texts
