"""Hugging Face checkpoints in and out."""
from lm.hf.pretrained import Pretrained, load, locate, open_model, open_tokenizer, save, write

__all__ = ['Pretrained', 'load', 'locate', 'open_model', 'open_tokenizer', 'save', 'write']
