"""A study is rated from beginning to end in a real browser: by keyboard, by touch, and over a lost connection."""
import contextlib
import json

import pytest
from helpers import browsers, human_studies

from lm.evaluate import people

pytestmark = browsers.MARKS
SIZES = {'desktop': {'viewport': {'width': 1280, 'height': 800}},
         'phone': {'viewport': {'width': 390, 'height': 844}, 'is_mobile': True, 'has_touch': True},
         'dark': {'viewport': {'width': 320, 'height': 568}, 'color_scheme': 'dark'}}


def page_of(browser, size='desktop'):
  return browsers.watched_page(browser, SIZES[size], expected='ERR_INTERNET_DISCONNECTED')


def wait(page, state):
  """Waits until the page shows a task, by its number, or the end ('done')."""
  page.wait_for_selector(f'body[data-ready="{state}"]')
  # Nothing is wider than the screen.
  assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')


def keys(study, answer):
  """The keys that give an answer."""
  match answer:
    case {'choice': choice}:
      return [{0: 'ArrowLeft', 1: '2', 'tie': '0'}[choice]]
    case {'best': best, 'worst': worst}:
      return [str(best + 1), str(worst + 1)]
    case {'ratings': rows}:
      return [*(str(value) for row in rows for value in row), 'Enter']


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('mode', ['pairwise', 'best_worst', 'likert'])
def test_a_whole_study_is_rated_by_keyboard(browser, tmp_path, mode, size):
  """Every vote that is stored is the one whose keys were pressed, about the texts that were on the screen."""
  systems = ('alpha', 'beta', 'gamma') if mode == 'best_worst' else ('alpha', 'beta')
  store = human_studies.new_study(tmp_path, systems, mode=mode, items=4, raters=1,
                                  criteria=('fluency', 'relevance') if mode == 'likert' else None)
  rule, answers = human_studies.preferred(('beta', 'gamma', 'alpha')), []
  with human_studies.served(store) as address, page_of(browser, size) as page:
    page.goto(f'{address}/rate/{store.raters[1]}')
    for number, task in enumerate(store.tasks[1]):
      wait(page, number)
      shown = page.locator('article .text').all_inner_texts()
      intact = [store.study.items[task.item].texts[store.study.systems.index(system)] for system in task.shown]
      assert [text for i, text in enumerate(shown) if i != task.scrambled] == [
          text for i, text in enumerate(intact) if i != task.scrambled]
      answers.append(rule(store.study, task))
      *first, last = keys(store.study, answers[-1])
      for key in first:
        page.keyboard.press(key)
      browsers.picture(page, f'{mode}_{size}_{number}')
      page.keyboard.press(last)
    wait(page, 'done')
    assert page.locator('h1').inner_text() == 'All done. Thank you!'
    page.goto(f'{address}/results/{store.results_token}')
    wait(page, 'done')
    assert page.locator('table').count() == len(people.summarise(store).tables)
    browsers.picture(page, f'{mode}_{size}_results', full_page=True)
  assert [vote.answer for vote in store.votes()] == answers


def test_votes_are_given_by_touch_with_texts_one_above_the_other(browser, tmp_path):
  store = human_studies.new_study(tmp_path, items=4, raters=1)
  with human_studies.served(store) as address, page_of(browser, 'phone') as page:
    page.goto(f'{address}/rate/{store.raters[1]}')
    for number in range(len(store.tasks[1])):
      wait(page, number)
      first, second = page.locator('article').all()
      assert second.bounding_box()['y'] >= first.bounding_box()['y'] + first.bounding_box()['height']
      button = page.get_by_role('button', name='Text 2 is better')
      assert button.bounding_box()['height'] >= 44   # large enough for a thumb
      button.dblclick()   # one answer
    wait(page, 'done')
  assert [vote.answer for vote in store.votes()] == [{'choice': 1}] * 8


