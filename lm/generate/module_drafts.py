"""Drafts by the model's own modules for multi-token prediction (DeepSeek-AI 2024); `speculative` verifies them.

Shapes: as in `speculative`.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding
from lm.generate.completion import round_up_slots
from lm.generate.drafted_steps import DraftCounter, check_cache
from lm.generate.engine import map_shards
from lm.generate.sampling import row_keys
from lm.generate.speculative import DRAFT, DraftingEngine, DraftState, probabilities, take
from lm.models.attention import Visible, write
from lm.models.context import Context
from lm.models.prediction_heads import MultiToken


@dataclasses.dataclass(frozen=True)
class ModuleDrafter:
  """The modules of the first `drafts` depths draft. See `speculative.DraftingModules`."""
  drafts: int

  @property
  def hidden(self) -> int:
    return 2 * self.drafts

  def check(self, model: MultiToken, width: int) -> None:
    check_cache(model)
    most = min(model.depths, width // 2)
    if most < self.drafts:
      raise ValueError(f'drafts={self.drafts}: this model can draft 1 to {most} tokens')

  def init_caches(self, model: MultiToken, rows: int, slots: int) -> tuple[Any, ...]:
    return model.init_depth_caches(rows, slots)[:self.drafts]

  def draft(self, model: MultiToken, params: Any, head: Any, state: DraftState, vocab: int) -> DraftState:
    """Draws each token by the module of its depth.

    The modules read the slots of `state.hidden`: those since the last round, and earlier ones, because in the last
    round the tokens ahead of them were drafts.
    """
    def draw_draft(purpose, logits, settings, place):
      q = probabilities(logits, settings, vocab)[:, 0]
      return q, jax.vmap(jax.random.categorical)(row_keys(settings, place, purpose), jnp.log(q))

    index, first, n = state.cache.index, state.first_B, state.hidden.shape[1]
    slots = (index - n)[:, None] + jnp.arange(n)[None]
    positions = slots - first[:, None]
    key_positions = jnp.arange(state.tokens_BS.shape[1])[None] - first[:, None]
    segments, key_segments = ((x >= 0).astype(jnp.int32) for x in (positions, key_positions))
    visible = Visible(segments, key_segments, None, positions, key_positions, index - n)
    tokens, previous, drafted, caches = state.tokens_BS, state.hidden, [], []
    for k in range(1, self.drafts + 1):
      previous, hidden, cache, _ = model.depth(params, k, state.hidden, previous, take(tokens, slots + k),
                                               Context(positions, visible), state.depths[k - 1])
      draw = functools.partial(draw_draft, DRAFT + k)
      q, token = map_shards(draw, sharding.whole_logits(head, hidden[:, -1:]), state.settings, index - first)
      tokens = write(tokens, token[:, None], index + k)
      caches.append(cache)
      drafted.append(q)
    return state._replace(tokens_BS=tokens, depths=tuple(caches), drafted_BDV=jnp.stack(drafted, axis=1))


class SelfSpeculation(DraftCounter):
  """Drafts by a model that predicts further tokens.

  Args:
    drafts: the number of tokens that are drafted at a time; None is the number of the model's depths.
  """

  def __init__(self, drafts: int | None = None):
    super().__init__()
    self.drafts = drafts

  def engine(self, model: MultiToken, params: Any, slots: int, vocab: int, ends: Sequence[int]) -> DraftingEngine:
    """See `generate.Draft`. Raises ValueError if the model cannot draft as many tokens."""
    depths = model.depths
    if not depths:
      raise ValueError('this model predicts no further tokens, so there is nothing to draft with; use one that was '
                       'trained with --predict_ahead, or draft by --lookup')
    drafts = depths if self.drafts is None else self.drafts
    if not 1 <= drafts <= depths:
      raise ValueError(f'drafts={drafts}: this model can draft 1 to {depths} tokens')
    slots = round_up_slots(slots + 1 + 2 * drafts)
    return DraftingEngine(model, params, slots, vocab, ends, ModuleDrafter(drafts), self)
