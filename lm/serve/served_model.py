"""A model as a server needs it: ids of prompts, and embeddings of texts."""
import codecs
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, sharding
from lm.data.batch import Batch
from lm.data.chat import conversation
from lm.data.tokenizers.folder import Tokenizer
from lm.evaluate import row_shapes
from lm.models.low_rank_weight import choose_adapters
from lm.serve.answers_format import Echo
from lm.serve.api_errors import bad_request
from lm.serve.chat_messages import NO_TOOLS, ToolUse
from lm.serve.token_texts import TokenTexts

DEFAULT_TOKENS = 16   # of a completion whose length the body does not say, as in OpenAI's
NO_TEMPLATE = ('this model has no chat template: use /v1/completions, put a chat_template.jinja into the folder of the '
               'model, or train a model to chat with experiments/finetune_chat.py')


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model with its tokenizer and chat template, which is None for a model that was not trained to chat.

  It is a decoder, or an encoder-decoder, which reads a prompt as its source and writes after bos. Its parameters are
  unstacked, like those of the engine. The same parameters with another `adapter` are another model, with a name and
  possibly a chat template of its own. `embed` computes, and is called in the engine's thread.
  """
  name: str
  model: Any
  params: Any
  tokenizer: Tokenizer
  context: int   # the longest text, a prompt and its answer together, in tokens; also the longest source
  template: conversation.Template | None = None
  adapter: int = 0   # the number of its adapter in the engine; 0 for none

  @functools.cached_property
  def texts(self) -> TokenTexts:
    return TokenTexts(self.tokenizer)

  @functools.cached_property
  def grammars(self) -> generate.Grammars:
    return generate.Grammars(self.tokenizer, self.model.vocab)

  @functools.cached_property
  def chat_ends(self) -> tuple[int, ...]:
    """The ids that end an answer of a chat, in addition to those of the tokenizer."""
    ends = () if self.template is None else self.template.ends(self.tokenizer)
    return tuple(i for i in ends if i not in self.tokenizer.eos_ids)

  def tokenizer_info(self) -> dict[str, Any]:
    """Returns what clients ask for that encode and write templates themselves, by the names of Hugging Face."""
    names = {self.tokenizer.control_id(name): name for name in self.tokenizer.control_names}
    template = None if self.template is None else self.template.jinja(self.tokenizer)
    return {'bos_token': names[self.tokenizer.bos_id], 'eos_token': names[self.tokenizer.eos_id], 'pad_token': None,
            'add_bos_token': self.tokenizer.adds_bos, 'chat_template': template}

  def encode(self, prompt: str | Sequence[int], adds_special_tokens: bool = True, param: str = 'prompt') -> np.ndarray:
    """Returns the ids of a prompt, one at least.

    Names of control tokens in a text are these tokens, as clients that write templates themselves expect it; bos comes
    first if the tokenizer adds it, and eos ends a source. Raises ApiError for ids that the tokenizer does not have.
    """
    reads_source, eos = self.model.reads_source, self.tokenizer.eos_id
    if not isinstance(prompt, str):
      self.check_ids(prompt, param)
      ids = np.int32(prompt)
    else:
      ids = np.asarray(self.tokenizer.parse(prompt)[0], np.int32)
      if adds_special_tokens and reads_source:
        ids = np.int32([*ids, eos])
      elif adds_special_tokens:
        ids = generate.with_bos(ids, self.tokenizer, None)
    return ids if len(ids) else np.int32([eos if reads_source else self.tokenizer.bos_id])

  def last_ids(self, texts: Sequence[str]) -> tuple[int, ...]:
    """Returns the last id of each text where it stands after another one."""
    return tuple(int(ids[-1]) for ids in self.tokenizer.encode_batch([f'a{text}' for text in texts]))

  def text_and_source(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns what the model continues after a prompt, and what its encoder reads; None for a decoder."""
    return generate.text_and_source(self.model, self.tokenizer.bos_id, ids)

  def check_is_decoder(self, feature: str, param: str) -> None:
    """Raises ApiError, status 400, if the model is an encoder-decoder, which does not support a feature."""
    if self.model.reads_source:
      raise bad_request(f'{feature} not supported: this model is an encoder-decoder, which reads a prompt as its '
                        'source and does not score it', param)

  def check_ids(self, ids: Sequence[int], param: str) -> None:
    """Raises ApiError for ids that the tokenizer does not have."""
    if ids and max(ids) >= self.tokenizer.vocab_size:
      raise bad_request(f'{param} has the token id {max(ids)}, and the tokenizer has {self.tokenizer.vocab_size} '
                        'tokens', param)

  def encode_chat(self, messages: Sequence[Mapping[str, Any]], tool_use: ToolUse = NO_TOOLS,
                  adds_generation_prompt: bool = True) -> np.ndarray:
    """Returns the ids of messages, up to where an answer begins; ApiError where the template does not take them."""
    if self.template is None:
      raise bad_request(NO_TEMPLATE, 'messages', 'no_chat_template')
    tools = {}
    if tool_use.tools:
      if not self.template.writes_tools:
        raise bad_request('the chat template of this model does not write tools; leave them out', 'tools')
      tools = {'tools': tool_use.tools}
    try:
      return self.template.encode(self.tokenizer, messages, adds_generation_prompt, **tools)[0]
    except ValueError as error:
      raise bad_request(f'the chat template does not take these messages: {error}', 'messages') from None

  def room(self, ids: Sequence[int], max_tokens: int | None, param: str) -> int:
    """Returns the largest number of tokens after a prompt; for None, all that there is room for.

    Raises ApiError where there is less room than needed.
    """
    if self.model.reads_source:
      self.check_length(ids, param)
    free = self.context - len(self.text_and_source(ids)[0])
    needed = 1 if max_tokens is None else max_tokens
    if needed > free:
      answer = 'a token of an answer' if max_tokens is None else f'max_tokens={max_tokens}'
      raise bad_request(f'the prompt has {self.context - free} tokens, and with {answer} these are more than the '
                        f'{self.context} that the model reads at once; shorten it', param, 'context_length_exceeded')
    return free if max_tokens is None else max_tokens

  def check_length(self, ids: Sequence[int], param: str) -> None:
    """Raises ApiError where a text is longer than the context."""
    if len(ids) > self.context:
      raise bad_request(f'{param} has a text of {len(ids)} tokens, and the model reads {self.context} at '
                        'once; shorten it', param, 'context_length_exceeded')

  def echo(self, prompt: str | Sequence[int], ids: np.ndarray) -> Echo:
    """Returns a prompt as an answer repeats it."""
    text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
    return Echo(text, ids.tolist(), self._starts(prompt, text, ids))

  def _starts(self, prompt: str | Sequence[int], text: str, ids: np.ndarray) -> list[int]:
    """Returns the character of the text of a prompt where each of its tokens begins."""
    if isinstance(prompt, str):
      _, spans = self.tokenizer.parse(prompt)
      return [0] * (len(ids) - len(spans)) + np.asarray(spans)[:, 0].tolist()   # bos may come first
    pieces = [self.texts.bytes_of(int(i)) for i in ids]
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    place = min(len(text.encode()) - sum(map(len, pieces)), 0)   # some tokenizers put a space before a text
    starts = []
    for piece in pieces:
      starts.append(min(max(place, 0), len(text)))
      place += len(decoder.decode(piece))
    return starts

  def _row(self, ids: np.ndarray) -> Batch:
    """Returns a batch with a text in its first row; its shape follows from the length alone."""
    width = row_shapes.width(len(ids), self.model.max_length)
    tokens, segments = np.zeros((2, row_shapes.rows((width,)), width), np.int32)
    tokens[0, :len(ids)], segments[0, :len(ids)] = ids, 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    return Batch(tokens, positions=positions, segments=segments)

  def embed(self, ids: np.ndarray) -> np.ndarray:
    """Returns, for a decoder, the mean of the last hidden states of a text, scaled to length 1, float32 [D]."""
    return np.asarray(_embedding(self.model, self.params, self._row(ids), np.int32(self.adapter)))[0]


@functools.partial(jax.jit, static_argnames='model')
@sharding.whole_rows()
def _embedding(model: Any, params: Any, batch: Batch, adapter: jax.Array) -> jax.Array:
  """Returns the normalised mean of the hidden states of each row, [B, D]."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  cache = model.init_cache(*batch.tokens.shape)   # the parameters are unstacked, as programs with a cache read them
  params = choose_adapters(params, sharding.constrain(jnp.broadcast_to(adapter, len(batch.tokens)), 'B'))
  hidden = sharding.constrain(model.apply(params, batch, cache=cache).hidden.astype(jnp.float32), '---')
  is_text = sharding.constrain(batch.segments > 0, '--')[..., None]
  total = jnp.where(is_text, hidden, 0).sum(1)
  return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)
