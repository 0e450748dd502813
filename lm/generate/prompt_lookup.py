"""Speculative decoding without a model of drafts: where the last tokens stood before in the text, what followed them.

  draft = prompt_lookup.PromptLookup(4)
  generate.generate(model, params, tokenizer, prompts, draft=draft)

That is worth most where a text repeats its prompt: in summaries, edits and code (Saxena 2023, prompt lookup decoding).
A draft has the probability 1, so that the rule of `speculative.verify` accepts it with its probability by the model,
and otherwise draws one of the other tokens. Shapes: as in `speculative`, and S the slots of a row.
"""
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm.generate.engine import map_shards
from lm.generate.speculative import DraftingEngine, DraftState, Speculation
from lm.models.attention import LayerCache, write
from lm.models.latent import LatentCache
from lm.models.transformer import Cache

LONGEST = 3   # the most tokens that are compared


def look_up(tokens_BS: jax.Array, index_B: jax.Array, first_B: jax.Array, drafts: int) -> jax.Array:
  """Returns the tokens that followed the last ones where these stood before, [B, D].

  The text of row b is in the slots `first_B[b]` to `index_B[b]`. Of the earlier places, that with the most equal tokens
  is taken, up to LONGEST, and of several the last; the tokens after it are repeated where the text ends. Without such a
  place, the last token is repeated.
  """
  slots = jnp.arange(tokens_BS.shape[1])[None]
  equal, length = jnp.ones(tokens_BS.shape, bool), jnp.zeros(tokens_BS.shape, jnp.int32)
  for n in range(LONGEST):
    earlier = jnp.pad(tokens_BS, ((0, 0), (n, 0)))[:, :tokens_BS.shape[1]]   # the token n slots before each
    last = jnp.take_along_axis(tokens_BS, jnp.maximum(index_B - n, 0)[:, None], axis=1)
    equal &= (earlier == last) & (slots - n >= first_B[:, None])
    length += equal
  length = jnp.where(slots < index_B[:, None], length, -1)
  best = jnp.argmax(length * tokens_BS.shape[1] + slots, axis=1)   # the last of those with the most equal tokens
  period = jnp.maximum(index_B - best, 1)
  places = best[:, None] + 1 + jnp.arange(drafts)[None] % period[:, None]
  return jnp.take_along_axis(tokens_BS, places, axis=1)


@dataclasses.dataclass(frozen=True)
class LookupDrafter:
  """Drafts by `look_up`. See `speculative.Drafter`."""
  drafts: int
  hidden = 0

  def check(self, model: Any, width: int) -> None:
    cache = jax.eval_shape(lambda: model.init_cache(1, 1))
    if isinstance(cache, Cache) and all(isinstance(layer, (LayerCache, LatentCache)) for layer in cache.layers):
      return
    raise ValueError(f'lookup={self.drafts} is for decoders whose caches have keys and values for each token, so that '
                     'rejected tokens can be forgotten; leave it out')

  def init_caches(self, model: Any, rows: int, slots: int) -> tuple[Any, ...]:
    return ()

  def draft(self, model: Any, params: Any, head: Any, state: DraftState, vocab: int) -> DraftState:
    def local(tokens, index, first):
      drafts = look_up(tokens, index, first, self.drafts)
      return drafts, jax.nn.one_hot(drafts, model.vocab)

    drafts, probabilities = map_shards(local, state.tokens_BS, state.cache.index, state.first_B)
    tokens = write(state.tokens_BS, drafts, state.cache.index + 1)
    return state._replace(tokens_BS=tokens, drafted_BDV=probabilities)


class PromptLookup(Speculation):
  """Drafts by lookup in the text, for any decoder.

  Args:
    drafts: the number of tokens that are drafted at a time.
  """

  def __init__(self, drafts: int):
    if drafts < 1:
      raise ValueError(f'drafts={drafts} must be at least 1')
    super().__init__(drafts)

  def engine(self, model: Any, params: Any, slots: int, vocab: int, ends: Sequence[int]) -> DraftingEngine:
    """See `generate.Draft`."""
    return self.engine_of(LookupDrafter(self.drafts), model, params, slots, vocab, ends)
