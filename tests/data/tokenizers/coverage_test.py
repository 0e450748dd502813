"""Texts with more characters than a small vocabulary has room for, such as Chinese ones, need a character coverage."""
import re

import pretrain
import pytest

from lm import launch, signature
from lm.data import tokenizers

COMMON, RARE = [chr(0x4e00 + i) for i in range(60)], [chr(0x6000 + i) for i in range(600)]
# 600 documents of 66 characters, the last of which is in no other one: 1.5 % of the text.
DOCUMENTS = [''.join(COMMON[i * j % 60] for j in range(65)) + rare for i, rare in enumerate(RARE)]


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_many_characters_train_with_the_coverage_that_the_refusal_names(kind):
  with pytest.raises(ValueError, match='--vocab=640 is too small') as error:
    tokenizers.train_sentencepiece(DOCUMENTS, 640, kind)
  coverage = float(re.search(r'--character_coverage=([\d.]+)', str(error.value))[1])
  t = tokenizers.train_sentencepiece(DOCUMENTS, 640, kind, character_coverage=coverage)
  assert t.vocab_size == 640 and all(t.decode(t.encode(text)) == text for text in DOCUMENTS[:50])
  with pytest.raises(ValueError, match='raise it$'):   # no coverage that SentencePiece accepts is low enough
    tokenizers.train_sentencepiece(DOCUMENTS, 290, kind)


@pytest.mark.parametrize('coverage', [0.97, 1.1, 0., float('nan')])
def test_a_coverage_out_of_bounds_is_refused(coverage):
  with pytest.raises(ValueError, match='character_coverage=.* is not a share between 0.98 and 1'):
    tokenizers.train_sentencepiece(DOCUMENTS, 640, character_coverage=coverage)


def test_pretrain_has_the_flag(tmp_path):
  (tmp_path / 'a.txt').write_text('\n\n'.join(DOCUMENTS), 'utf-8')

  def opened(*argv):
    (knobs,), _ = launch.parse([pretrain.experiment], [
        'pretrain.py', f'--text={tmp_path}/a.txt', r'--separator=\n\n', '--vocab=640', *argv])
    return signature.call(pretrain.experiment, knobs).data.open(tmp_path / 'run', progress=lambda line: None)
  with pytest.raises(ValueError, match='--vocab=640 is too small'):
    opened()
  assert opened('--character_coverage=0.985').tokenizer.vocab_size == 640
  with pytest.raises(ValueError, match='--character_coverage=0.99 is for a tokenizer that is trained'):
    opened('--character_coverage=0.99', '--tokenizer_kind=bytes')
