"""Small tokenizers of the libraries `tokenizers` and `sentencepiece`."""
import io

import pytest

tokenizers = pytest.importorskip('tokenizers')

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_level(control, processor=None):
  """Returns a tokenizer of bytes and the tokens `control`, whose template `processor` adds tokens around a text."""
  t = tokenizers.Tokenizer(tokenizers.models.BPE())
  t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.decoder = tokenizers.decoders.ByteLevel()
  t.train_from_iterator([], tokenizers.trainers.BpeTrainer(
      special_tokens=control, show_progress=False,
      initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
  if processor:
    ids = [(name, t.token_to_id(name)) for name in control if name in processor.split()]
    t.post_processor = tokenizers.processors.TemplateProcessing(single=processor, special_tokens=ids)
  return t


def piece_model(**options):
  """Returns the bytes of a SentencePiece model with byte fallback, trained on a few words."""
  import sentencepiece
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['anna bert carl dora'] * 9), model_writer=model, vocab_size=300, model_type='bpe',
      byte_fallback=True, minloglevel=2, hard_vocab_limit=False, **options)
  return model.getvalue()