def test_skip_undo_comment_and_reload(browser, tmp_path):
  store = human_studies.new_study(tmp_path, items=4, raters=1, mode='likert', criteria=('fluency',))
  with human_studies.served(store) as address, page_of(browser) as page:
    page.goto(f'{address}/rate/{store.raters[1]}')
    wait(page, 0)
    page.keyboard.press('s')
    wait(page, 1)
    page.keyboard.press('c')
    page.keyboard.type('24 u s')   # keys of a comment rate, undo and skip nothing
    page.keyboard.press('Escape')
    for key in ('4', 'ArrowUp', '5', '2'):   # the first rating is corrected
      page.keyboard.press(key)
    page.keyboard.press('Enter')
    wait(page, 2)
    vote, = store.votes()
    assert (vote.number, vote.answer, vote.comment) == (1, {'ratings': [[5], [2]]}, '24 u s')
    page.reload()
    wait(page, 2)
    page.keyboard.press('u')
    wait(page, 1)
    assert not store.votes() and page.locator('#comment').input_value() == '24 u s'
    assert page.locator('input:checked').evaluate_all('nodes => nodes.map(node => node.value)') == ['5', '2']
    page.keyboard.press('Enter')
    wait(page, 2)
    page.locator('label', has_text='3').first.click()
    assert page.get_by_role('button', name='Next').is_disabled()
    page.get_by_role('radio', name='1').last.press('Space')
    page.get_by_role('button', name='Next').click()
    wait(page, 3)
  assert [vote.answer for vote in store.votes()] == [{'ratings': [[5], [2]]}, {'ratings': [[3], [1]]}]


def test_a_vote_is_kept_and_counted_once_where_the_connection_is_lost(browser, tmp_path):
  store = human_studies.new_study(tmp_path, items=4, raters=1)
  with human_studies.served(store) as address, page_of(browser) as page:
    link, replies = f'{address}/rate/{store.raters[1]}', []
    page.goto(link)
    wait(page, 0)

    def lose_reply(route):   # the server stores the vote, and the page does not hear of it
      replies.append(route.fetch().status)
      route.abort('internetdisconnected')
    page.route('**/vote', lose_reply, times=1)
    page.keyboard.press('1')
    wait(page, 1)   # sent again
    assert replies == [200] and [vote.answer for vote in store.votes()] == [{'choice': 0}]
    page.route('**/vote', lambda route: route.abort('internetdisconnected'))
    page.keyboard.press('0')
    page.get_by_text('Your answer is kept on this device').wait_for()
    browsers.picture(page, 'lost_connection')
    page.unroute('**/vote')
    page.goto(link)   # as if the rater came back later
    wait(page, 2)
  assert [vote.answer for vote in store.votes()] == [{'choice': 0}, {'choice': 'tie'}]


def test_markup_in_texts_is_shown_and_not_run(browser, tmp_path):
  texts = '<script>alert(1)</script> one two three four', '<img src=x onerror=alert(2)>\n  indented &amp; kept'
  for name, text in zip('ab', texts):
    (tmp_path / f'{name}.jsonl').write_text(json.dumps({'prompt': '<b>bold</b>', 'text': text}) + '\n')
  store = people.open_study(tmp_path / 'study', [str(tmp_path / f'{name}.jsonl') for name in 'ab'], {
      'checks': 0, 'question': '<i>Which?</i>'})
  with human_studies.served(store) as address, page_of(browser) as page:
    page.goto(f'{address}/rate/{store.raters[1]}')
    wait(page, 0)
    assert sorted(page.locator('article .text').all_inner_texts()) == sorted(texts)
    assert page.locator('h1').inner_text() == '<i>Which?</i>'
    assert page.locator('#prompt .text').inner_text() == '<b>bold</b>'


@pytest.mark.parametrize('path,words', [('/rate/unknown', 'belongs to no one'), ('/', 'Open the whole link'),
                                        ('/results/unknown', 'belongs to no one')])
def test_a_wrong_link_says_so(browser, tmp_path, path, words):
  store = human_studies.new_study(tmp_path)
  with human_studies.served(store) as address, contextlib.closing(browser.new_context()) as context:
    page = context.new_page()
    page.goto(address + path)
    page.get_by_text(words).wait_for()
