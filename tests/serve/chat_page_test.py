"""The chat page in a real browser: text cannot bring elements, and what a token could have been is shown."""
import contextlib
import threading

import pytest
from helpers import browsers
from helpers.scripted_engine import ScriptedEngine, address_of, text_script

pytest.importorskip('prometheus_client')
pytestmark = browsers.MARKS
SIZES = {'desktop': {'viewport': {'width': 1280, 'height': 800}},
         'phone': {'viewport': {'width': 390, 'height': 844}, 'is_mobile': True, 'has_touch': True},
         'dark': {'viewport': {'width': 1100, 'height': 700}, 'color_scheme': 'dark'}}
TEXT = '''## Bubble **sort**

It *swaps* neighbours, `a > b`, naïve 日本 🙂:

```python
def sort(a):
  return a if a < [1] else "<b>"
```

1. one
2. two with [a link](https://example.org/x_y)
   - inner

> quoted <i>text</i>

| n | steps |
|---|---|
| 2 | 1 |

<img src=x onerror=alert(1)> [bad](javascript:alert(1)) ![i](http://127.0.0.1:9/i.png) snake_case_name 2 * 3 * 4
'''


@contextlib.contextmanager
def page_of(browser, address, size='desktop', expected=''):
  """The chat page, which is not wider than the screen."""
  with browsers.watched_page(browser, SIZES[size], expected, address) as page:
    page.goto(address)
    page.wait_for_selector('body[data-ready=idle]')
    yield page
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')


def send(page, text, key='Enter'):
  page.fill('#input', text)
  page.press('#input', key)


@pytest.mark.parametrize('size', SIZES)
def test_markdown_is_drawn_and_text_brings_no_element_of_its_own(browser, size):
  engine = ScriptedEngine(text_script(TEXT), 3)
  with address_of(engine, context=2048) as address, page_of(browser, address, size) as page:
    browsers.picture(page, f'empty_{size}')
    send(page, '<b>sort</b>?')
    page.wait_for_selector('.tools button')
    text = page.locator('.text')
    assert page.locator('.message.user').inner_text() == '<b>sort</b>?'
    for selector, inner in (('h3', 'Bubble sort'), ('h3 strong', 'sort'), ('em', 'swaps'), ('p code', 'a > b'),
                            ('pre', 'def sort(a):\n  return a if a < [1] else "<b>"'), ('ol > li >> nth=0', 'one'),
                            ('li li', 'inner'), ('blockquote', 'quoted <i>text</i>'), ('th >> nth=1', 'steps'),
                            ('td >> nth=0', '2'), ('a', 'a link')):
      assert text.locator(selector).first.inner_text().strip() == inner, selector
    # An image is a link, which nothing follows by itself.
    assert text.locator('a').count() == 2 and text.locator('img, script, b, i').count() == 0
    last = text.locator('p').last.inner_text()
    assert '<img src=x onerror=alert(1)>' in last and 'snake_case_name 2 * 3 * 4' in last
    page.check('#heat')
    browsers.picture(page, f'answer_{size}')
    if size == 'phone':
      text.locator('.t').nth(2).tap()   # what it shows stays until something else is touched
      assert page.locator('#tip tr').count() == 5
      browsers.picture(page, 'tap_phone')
      page.locator('#input').tap()
      assert not page.locator('#tip').is_visible()
      page.click('#menu')
      browsers.picture(page, 'menu_phone')
      page.click('#new')
      assert page.locator('.message').count() == 0


def test_the_probabilities_of_tokens_are_shown_by_pointer_and_by_keys(browser):
  with address_of(ScriptedEngine(text_script('ab 🙂é'))) as address, page_of(browser, address) as page:
    send(page, 'hi')
    page.wait_for_selector('.tools button')
    tokens = page.locator('.text .t')
    # A span for the first token of each character; the others, which are parts of it, have no text of their own.
    assert tokens.all_inner_texts() == ['a', 'b', ' ', '🙂', 'é']
    tokens.nth(1).hover()
    rows = page.locator('#tip tr')
    assert rows.count() == 5 and rows.first.inner_text().split('\t')[:2] == ['b', '78 %']   # exp(-.25)
    assert page.locator('#tip tr.chosen').inner_text() == rows.first.inner_text()
    browsers.picture(page, 'hover')
    page.mouse.move(0, 0)
    page.focus('.text')
    for _ in range(3):
      page.keyboard.press('ArrowRight')
    assert page.locator('.t.shown').inner_text() == ' ' and page.locator('#tip tr.chosen').inner_text().startswith('␣')


def test_stop_retry_conversations_and_settings(browser):
  gate = threading.Semaphore(0)
  engine = ScriptedEngine(text_script('x' * 50, ends=False), wait=lambda: gate.acquire(timeout=20))
  with address_of(engine, context=512) as address, page_of(browser, address) as page:
    page.click('#settings')
    page.fill('#temperature', '0.5')
    page.fill('#max_tokens', '50')
    page.fill('#system', 'be short')
    page.press('#system', 'Escape')
    send(page, 'first question')
    gate.release(5)
    browsers.playwright.expect(page.locator('.text')).to_have_text('xxxxx')
    assert not page.locator('.tools button').first.is_visible()   # while the answer is written
    page.keyboard.press('Escape')
    page.wait_for_selector('body[data-ready=idle]')
    for _ in range(40):   # steps, of the 45 that the answer still has, until the server hears that the page has gone
      if not engine.aborted:
        gate.release()
        page.wait_for_timeout(50)
    assert page.locator('.tools').inner_text().startswith('stopped') and len(engine.aborted) == 1
    assert engine.aborted[0].sampling.temperature == .5 and engine.aborted[0].max_tokens == 50
    gate.release(200)
    page.keyboard.press('Alt+r')
    browsers.playwright.expect(page.locator('.text')).to_have_text('x' * 50)
    browsers.playwright.expect(page.locator('.tools')).to_contain_text('cut off')
    assert page.locator('.message').count() == 2
    page.keyboard.press('Alt+n')
    send(page, 'second', 'Shift+Enter')
    assert page.locator('.message').count() == 0   # a new line
    page.press('#input', 'Enter')
    page.wait_for_selector('.tools button')
    assert page.locator('#list li').all_inner_texts() == ['second\n✕', 'first question\n✕']
    page.reload()
    page.wait_for_selector('body[data-ready=idle]')
    assert page.locator('.message.user').inner_text().strip() == 'second'
    page.keyboard.press('Alt+ArrowDown')
    assert page.locator('.message.user').inner_text() == 'first question'
    assert page.input_value('#temperature') == '0.5'


