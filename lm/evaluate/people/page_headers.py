"""A page of one file, with headers that let it run its own scripts and styles and nothing else."""
import base64
import hashlib
import pathlib
import re


def read_page(path: pathlib.Path) -> tuple[str, dict[str, str]]:
  """Returns the text of a page and its headers, which name the hashes of its scripts and styles."""
  page = path.read_text('utf-8')

  def hashed(tag: str) -> str:
    digests = [hashlib.sha256(body.encode()).digest() for body in re.findall(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL)]
    return ' '.join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

  policy = (f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
  return page, {'Content-Security-Policy': policy, 'Referrer-Policy': 'no-referrer',
                'X-Content-Type-Options': 'nosniff', 'Cache-Control': 'no-store'}
