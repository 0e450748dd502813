"""A corpus is built once, opened afterwards, and never mixed with another."""
import dataclasses
import pathlib
import threading
from collections.abc import Sequence

import jax
import pytest

from lm.data import dataset, tokenizers
from lm.data.chat import dialogues
from lm.data.text import clean
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.objectives.next_token import next_token
from lm.sharding import hosts

TEXTS = [f'document {i}: ' + 'ha ' * i for i in range(12)]
SOURCE = Source('tiny', {'train': TEXTS[:9], 'validation': [*TEXTS[9:], '  \n']}, 'fingerprint')


class Untouched(Sequence):
  """Documents that must not be read."""
  def __len__(self):
    raise AssertionError('read')

  __getitem__ = __len__


UNREAD = dataclasses.replace(SOURCE, splits={'train': Untouched(), 'validation': Untouched()})


def shout(document: str) -> str:
  return document.upper()


@dataclasses.dataclass
class Trainer:
  """Trains a tokenizer with this number of control tokens, and notes the documents that it trains on."""
  control: int = 2

  def __call__(self, documents):
    self.documents = list(documents)
    return Bytes(tuple(f'<|{i}|>' for i in range(self.control)))


def test_a_corpus_is_the_cleaned_text_in_tokens(tmp_path):
  trainer = Trainer()
  opened = dataset.Text(SOURCE, trainer, 16, (*clean.DEFAULT, shout)).open(tmp_path, lambda line: None)
  cleaned = [text.strip().upper() for text in TEXTS]
  assert trainer.documents == cleaned[:9]
  for split, expected in (('train', cleaned[:9]), ('validation', cleaned[9:])):
    store = opened.stores[split]
    assert [opened.tokenizer.decode(store[i]) for i in range(len(store))] == expected
    assert opened.text(split) == ''.join(expected)
  batch = opened.batches('train', next_token(), rows=40, seed=None, repeat=False)(0)
  assert batch.tokens.shape == (40, 16) and batch.tokens[0, 0] == opened.tokenizer.bos_id
  assert opened.tokenizer.decode(batch.targets[0, :len(cleaned[0])]) == cleaned[0]
  assert (batch.targets == opened.tokenizer.eos_id).sum() == 9


@pytest.mark.parametrize('tokenizer', [Trainer(), Bytes()])
def test_the_second_time_nothing_is_trained_read_or_tokenised(tmp_path, tokenizer):
  first = dataset.Text(SOURCE, tokenizer, 16).open(tmp_path, lambda line: None)
  if isinstance(tokenizer, Trainer):
    del tokenizer.documents
  lines = []
  text = dataset.Text(UNREAD, tokenizer, 16)
  second = text.open(tmp_path, lines.append)
  assert not lines and not hasattr(tokenizer, 'documents')
  assert second.fingerprint == first.fingerprint
  assert second.tokenizer == first.tokenizer == text.load_tokenizer(tmp_path)
  assert second.text('train') == first.text('train')


def test_a_folder_of_its_own_serves_two_workdirs(tmp_path):
  opened = [dataset.Text(source, Bytes(), 16, folder=tmp_path / 'data').open(tmp_path / name, lambda line: None)
            for source, name in ((SOURCE, 'a'), (UNREAD, 'b'))]
  assert opened[0].fingerprint == opened[1].fingerprint and not (tmp_path / 'b').exists()


def test_a_tokenizer_whose_training_was_interrupted_is_trained_again(tmp_path):
  def killed(documents):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    dataset.Text(SOURCE, killed, 16).open(tmp_path, lambda line: None)
  assert dataset.Text(SOURCE, Trainer(), 16).open(tmp_path, lambda line: None).tokenizer.vocab_size == 260


@pytest.mark.parametrize('before', [Trainer(), Bytes()])
@pytest.mark.parametrize('changes, named', [
    ({'tokenizer': Trainer(control=3)}, 'tokenizer'), ({'tokenizer': Bytes(('<|other|>',))}, 'tokenizer'),
    ({'rules': (*clean.DEFAULT, shout)}, 'rules'),
    ({'source': dataclasses.replace(SOURCE, fingerprint='other')}, 'source')])
def test_other_settings_are_refused_by_name_and_change_nothing(tmp_path, before, changes, named):
  text = dataset.Text(SOURCE, before, 16)
  first = text.open(tmp_path, lambda line: None)
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)   # a checkpoint of a run that was trained on it
  files = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  with pytest.raises(ValueError, match=named) as error:
    dataclasses.replace(text, **changes).open(tmp_path, lambda line: None)
  assert str(tmp_path) in str(error.value)
  assert files == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  assert text.open(tmp_path, lambda line: None).fingerprint == first.fingerprint