def test_a_model_without_a_template_continues_the_text(browser):
  engine = ScriptedEngine(text_script('ééé'))
  with address_of(engine, None, most_tokens=9) as address, page_of(browser, address) as page:
    assert 'continues your text' in page.locator('.hint').inner_text()
    send(page, 'Once')
    page.wait_for_selector('.tools button')
    send(page, '')
    browsers.playwright.expect(page.locator('.message.assistant')).to_have_count(2)
    page.wait_for_selector('body[data-ready=idle]')
    assert page.locator('.message.user').all_inner_texts() == ['Once']
    assert page.locator('.text').all_inner_texts() == ['ééé', 'ééé']
    browsers.picture(page, 'completion')


def test_a_conversation_goes_on_with_the_model_of_the_settings(browser):
  script = lambda request, choice: text_script(f'by {request.adapter}')(request, choice)
  with address_of(ScriptedEngine(script), adapters={'sql': None}) as address, page_of(browser, address) as page:
    send(page, 'hi')
    browsers.playwright.expect(page.locator('.text')).to_have_text('by 0')
    page.click('#settings')
    page.select_option('#models', 'sql')
    browsers.playwright.expect(page.locator('#model')).to_have_text('sql')
    browsers.picture(page, 'models')
    page.keyboard.press('Escape')
    page.reload()
    page.wait_for_selector('body[data-ready=idle]')
    send(page, ' and', 'Enter')   # without a template, the text goes on
    browsers.playwright.expect(page.locator('.text').last).to_have_text('by 1')


def test_the_oldest_text_is_left_out_where_the_context_has_no_room(browser):
  read = []
  def script(request, choice):
    read.append(request.ids)
    return text_script('x' * 20)(request, choice)
  with address_of(ScriptedEngine(script, 4), context=128) as address, page_of(browser, address) as page:
    for message, notes in ('a' * 10, 0), ('b' * 10, 0), ('c', 1):   # an answer needs half of the context
      send(page, message)
      browsers.playwright.expect(page.locator(f'.message.user >> text={message}')).to_have_count(1)
      page.wait_for_selector('body[data-ready=idle]')
      assert page.locator('.tools >> text=does not fit the context').count() == notes
    assert page.locator('.message').count() == 6
  texts = [bytes(i for i in ids.tolist() if i < 256).decode() for ids in read]
  a, b, x = 'a' * 10, 'b' * 10, 'x' * 20
  assert texts == [a, a + x + b, b + x + 'c']
  with address_of(ScriptedEngine(script, 4), None, context=64) as address, page_of(browser, address) as page:
    send(page, 'd' * 50)
    page.wait_for_selector('.tools button')
    send(page, 'e')
    browsers.playwright.expect(page.locator('.tools >> text=does not fit the context')).to_have_count(1)
  assert bytes(read[-1].tolist()).decode() == ('d' * 50 + 'x' * 13 + 'e')[-32:]


def test_errors_are_shown_and_a_key_is_asked_for(browser):
  engine, name = ScriptedEngine(text_script('fine')), 'a-name/of-a-model-that-is-wider-than-a-phone'
  with address_of(engine, key='secret', name=name) as address, page_of(
      browser, address, 'phone', expected='Failed to load resource') as page:
    assert 'needs an API key' in page.locator('.problem').inner_text()
    page.click('#settings')
    page.fill('#key', 'secret')
    page.press('#key', 'Enter')
    browsers.playwright.expect(page.locator('#model')).to_have_text(name)
    assert page.locator('#settings').evaluate('button => button.getBoundingClientRect().right <= innerWidth')
    send(page, 'hi')
    page.wait_for_selector('.tools button')
    assert page.locator('.text').inner_text() == 'fine'
    page.route('**/v1/chat/completions', lambda route: route.abort())   # an answer stays where there is no new one
    page.keyboard.press('Alt+r')
    browsers.playwright.expect(page.locator('.problem')).to_have_text('The server cannot be reached.')
    assert page.locator('.text').inner_text() == 'fine'
    page.unroute('**/v1/chat/completions')
    page.keyboard.press('Alt+r')
    browsers.playwright.expect(page.locator('.problem')).to_have_count(0)
    browsers.playwright.expect(page.locator('.text')).to_have_text('fine')
  with address_of(ScriptedEngine(text_script('fine'))) as address, page_of(
      browser, address, expected='status of 400') as page:
    send(page, 'long ' * 50)
    page.wait_for_selector('.problem')
    assert 'more than the 128 that the model reads' in page.locator('.problem').inner_text()
    browsers.picture(page, 'problem')
