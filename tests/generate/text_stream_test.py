"""The pieces of a stream join to the text that the tokenizer gives for all tokens at once."""
import numpy as np
import pytest
from helpers import decoders, tokenizers
from tokenizers import AddedToken, Tokenizer, models
from tokenizers import decoders as library

from lm.data.tokenizers.huggingface import HuggingFace
from lm.data.tokenizers.sentencepiece import SentencePiece

WORD_PIECES = ['<s>', '</s>', 'a', '##a', 'b', '##bc', '.', "'", 's', '##s']
NAMES = ['<s>', '</s>', '▁', '▁▁', '▁▁▁', '▁a', 'a', 'ab', '▁.', '\n']


def piece_model(**options):
  symbols = [name for name in NAMES[3:] if name != '▁']
  model = tokenizers.piece_model(user_defined_symbols=symbols, **options)
  return SentencePiece(model, '<s>', '</s>')


def hugging_face(decoder, names=NAMES):
  """Returns a tokenizer of `names`, and of all bytes by the names that byte fallback gives them."""
  every = dict.fromkeys([*names, *(f'<0x{byte:02X}>' for byte in range(256))])
  tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(every)}, [], byte_fallback=True))
  tokenizer.add_special_tokens([AddedToken('<s>', special=True), AddedToken('</s>', special=True)])
  tokenizer.decoder = decoder
  return HuggingFace(tokenizer.to_str(), '<s>', '</s>')


SPACES = library.Replace('▁', ' ')
TOKENIZERS = {
    'pieces that strip all spaces': lambda: piece_model(),
    'pieces that strip one space': lambda: piece_model(remove_extra_whitespaces=False),
    'pieces that strip nothing': lambda: piece_model(
        normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False),
    'as Llama 2': lambda: hugging_face(library.Sequence([
        SPACES, library.ByteFallback(), library.Fuse(), library.Strip(' ', 1, 0)])),
    'as Gemma': lambda: hugging_face(library.Sequence([SPACES, library.ByteFallback(), library.Fuse()])),
    'as T5': lambda: hugging_face(library.Metaspace(prepend_scheme='always')),
    'as BERT': lambda: hugging_face(library.WordPiece(), WORD_PIECES),
    'as GPT-2': lambda: HuggingFace(tokenizers.byte_level(['<s>', '</s>']).to_str(), '<s>', '</s>')}
# Of the others, byte fallback spells all bytes beside one that is not UTF-8 as U+FFFD, also those that came before.
ANY_BYTES = 'pieces that strip all spaces', 'pieces that strip one space', 'pieces that strip nothing', 'as GPT-2'


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_pieces_of_random_tokens_join_to_the_whole_text(kind):
  tokenizer, rng = TOKENIZERS[kind](), np.random.default_rng(0)
  data = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
  tokens = [[i] for i in range(tokenizer.vocab_size) if i not in tokenizer.eos_ids and (i < 10 or data[i] == b' ')]
  of_byte = {piece[0]: i for i, piece in enumerate(data) if len(piece) == 1}
  tokens += [[of_byte[byte] for byte in text.encode()] for text in ('é', '日', '🙂', '\ufffd')]
  if kind in ANY_BYTES:
    tokens += [[of_byte[byte]] for byte in (0xE2, 0x82, 0xFF)]
  for _ in range(300):
    parts = [tokens[i] for i in rng.integers(len(tokens), size=rng.integers(1, 12))]
    prompt = sum(parts[:rng.integers(4)], [])
    before = tokenizer.decode(prompt)
    if before.endswith('\ufffd'):
      prompt, before = [], ''
    ids = sum(parts, [])[len(prompt):] + [of_byte[ord('a')]]   # the last one, so that no character is incomplete
    whole = tokenizer.decode(prompt + ids)
    pieces = decoders.text_of(ids, tokenizer, prompt)
    assert whole.startswith(before) and ''.join(pieces) == whole[len(before):], [data[i] for i in prompt + ids]
