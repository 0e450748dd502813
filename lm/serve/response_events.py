"""Answers of /v1/responses: one message of text, as a stream of events or whole."""
import time
import uuid
from collections.abc import Sequence
from typing import Any

from lm.generate.choice_text import Piece
from lm.serve.answers_format import Chunk, Usage, as_json
from lm.serve.request_bodies import ResponseBody

# Fields of OpenAI's answers that have one value here.
_CONSTANT = {'object': 'response', 'error': None, 'metadata': {}, 'parallel_tool_calls': True, 'tools': [],
             'tool_choice': 'auto', 'previous_response_id': None, 'reasoning': {'effort': None, 'summary': None}}


class ResponseWriter:
  """Writes the events of one response. The last event holds the whole of it."""
  last_frame = b''

  def __init__(self, body: ResponseBody, model: str):
    self._head = {'id': f'resp_{uuid.uuid4().hex}', 'created_at': int(time.time()), 'model': model, **_CONSTANT,
                  **body.repeated}
    self._item, self._text, self._finish, self._number = f'msg_{uuid.uuid4().hex}', '', None, 0

  def begin(self) -> list[Chunk]:
    """Returns the events before the first text."""
    started = self._response('in_progress', [])
    return [self._event('created', response=started), self._event('in_progress', response=started),
            self._event('output_item.added', output_index=0, item=self._message('in_progress', [])),
            self._of_part('content_part.added', part=self._part(''))]

  def add(self, piece: Piece) -> list[Chunk]:
    """Returns the events of a piece."""
    self._text += piece.text
    self._finish = piece.finish
    return [self._of_part('output_text.delta', delta=piece.text, logprobs=[])] if piece.text else []

  def end(self, usage: Usage) -> list[Chunk]:
    """Returns the events after the last text, the last of which holds the whole response."""
    status = 'incomplete' if self._finish == 'length' else 'completed'
    message = self._message(status, [self._part(self._text)])
    return [self._of_part('output_text.done', text=self._text, logprobs=[]),
            self._of_part('content_part.done', part=self._part(self._text)),
            self._event('output_item.done', output_index=0, item=message),
            self._event(status, response=self._response(status, [message], usage))]

  def whole(self, chunks: Sequence[Chunk], usage: Usage) -> dict[str, Any]:
    """Returns the response of the last event."""
    return chunks[-1]['response']

  def frame(self, chunk: Chunk) -> bytes:
    """Returns an event as a server-sent event."""
    return b'event: ' + chunk['type'].encode() + b'\ndata: ' + as_json(chunk) + b'\n\n'

  def _event(self, kind: str, **fields: Any) -> Chunk:
    self._number += 1
    return {'type': f'response.{kind}', 'sequence_number': self._number - 1, **fields}

  def _of_part(self, kind: str, **fields: Any) -> Chunk:
    return self._event(kind, item_id=self._item, output_index=0, content_index=0, **fields)

  def _part(self, text: str) -> dict[str, Any]:
    return {'type': 'output_text', 'text': text, 'annotations': [], 'logprobs': []}

  def _message(self, status: str, content: Sequence[Any]) -> dict[str, Any]:
    return {'id': self._item, 'type': 'message', 'role': 'assistant', 'status': status, 'content': list(content)}

  def _response(self, status: str, output: Sequence[Any], usage: Usage | None = None) -> dict[str, Any]:
    details = {'reason': 'max_output_tokens'} if status == 'incomplete' else None
    count = usage and {'input_tokens': usage.prompt, 'input_tokens_details': {'cached_tokens': usage.cached},
                       'output_tokens': usage.completion, 'output_tokens_details': {'reasoning_tokens': 0},
                       'total_tokens': usage.prompt + usage.completion}
    return {**self._head, 'status': status, 'incomplete_details': details, 'output': list(output), 'usage': count}
