"""Answers match their grammars, whatever the model, the tokenizer and the rows beside them."""
import functools
import json
import re
import sys

import numpy as np
import pytest
from helpers import decoders
from helpers.decoders import PROMPTS, Bytes

from lm import data, evaluate, generate
from lm.generate import Grammars, Request, Sampling, Scheduler
from lm.models import transformer

pytest.importorskip('llguidance')

SCHEMA = {'type': 'object', 'additionalProperties': False, 'required': ['name', 'age', 'tags'], 'properties': {
    'name': {'type': 'string', 'maxLength': 3}, 'age': {'type': 'integer', 'minimum': 7, 'maximum': 120},
    'tags': {'type': 'array', 'maxItems': 2, 'items': {'enum': ['a', 'é\n', None]}}}}
REGEX = r'[a-c]{2,5}-[0-9]+(é|🙂)?'
CHOICES = ['yes', 'no', 'not "that"', 'a+b\\']


@pytest.mark.parametrize(('text', 'reason'), [('{', 'cannot be read as JSON'), ('[1]', 'holds no JSON object')])
def test_a_file_without_a_schema_is_named(tmp_path, text, reason):
  (tmp_path / 'a.json').write_text(text)
  with pytest.raises(ValueError, match=f'a.json {reason}'):
    generate.read_grammar(tmp_path / 'a.json', None)


@pytest.mark.parametrize('flags', [('a.json', None), (None, 'a+')])
def test_the_package_is_required_before_a_model_is_read(flags, monkeypatch):
  monkeypatch.setitem(sys.modules, 'llguidance', None)
  with pytest.raises(ImportError, match=r"llguidance is needed: pip install 'lm\[serve\]'"):
    generate.read_grammar(*flags)


def matches_schema(text):
  value = json.loads(text)
  name, age, tags = value.pop('name'), value.pop('age'), value.pop('tags')
  return (not value and isinstance(name, str) and len(name) <= 3 and type(age) is int and 7 <= age <= 120
          and len(tags) <= 2 and all(tag in ('a', 'é\n', None) for tag in tags))


TOO_LARGE = {'allOf': [{'anyOf': [{'properties': {f'{i} {j}': {'type': 'integer'}}} for i in range(6)]}
                       for j in range(8)]}


@functools.cache
def long_model():
  return decoders.make(lambda *sizes, max_length: transformer.llama(*sizes, max_length=512))


@functools.cache
def scheduler():
  model, params = long_model()
  engine = generate.Engine(model, model.unstack(params), 400, Bytes.vocab_size, Bytes().eos_ids)
  subject = Scheduler(engine, 25, (1,), tokens_per_step=4, pages=0)
  subject.warm_up()
  return subject


@functools.cache
def grammars():
  return Grammars(Bytes(), long_model()[0].vocab)


def answers(*requests, engine=None):
  """Returns (ids, log-probabilities, reason) of the choices of each request."""
  engine = engine or scheduler()
  for request in requests:
    engine.submit(request)
  result = {(request, choice): ([], [], []) for request in requests for choice in range(request.choices)}
  while engine.is_busy:
    for event in engine.step():
      ids, scores, reason = result[event.request, event.choice]
      ids += event.ids
      scores += event.log_probabilities
      reason += [event.finish_reason] if event.finish_reason else []
  return [[result[request, choice] for choice in range(request.choices)] for request in requests]


def prompt(text=''):
  return [Bytes.bos_id, *text.encode()]


@pytest.mark.parametrize('grammar, check', [
    (lambda: generate.of_json_schema(SCHEMA), matches_schema),
    (lambda: generate.of_regex(REGEX), lambda text: re.fullmatch(REGEX, text)),
    (lambda: generate.of_regex('|'.join(map(re.escape, CHOICES))), CHOICES.__contains__),
    (lambda: 'start: "x"+ y\ny: /[0-9]/ | "(" y ")"', lambda text: text.count('(') == text.count(')'))])
