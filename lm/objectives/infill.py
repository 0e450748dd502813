"""Fill-in-the-middle: prefix, suffix and middle in an order that lets a causal model write the middle."""
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lm.data.batch import Batch, Example, Form, Room, Special
from lm.data.tokenizers.base import Tokenizer
from lm.objectives.objective import Objective, TokenLoss, cross_entropy, token_mean, token_objective

NAMES = ('<|prefix|>', '<|suffix|>', '<|middle|>')
SLACK = 8   # tokens that two cuts inside tokens may add to a piece; they rarely add more

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]   # prefix, middle, suffix


def context_level(piece: np.ndarray, special: Special) -> bool:
  """Permits every piece of a document to be permuted."""
  return True


def document_level(piece: np.ndarray, special: Special) -> bool:
  """Permits only documents that are whole in their row to be permuted."""
  return bool(piece[0] == special.bos and piece[-1] == special.eos)


def at_tokens(body: np.ndarray, rng: np.random.Generator, special: Special) -> Parts:
  """Cuts between tokens at two random places."""
  i, j = np.sort(rng.integers(len(body) + 1, size=2))
  return body[:i], body[i:j], body[j:]


def at_characters(body: np.ndarray, rng: np.random.Generator, special: Special) -> Parts:
  """Cuts between characters at two random places, and tokenises each part by itself, as prompts are.

  It cuts between tokens instead where the parts do not spell the text (a tokenizer that is not lossless, a piece that
  begins inside a character), or have more than `SLACK` additional tokens.
  """
  if special.tokenizer is None:
    return at_tokens(body, rng, special)
  text = special.tokenizer.decode(body)
  i, j = np.sort(rng.integers(len(text) + 1, size=2)).tolist()
  parts = tuple(map(special.tokenizer.encode, (text[:i], text[i:j], text[j:])))
  fits = sum(map(len, parts)) <= len(body) + SLACK and '\ufffd' not in text
  return parts if fits and special.tokenizer.decode(np.concatenate(parts)) == text else at_tokens(body, rng, special)


def arrange(parts: Parts, ids: Sequence[int], spm: bool) -> np.ndarray:
  """Returns PRE prefix SUF suffix MID middle (PSM) or, the paper's second variant, PRE SUF suffix MID prefix middle.

  `ids` are those of PRE, SUF and MID; `spm` selects the second variant.
  """
  (prefix, middle, suffix), (pre, suf, mid) = parts, np.array(ids[:3], np.int32).reshape(3, 1)
  order = (pre, suf, suffix, mid, prefix, middle) if spm else (pre, prefix, suf, suffix, mid, middle)
  return np.concatenate(order).astype(np.int32)


def restore(tokens: np.ndarray, ids: Sequence[int]) -> np.ndarray:
  """Returns the tokens of an arrangement in the order of the text: the inverse of `arrange`."""
  pre, suf, mid = (int(np.flatnonzero(tokens == i)[0]) for i in ids[:3])
  return np.concatenate([tokens[pre + 1:suf], tokens[mid + 1:], tokens[suf + 1:mid]])


def prompt(tokenizer: Tokenizer, prefix: str, suffix: str, names: Sequence[str] = NAMES, spm: bool = False
           ) -> np.ndarray:
  """Returns the tokens after which a model writes the middle, without bos, int32 [n]."""
  ids = [tokenizer.control_id(name) for name in names]
  return arrange((tokenizer.encode(prefix), np.zeros(0, np.int32), tokenizer.encode(suffix)), ids, spm)


def infill(rate: float = 0.5, spm: float = 0.5, split: Callable[..., Parts] = at_tokens,
           level: Callable[[np.ndarray, Special], bool] = context_level, names: Sequence[str] = NAMES,
           denominator: Callable[[Batch], jax.Array] = token_mean, token_loss: TokenLoss = cross_entropy) -> Objective:
  """Next-token prediction of pieces of which a share is permuted (Bavarian et al. 2022, arXiv:2207.14255).

  A permuted piece is bos, an arrangement (see `arrange`), and eos, which says that the middle has reached the suffix;
  the loss is on all of it. The other pieces are as in `next_token`.

  Args:
    rate: share of the pieces that are permuted; the paper finds no harm up to 0.9.
    spm: share of those that are SPM.
    split: `at_tokens`; or `at_characters`, so that prompts may end inside a word, which re-tokenises each piece.
    level: `context_level`, the better one in the paper; or `document_level`, where documents are shorter than rows.
    names: of control tokens, for PRE, SUF and MID; a fourth, if there is one, ends the middle in place of eos.
  """
  if not 0 <= rate <= 1 or not 0 <= spm <= 1:
    raise ValueError(f'rate={rate} and spm={spm} are shares, from 0 to 1')

  def example(piece: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
    # The last token is the target of the last position only, unless it is eos.
    body = special.bare(piece if piece[-1] == special.eos else piece[:-1])
    if len(body) and level(piece, special) and rng.random() < rate:
      row = arrange(split(body, rng, special), special.control, rng.random() < spm)
      end = special.control[3] if len(special.control) > 3 else special.eos
      piece = np.concatenate([np.int32([special.bos]), row, np.int32([end])])
    return Example(piece[:-1], piece[1:], np.ones(len(piece) - 1, np.float32))

  room = Room(extra=4 * (rate > 0) + SLACK * (split is not at_tokens and rate > 0))
  return token_objective(Form(example, room, ahead=True), control=tuple(names), denominator=denominator,
                         token_loss=token_loss)
