"""Errors as OpenAI's protocol writes them."""
from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
  """A request that is refused, or that failed.

  Attributes:
    status: the HTTP status.
    message: what is wrong, and what to do.
    param: the field of the body that is wrong; None where it is no single one.
    code: a word for programs, such as 'model_not_found'; None for none.
    headers: of the HTTP answer.
  """

  def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
               headers: Mapping[str, str] | None = None):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, _valid(message), param and _valid(param), code
    self.headers = dict(headers or {})

  def body(self) -> dict[str, Any]:
    """Returns the JSON of the answer."""
    kind = {401: 'authentication_error', 404: 'not_found_error', 429: 'rate_limit_error'}.get(
        self.status, 'invalid_request_error' if self.status < 500 else 'server_error')
    return {'error': {'message': self.message, 'type': kind, 'param': self.param, 'code': self.code}}


def _valid(text: str) -> str:
  """Returns a text without lone surrogates, which names of a body's fields may have, and JSON may not."""
  return text.encode('utf-8', 'replace').decode()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
  """Returns the error of a body that is wrong, with status 400."""
  return ApiError(400, message, param, code)
