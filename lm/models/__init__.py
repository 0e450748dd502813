"""Models from tokens to logits: decoders, encoders, encoder-decoders, and the modules that compose them."""
from lm.models.context import Aux, Context
from lm.models.encoder import Encoder, TextScorer, bert, scorer
from lm.models.encoder_decoder import EncoderDecoder, t5
from lm.models.prediction_heads import MultiToken
from lm.models.reward import Reward
from lm.models.transformer import LanguageModel, Output, Transformer, gpt2, llama

__all__ = ['Aux', 'Context', 'Encoder', 'TextScorer', 'bert', 'scorer', 'EncoderDecoder', 't5', 'MultiToken', 'Reward',
           'LanguageModel', 'Output', 'Transformer', 'gpt2', 'llama']
