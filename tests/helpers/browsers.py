"""A real browser for the tests of web pages, and pages in it whose console is watched.

A test file that imports it is skipped where Playwright, the server's libraries or Chromium are missing.
"""
import contextlib
import os
import pathlib
import shutil

import pytest

playwright = pytest.importorskip('playwright.sync_api')
pytest.importorskip('uvicorn')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
MARKS = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')]
SCREENSHOTS = os.environ.get('SCREENSHOTS')   # a folder for pictures to look at


def chromium():
  """Yields the browser; the fixture `browser` calls it."""
  with playwright.sync_playwright() as started:
    browser = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    yield browser
    browser.close()


@contextlib.contextmanager
def watched_page(browser, size, expected='', address=None):
  """A page of a new browser profile, whose console shows nothing wrong but what is expected.

  With an address, the page asks for nothing from elsewhere.
  """
  with contextlib.closing(browser.new_context(**size)) as context:
    page, wrong = context.new_page(), []
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.on('console', lambda message: wrong.append(message.text) if message.type == 'error' else None)
    page.on('dialog', lambda dialog: wrong.append('a script in a text was run'))
    if address is not None:
      page.on('request', lambda request: wrong.append(request.url) if not request.url.startswith(
          (address, 'data:')) else None)
    yield page
    assert [text for text in wrong if not expected or expected not in text] == []


def picture(page, name, full_page=False):
  """Writes a picture of the page where a folder is given for them."""
  if SCREENSHOTS:
    page.screenshot(path=str(pathlib.Path(SCREENSHOTS) / f'{name}.png'), full_page=full_page)
