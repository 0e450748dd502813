"""Documents are held out whole; of few long ones, the last part of each."""
import itertools
import json

import pytest

from lm.data.text import corpora
from lm.data.text.mixture import mixture
from lm.data.text.source import digest, texts


@pytest.mark.parametrize('text', ['\n'.join(f'line {i} of a long text' for i in range(300)), 'word ' * 1000, 'x' * 500])
def test_of_one_text_alone_the_last_part_is_held_out(tmp_path, text):
  (tmp_path / 'one.txt').write_text(text)
  splits = corpora.text(str(tmp_path / 'one.txt'), validation=0.1).splits
  (train,), (held_out,) = splits['train'], splits['validation']
  assert train + held_out == text
  assert 0.08 < len(held_out) / len(text) <= 0.1 and (train[-1] in '\n ' or 'x' in text)


@pytest.mark.parametrize('count', [1, 2, 3, 5])
@pytest.mark.parametrize('make', ['text', 'separator', 'jsonl', 'texts', 'mixture'])
def test_where_no_document_falls_into_validation_the_last_part_of_each_is_held_out(tmp_path, make, count):
  hashed = lambda text: int.from_bytes(digest(text)[:8]) / 2**64
  novels = (f'{i}: ' + 'a line of a novel\n' * 50 + 'the end.' for i in itertools.count())
  documents = list(itertools.islice((text for text in novels if hashed(text) > 0.1), count))
  # One or two characters, which cannot be cut.
  short = next(text for text in map(str, range(99)) if hashed(text) > 0.1)
  for i, text in enumerate([*documents, short]):
    (tmp_path / f'{i}.txt').write_text(text)
  (tmp_path / 'all').write_text('|'.join([*documents, short]))
  (tmp_path / 'all.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in [*documents, short]))
  other = texts([f'{i} {i}' for i in range(100)], 0.1)
  splits = {'text': lambda: corpora.text(f'{tmp_path}/*.txt', 0.1),
            'separator': lambda: corpora.text(f'{tmp_path}/all', 0.1, '|'),
            'jsonl': lambda: corpora.jsonl(f'{tmp_path}/all.jsonl', 'text', 0.1),
            'texts': lambda: texts([*documents, short], 0.1),
            'mixture': lambda: mixture([(corpora.text(f'{tmp_path}/*.txt', 0.1), 1), (other, 1)])}[make]().splits
  train, held_out = list(splits['train'])[:count + 1], list(splits['validation'])[:count]
  assert train[-1] == short and [a + b for a, b in zip(train, held_out)] == documents
  assert all(0 < len(b) <= 0.1 * (len(a) + len(b)) and a.endswith('\n') for a, b in zip(train, held_out))


@pytest.mark.parametrize('count', [3, 4, 7, 10])
def test_of_few_long_files_of_unequal_length_each_gives_its_last_part(tmp_path, count):
  """Also where some of them have a hash that is held out: they would be the whole validation, of any size."""
  hashed = lambda text: int.from_bytes(digest(text)[:8]) / 2**64
  books = (f'{i}\n' + 'a line of a book\n' * (1200 << i % 5) for i in itertools.count())
  books = [next(book for book in books if (hashed(book) < 0.1) == (i < 2)) for i in range(count)]
  for i, text in enumerate(books):
    (tmp_path / f'{i:02}.txt').write_text(text)
  splits = corpora.text(f'{tmp_path}/*.txt', 0.1).splits
  train, held_out = list(splits['train']), list(splits['validation'])
  assert [a + b for a, b in zip(train, held_out, strict=True)] == books
  assert all(0.099 < len(b) / len(book) <= 0.1 for b, book in zip(held_out, books))


@pytest.mark.parametrize('held_out, lines', [(4, 5000), (3, 500)])
def test_enough_documents_or_short_ones_are_held_out_whole(held_out, lines):
  hashed = lambda text: int.from_bytes(digest(text)[:8]) / 2**64
  books = (f'{i}\n' + 'a line of a book\n' * lines for i in itertools.count())
  books = [next(book for book in books if (hashed(book) < 0.1) == (i < held_out)) for i in range(12)]
  splits = texts(books, 0.1).splits
  assert list(splits['validation']) == books[:held_out] and list(splits['train']) == books[held_out:]


@pytest.mark.parametrize('text, message', [
    ('', 'there is no document in it'), ('a', r'its documents \(1, the longest of 1 characters\)')])
def test_one_text_that_cannot_be_cut_is_refused(tmp_path, text, message):
  (tmp_path / 'one.txt').write_text(text)
  with pytest.raises(ValueError, match=message):
    len(corpora.text(str(tmp_path / 'one.txt'), validation=0.1).splits['train'])