def test_a_list_of_texts_is_a_corpus(tmp_path):
  texts = [f'{i} and {i * i} and so on' for i in range(60)]
  opened = dataset.Text([*texts, ' '], Bytes(), 16, rules=()).open(tmp_path, lambda line: None)
  stored = {split: [opened.tokenizer.decode(store[i]) for i in range(len(store))]
            for split, store in opened.stores.items()}
  assert sorted(stored['train'] + stored['validation']) == sorted(texts) and 0 < len(stored['validation']) < 20
  sources = [dataset.Text(documents, Bytes(), 16).source for documents in (texts, tuple(texts), texts[::-1])]
  assert sources[0].fingerprint == sources[1].fingerprint != sources[2].fingerprint
  for wrong in ('books/*.txt', iter(texts), 3):
    with pytest.raises(ValueError, match='is not a list of texts; give a list of texts, or a corpus'):
      dataset.Text(wrong, Bytes(), 16)
  with pytest.raises(ValueError, match='document 1 is of type bytes'):
    dataset.Text(['a', b'b'], Bytes(), 16).open(tmp_path / 'bytes', lambda line: None)


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_split_without_text_is_refused_before_a_tokenizer_is_trained(tmp_path, split):
  source, lines = dataclasses.replace(SOURCE, splits={**SOURCE.splits, split: ['  \n', '\x07']}), []
  with pytest.raises(ValueError, match=f'tiny: no document is left in {split} of 2 read'):
    dataset.Text(source, lambda texts: pytest.fail('trained'), 16).open(tmp_path, lines.append)
  assert not lines


def test_data_without_checkpoints_is_rebuilt_when_settings_change(tmp_path):
  def opened(**changes):
    source = Source('s', {'train': ['one two', 'three'], 'validation': ['four']}, **changes)
    lines = []
    return dataset.Text(source, Bytes(), 8).open(tmp_path, lines.append), lines
  first, _ = opened(fingerprint='a')
  second, _ = opened(fingerprint='b')
  assert first.fingerprint != second.fingerprint and opened(fingerprint='b')[0].fingerprint == second.fingerprint
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  with pytest.raises(ValueError, match='source s b there, s a here'):
    opened(fingerprint='a')
  assert opened(fingerprint='b')[0].text('train') == 'one twothree'


def test_a_tokenizer_without_checkpoints_is_trained_anew(tmp_path):
  source = Source('s', {'train': ['one two'], 'validation': ['four']}, 'a')
  open_with = lambda tokens, lines: dataset.Text(source, tokens, 8).open(tmp_path, lines.append)
  open_with(Bytes(), [])
  lines, other = [], Bytes(control=('<|mask|>',))
  assert open_with(other, lines).tokenizer.control_names == other.control_names
  assert 'was made with other settings, and nothing was trained on it: it is made anew' in lines[0]


@dataclasses.dataclass(frozen=True)
class Events:
  """Appends words to a file. A list in a closure would become part of the description of its function, and change it.
  """
  path: pathlib.Path

  def add(self, event: str) -> None:
    with self.path.open('a') as file:
      file.write(f'{event}\n')

  def read(self) -> list[str]:
    return self.path.read_text().split()


def test_processes_that_begin_at_once_train_one_tokenizer(tmp_path):
  """The processes are threads here, each of which takes the lock as another process would."""
  lines, both = [], threading.Barrier(2)
  events = Events(tmp_path / 'events')

  def train(documents):
    events.add('trained')
    return Bytes(('<|a|>',))

  def go():
    both.wait(timeout=60)
    opened.append(dataset.Text(SOURCE, train, 16).open(tmp_path, lines.append).tokenizer)

  opened = []
  threads = [threading.Thread(target=go) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert events.read() == ['trained'] and lines.count('training the tokenizer') == 1 and opened[0] == opened[1]


@pytest.mark.parametrize('process, fails', [(0, False), (1, False), (0, True), (1, True)])
def test_in_a_cluster_process_0_trains_the_tokenizer_while_the_others_wait(tmp_path, monkeypatch, process, fails):
  events = Events(tmp_path / 'events')

  def train(documents):
    events.add('trained')
    if fails:
      raise ValueError('too little text')
    return Bytes()

  monkeypatch.setattr(jax, 'process_index', lambda: process)
  monkeypatch.setattr(hosts, 'wait_for_all', lambda: events.add('met'))
  text = dataset.Text(SOURCE, train, 16)
  if fails:
    with pytest.raises(ValueError, match='too little'):
      text.open(tmp_path, lambda line: None)
  else:
    text.open(tmp_path, lambda line: None)
  # Process 1 trains too, since its own disk has no tokenizer.
  assert events.read() == (['trained', 'met'] if process == 0 else ['met', 'trained'])


def test_a_damaged_tokenizer_is_refused(tmp_path):
  trainer = lambda documents: tokenizers.train_sentencepiece(documents, 330)
  text = dataset.Text(SOURCE, trainer, 16)
  text.open(tmp_path, lambda line: None)
  path = tmp_path / 'data' / 'tokenizer' / 'tokenizer.model'
  data = path.read_bytes()
  place = data.index(b'document') if b'document' in data else data.index(b'ha')
  path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1:])
  for use in (lambda: text.open(tmp_path, lambda line: None), lambda: text.load_tokenizer(tmp_path)):
    with pytest.raises(ValueError, match='tokenizer.model is not as it was written: restore'):
      use()
  path.write_bytes(data)
  text.open(tmp_path, lambda line: None)


def test_the_bytes_of_texts_and_of_dialogues_are_verified(tmp_path):
  talk = Source('talk', {'train': ['{"prompt": "a", "completion": "b"}'] * 9}, 'fingerprint')
  for data in (dataset.Text(SOURCE, Bytes(), 16), dialogues.Dialogues(talk, Bytes(), 16)):
    workdir = tmp_path / type(data).__name__
    data.open(workdir, lambda line: None)
    assert data.verify(workdir) == []
    path = workdir / 'data' / 'tokens' / 'train' / 'tokens.bin'
    written = path.read_bytes()
    path.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.raises(ValueError, match=f'{path} is not as it was written'):
      data.verify(workdir)