def test_a_hundred_answers_of_an_untrained_model_match(grammar, check):
  compiled = grammars().compile(grammar())
  choices, = answers(Request(prompt('the answer: '), max_tokens=380, seed=3, choices=100, grammar=compiled))
  for ids, _, reason in choices:
    assert reason == ['stop'] and ids[-1] == Bytes.eos_id
    assert check(Bytes().decode_bytes(ids).decode())   # strict: whole characters
  assert len({str(ids) for ids, _, _ in choices}) > 1
  assert scheduler().compilations == 0


def test_other_rows_keep_their_bits_and_so_does_a_row_with_a_grammar():
  def requests():
    free = [Request(prompt('def f(x):'), Sampling(0.8, 60, 0.95), 30, seed, choices=2) for seed in (1, 2)]
    compiled = [grammars().compile(text) for text in (generate.of_json_schema(SCHEMA), generate.of_regex(REGEX))]
    return [free[0], *(Request(prompt('a'), max_tokens=300, seed=5, grammar=grammar) for grammar in compiled), free[1]]

  alone = [answers(request)[0] for request in requests()]
  assert answers(*requests()) == alone
  assert answers(*reversed(requests())) == alone[::-1]
  assert scheduler().compilations == 0


def test_a_greedy_answer_has_the_most_probable_token_of_those_that_are_allowed():
  model, params = long_model()
  compiled = grammars().compile(generate.of_regex('[xyz]{6}'))
  [(ids, scores, _)], = answers(Request(prompt('ab'), Sampling(0), 20, grammar=compiled))
  assert len(ids) == 7
  for i, token in enumerate(ids[:6]):
    texts = [np.int32([*prompt('ab'), *ids[:i], ord(other)]) for other in 'xyz']
    last = [values[-1] for values in evaluate.score.log_probabilities(model, params, texts)]
    assert token == ord('xyz'[np.argmax(last)])
    np.testing.assert_allclose(scores[i], max(last), atol=1e-5)   # of the model, not of what is allowed


class Pieces:
  """A tokenizer whose tokens are these pieces, two of them equal; those without bytes are control tokens."""
  pieces = [b'', b'a', b'b', b'ab', b'abc', b'bc', b'c', b'', b'x', b'ab', b'\xff', b'\xc3', b'\xa9', b'cb', b'',
            *[b'q'] * 25]
  vocab_size, eos_id, eos_ids = len(pieces), 7, (7, 14)

  def decode_bytes(self, ids):
    return b''.join(self.pieces[i] for i in ids)


