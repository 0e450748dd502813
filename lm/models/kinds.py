"""The kinds of models, in words."""
from typing import Any

from lm.models.encoder import Encoder, TextScorer
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.prediction_heads import MultiToken
from lm.models.reward import Reward
from lm.models.transformer import Transformer

CLASSES = Reward, EncoderDecoder, Encoder, TextScorer, Transformer, MultiToken


def in_words(model: Any) -> str:
  """Says what kind of model a model is."""
  words = dict(zip(CLASSES, ('a reward model', 'an encoder-decoder', 'an encoder', 'a scorer of pairs of texts',
                           'a decoder', 'a decoder')))
  return next((name for cls, name in words.items() if isinstance(model, cls)), f'of class {type(model).__name__}')
