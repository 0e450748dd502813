"""The language of texts by their script, and their words."""
import re
from collections.abc import Iterable, Sequence

_KANA, _HANGUL = '\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f', '\u1100-\u11ff\u3130-\u318f\uac00-\ud7af'
_HAN = '\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff'
# Scripts without spaces between words: these two, and those of Thai, Lao, Burmese and Khmer.
_WITHOUT_SPACES = f'{_KANA}{_HAN}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff'
# Marks above and below letters, and the scripts of India, whose vowels are marks, are parts of words beside letters.
_MARKS = '\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff'
_WORD = re.compile(f'[{_WITHOUT_SPACES}]|(?:[^\\W{_WITHOUT_SPACES}]|[{_MARKS}])+|[^\\w\\s]')
_LETTER = re.compile(r'[^\W\d_]')
_BY_LANGUAGE = {'ja': _KANA, 'ko': _HANGUL, 'zh': _HAN}
_SAMPLE = 1_000_000   # characters that are enough to know the language


def split(text: str) -> list[str]:
  """Returns words and punctuation marks; each character of a script without spaces is a word."""
  return _WORD.findall(text)


def language(texts: Iterable[str]) -> str:
  """Returns the language of texts as far as its script tells: zh, ja, ko, en for ASCII letters, or other.

  Chinese, Japanese and Korean are those with a tenth of their letters in that script, since quotations in other
  languages and formulas are common in them; for Japanese it is a twentieth in kana, beside Chinese characters. Texts
  count as ASCII with up to a hundredth of other letters, which names and loanwords bring.
  """
  sample, size = [], 0
  for text in texts:
    sample.append(text)
    size += len(text)
    if size > _SAMPLE:
      break
  sample = ''.join(sample)
  letters = len(_LETTER.findall(sample)) or 1
  shares = {name: len(re.findall(f'[{script}]', sample)) / letters for name, script in _BY_LANGUAGE.items()}
  if shares['ja'] >= 0.05:
    return 'ja'
  for name in ('ko', 'zh'):
    if shares[name] >= 0.1:
      return name
  ascii_share = len(re.findall('[a-zA-Z]', sample)) / letters
  return 'en' if ascii_share >= 0.99 or letters == 1 else 'other'


def of_references(references: Sequence[Sequence[str]]) -> str:
  """Returns the language of the references of all texts; see `language`."""
  return language(reference for several in references for reference in several)
