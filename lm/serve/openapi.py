"""The OpenAPI document of the server, from the same fields that read the bodies."""
import importlib.metadata
from typing import Any

from lm.serve import request_bodies
from lm.serve.body_fields import schema_of

_POSTS = {
    '/v1/completions': ('Continues texts.', request_bodies.COMPLETION),
    '/v1/chat/completions': ('Continues a conversation.', request_bodies.CHAT),
    '/v1/responses': ('Answers with text.', request_bodies.RESPONSE),
    '/v1/embeddings': ('Embeds texts.', request_bodies.EMBEDDINGS),
    '/v1/score': ('Returns log p(text_2 | text_1) in nats.', request_bodies.SCORE),
    '/tokenize': ('Returns the token ids of a text or of messages.', request_bodies.TOKENIZE),
    '/detokenize': ('Returns the text of token ids.', request_bodies.DETOKENIZE)}
_GETS = {
    '/': ('The chat page.', 'text/html'), '/health': ('200 while the engine runs.', None),
    '/metrics': ('Figures for Prometheus.', 'text/plain'), '/version': ('The version.', 'application/json'),
    '/tokenizer_info': ('Names of control tokens, and the chat template.', 'application/json'),
    '/openapi.json': ('This document.', 'application/json'), '/v1/models': ('The model.', 'application/json')}
_STATUSES = {'400': 'the body is wrong', '401': 'the API key is missing or wrong', '403': 'not from this origin',
             '404': 'there is no such model', '413': 'the body is too large', '429': 'too many requests wait',
             '503': 'the engine has stopped', '504': 'the answer took too long'}
_STREAMING = ('/v1/completions', '/v1/chat/completions', '/v1/responses')


def version() -> str:
  """Returns the version of the package; 'unknown' where it runs without being installed."""
  try:
    return importlib.metadata.version('lm')
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'


def document() -> dict[str, Any]:
  """Returns the document."""
  def answer(note: str, *kinds: str) -> dict[str, Any]:
    return {'description': note, **({'content': {kind: {} for kind in kinds}} if kinds else {})}

  error = {'type': 'object', 'required': ['message', 'type', 'param', 'code'], 'properties': {
      name: {'type': ['string', 'null']} for name in ('message', 'type', 'param', 'code')}}
  schemas = {'Error': {'type': 'object', 'required': ['error'], 'properties': {'error': error}}}
  errors = {status: {'description': note, 'content': {'application/json': {'schema': {
      '$ref': '#/components/schemas/Error'}}}} for status, note in _STATUSES.items()}
  paths: dict[str, Any] = {path: {'get': {'summary': note, 'responses': {
      '200': answer(note, *([kind] if kind else []))}}} for path, (note, kind) in _GETS.items()}
  paths['/v1/models/{id}'] = {'get': {
      'summary': 'A model.', 'parameters': [{'name': 'id', 'in': 'path', 'required': True,
                                             'schema': {'type': 'string'}}],
      'responses': {'200': answer('The model.', 'application/json'), '404': errors['404']}}}
  for path, (note, fields) in _POSTS.items():
    kinds = ['application/json', *(['text/event-stream'] if path in _STREAMING else [])]
    paths[path] = {'post': {
        'summary': note, 'responses': {'200': answer(note, *kinds), **errors},
        'requestBody': {'required': True, 'content': {'application/json': {'schema': schema_of(fields)}}}}}
  return {'openapi': '3.1.0', 'info': {'title': 'lm', 'version': version()}, 'paths': paths,
          'components': {'schemas': schemas, 'securitySchemes': {'key': {'type': 'http', 'scheme': 'bearer'}}}}
