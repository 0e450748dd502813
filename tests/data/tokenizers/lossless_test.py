"""SentencePiece models are called lossless exactly if decoding gives any text back."""
import io

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lm.data import tokenizers


def check_round_trip(t, text):
  ids = t.encode(text)
  assert t.decode(ids) == text and t.byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
@hypothesis.given(missing=st.sets(st.sampled_from(' \t\n▁aä<0x4'), max_size=3),
                  text=st.text(st.sampled_from(' \t\n▁aäb<0x4>好'), max_size=12))
@hypothesis.example({' ', '▁'}, 'a b')   # SentencePiece's mark for a space, next to a space
@hypothesis.example({' ', '\t'}, ' \t')
@hypothesis.settings(max_examples=12, deadline=None)
def test_what_the_training_text_lacks_comes_back(kind, missing, text):
  alphabet, rng = sorted({*' \t\n▁aä<0x4bc'} - missing), np.random.default_rng(0)
  documents = [''.join(rng.choice(alphabet, 60)) for _ in range(40)]
  t = tokenizers.train_sentencepiece(documents, 290, kind, control=('<|mask|>',))
  assert t.lossless
  assert not any(map(t._processor.is_byte, t.encode(' \t').tolist()))   # these are always pieces
  for each in (text, 'a b', ' \t', '▁ ▁', '好'):
    check_round_trip(t, each)


def sentencepiece_model(texts, **options):
  import sentencepiece
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(**{
      'sentence_iterator': iter(texts), 'model_writer': model, 'vocab_size': 300, 'model_type': 'bpe',
      'byte_fallback': True, 'minloglevel': 2, 'hard_vocab_limit': False, 'normalization_rule_name': 'identity',
      'add_dummy_prefix': False, 'remove_extra_whitespaces': False, **options})
  return model.getvalue()


@pytest.mark.parametrize('texts, options, lossless', [
    (['abc abd'] * 9, {}, True), (['abcabd'] * 9, {}, False), (['abc abd'] * 9, {'add_dummy_prefix': True}, False),
    (['abc abd'] * 9, {'byte_fallback': False, 'vocab_size': 10}, False),
    (['abc abd'] * 9, {'normalization_rule_name': 'nfkc'}, False),
    (['abc abd'] * 9, {'normalization_rule_tsv': True}, False)])
def test_a_model_is_lossless_if_it_gives_the_text_back(texts, options, lossless, tmp_path):
  if options.pop('normalization_rule_tsv', False):   # a table that changes one letter alone
    (tmp_path / 'rules.tsv').write_text(f'{ord("q"):X}\t{ord("a"):X}\n')
    options = {'normalization_rule_tsv': str(tmp_path / 'rules.tsv'), 'normalization_rule_name': 'user_defined'}
  t = tokenizers.SentencePiece(sentencepiece_model(texts, **options), '<s>', '</s>')
  assert t.lossless == lossless
  if lossless:
    check = [t.decode(t.encode(text)) == text for text in ('a b', ' q', '\t▁é')]
    assert all(check)
