"""Text to ids and back."""
from lm.data.tokenizers.base import CONTROL, Bytes, Tokenizer, sentinels
from lm.data.tokenizers.folder import InFile, load, mask_id, special_tokens, train_sentencepiece
from lm.data.tokenizers.huggingface import HuggingFace
from lm.data.tokenizers.sentencepiece import SentencePiece

__all__ = ['CONTROL', 'Bytes', 'Tokenizer', 'sentinels', 'load', 'mask_id', 'special_tokens',
           'train_sentencepiece', 'HuggingFace', 'InFile', 'SentencePiece']