def bits_of(words):
  return {i for i in range(32 * len(words)) if int(words[i // 32]) >> i % 32 & 1}


def test_the_allowed_tokens_are_those_of_a_plain_loop():
  texts = ['ab', 'abc', 'b', 'cbab', 'cé', 'abcb']
  compiled = Grammars(Pieces(), 70).compile(generate.of_regex('|'.join(map(re.escape, texts))))
  spelled, visited = [text.encode() for text in texts], set()

  def walk(ids):
    matcher, prefix = compiled.start(stop_ids=(0,)), Pieces().decode_bytes(ids)
    matcher.add(ids)
    words = matcher.allowed()
    longer = {i for i, piece in enumerate(Pieces.pieces)
              if piece and any(text.startswith(prefix + piece) for text in spelled)}
    assert words.shape == (3,) and words.dtype == np.int32 and not matcher.failure
    assert bits_of(words) == longer | ({0, 7, 14} if prefix in spelled else set())
    for end in (0, 7, 14) if prefix in spelled else ():
      ended = compiled.start(stop_ids=(0,))
      ended.add([*ids, end])
      assert not ended.failure
    visited.add(prefix)
    for i in longer:
      walk([*ids, i])

  walk([])
  assert set(spelled) < visited


@pytest.mark.parametrize('tokenizer', [
    lambda: data.tokenizers.Bytes(),
    lambda: byte_level_pieces(), lambda: sentence_pieces()])
def test_text_is_what_the_tokenizer_decodes(tokenizer):
  tokenizer, rng = tokenizer(), np.random.default_rng(0)
  subject = Grammars(tokenizer, tokenizer.vocab_size + 9)
  before = tokenizer.encode('a')   # some tokenizers drop a space at the beginning of a text
  pattern = ' ?(self|dora|[a-z é]{3})+: "(anna bert|\t日本)"'
  for text, check in ((generate.of_regex(pattern), lambda text: re.fullmatch(pattern, text)),
                      (generate.of_json_schema(SCHEMA), matches_schema)):
    compiled = subject.compile(text)
    for _ in range(12):
      matcher, ids = compiled.start(), []
      while not ids or ids[-1] not in tokenizer.eos_ids:
        ids.append(int(rng.choice(sorted(bits_of(matcher.allowed())))))
        matcher.add(ids[-1:])
      assert check(tokenizer.decode([*before, *ids]).removeprefix('a'))


def byte_level_pieces():
  from helpers.byte_level import TEXT, byte_level
  return byte_level([TEXT])


def sentence_pieces():
  from helpers.tokenizers import piece_model
  return data.tokenizers.SentencePiece(piece_model(), '<s>', '</s>')


@pytest.mark.slow
def test_a_stream_joins_to_the_whole_and_matches():
  model, params = decoders.make()
  compiled = grammars().compile(generate.of_regex(REGEX))
  options = {'max_tokens': 60, 'seed': 4, 'grammar': compiled}
  texts = generate.generate(model, params, Bytes(), PROMPTS, **options)
  assert all(re.fullmatch(REGEX, text) for text in texts) and len(set(texts)) == 4
  assert [''.join(row) for row in zip(*generate.stream(model, params, Bytes(), PROMPTS, **options))] == texts


@pytest.mark.parametrize('text, message', [
    ('start: (', 'Expected'), ('begin: "a"', 'start'), ('start: /(/', 'unclosed group'),
    ('start: %json {"type": "integer", "minimum": 3, "maximum": 2}', 'minimum'),
    ('start: %json {"type": "array", "uniqueItems": true}', 'uniqueItems'),
    ('start: %json ' + '{"items":' * 3000 + '{}' + '}' * 3000, 'recursion limit'),
    (f'start: %json {json.dumps(TOO_LARGE)}', 'too large'),
    ('start: %json {"type": "array", "minItems": 1000000000}', 'minItems=1000000000 is more than 10,000'),
    ('start: %json {"type": "array", "maxItems": 1e9}', 'maxItems=1e9 is more than 10,000')])
def test_what_is_no_grammar_or_too_large_is_refused_in_one_line(text, message):
  with pytest.raises(ValueError, match=message) as refusal:
    grammars().compile(text)
  assert '\n' not in str(refusal.value)


def test_settings_that_exclude_tokens_are_refused_beside_a_grammar():
  compiled = grammars().compile('start: "a"')
  for sampling in Sampling(min_tokens=2), Sampling(bad_words=((97,),)):
    with pytest.raises(ValueError, match='a grammar may need'):
      scheduler().submit(Request(prompt(), sampling, 9, grammar=compiled))


class NoZ(Bytes):
  def decode_bytes(self, ids):
    return super().decode_bytes(ids).replace(b'z', b'')


def test_an_answer_that_cannot_go_on_ends_and_says_so():
  subject = Grammars(NoZ(), long_model()[0].vocab)
  with pytest.raises(ValueError, match='no token of the vocabulary'):
    subject.compile('start: "z"')
  compiled = subject.compile('start: "x" "z"')
  dead, free = Request(prompt(), max_tokens=9, grammar=compiled), Request(prompt('a'), Sampling(0), 9)
  [(ids, _, reason)], [free] = answers(dead, free)
  assert ids == [ord('x'), Bytes.eos_id] and reason == ['grammar']
  assert len(free[0]) == 9 and not scheduler().is_busy


@pytest.mark.slow
def test_a_completion_that_cannot_go_on_is_refused():
  compiled = Grammars(NoZ(), long_model()[0].vocab).compile('start: "x" "z"')
  with pytest.raises(ValueError, match='no token of the vocabulary'):
    generate.generate(*decoders.make(), Bytes(), ['a'], grammar=compiled)
