"""The page in a real Chromium: a talk with text that grows, second tries, thumbs, and a blind comparison to its record; on a phone, too."""
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

from yothalia.core import load_records

ROOT = Path(__file__).parent.parent
CHROME = shutil.which('chromium') or shutil.which('google-chrome')
playwright = pytest.importorskip('playwright.sync_api', reason='make test-browser installs playwright')
pytestmark = pytest.mark.skipif(not (CHROME and os.environ.get('YOTHALIA_TEST_BROWSER')), reason='make test-browser runs these, where Chromium is installed')
SHOTS = os.environ.get('YOTHALIA_SHOTS')  # a folder for screenshots, to be looked at


def shot(page, name, **kw):
    if SHOTS: Path(SHOTS).mkdir(parents=True, exist_ok=True); page.screenshot(path=f'{SHOTS}/{name}.png', **kw)


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "A run with the shipped sample, without an adapter, served by the command."
    box = tmp_path_factory.mktemp('page')
    for name in ('nbs', 'yothalia', 'runs'): (box/name).symlink_to(ROOT/name)
    for f in ('settings.ini', 'README.md'): shutil.copy(ROOT/f, box/f)
    from yothalia.data import DataConfig, prepare
    os.environ['YOTHALIA_ROOT'] = str(box)
    try: prepare(DataConfig(data='sample', out='_runs/page'))
    finally: del os.environ['YOTHALIA_ROOT']
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = os.environ | dict(YOTHALIA_ROOT=str(box), PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    p = subprocess.Popen([sys.executable, '-c', 'from yothalia.commands import app; app()', 'serve', 'page', '--port', str(port), '--new-tokens', '24'],
                         cwd=box, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url, end = f'http://127.0.0.1:{port}', time.monotonic()+120
    while True:
        try: urllib.request.urlopen(f'{url}/health', timeout=2).read(); break
        except OSError:
            assert p.poll() is None and time.monotonic() < end, p.stdout.read()
            time.sleep(.3)
    yield url, box/'_runs/page'
    p.terminate(); p.wait(30)


@pytest.fixture
def page(served):
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox'])
        tab = b.new_page(); tab.wrong = []
        tab.on('console', lambda m: tab.wrong.append(m.text) if m.type in ('error', 'warning') else None)
        tab.on('pageerror', lambda e: tab.wrong.append(str(e)))
        tab.route(lambda u: not u.startswith(served[0]), lambda r: (tab.wrong.append(r.request.url), r.abort()))  # nothing from elsewhere
        tab.goto(served[0], wait_until='networkidle')
        yield tab
        b.close()


def test_talk(page, served):
    url, out = served
    names = page.locator('#who option').all_inner_texts(); assert len(names) > 5
    page.select_option('#who', 'queen-of-hearts'); assert page.locator('#picture').evaluate('e => e.complete || new Promise(r => e.onload = () => r(true))')
    page.evaluate('''() => { window.seen = []; new MutationObserver(() => { const s = [...document.querySelectorAll('.assistant .said')].pop(); if (s) window.seen.push(s.textContent.length) })
                             .observe(document.getElementById('talk'), {childList: true, subtree: true, characterData: true}) }''')
    page.fill('#line', 'Who stole the <b>tarts</b>?'); page.press('#line', 'Enter')
    page.wait_for_selector('.assistant:last-child .acts', timeout=90_000)
    lengths = sorted(set(page.evaluate('window.seen'))); assert len(lengths) > 3, lengths  # it grew
    assert page.locator('.user .said').last.inner_text() == 'Who stole the <b>tarts</b>?' and page.locator('.said b').count() == 0  # text, not HTML
    first = page.locator('.assistant .said').last.inner_text()
    page.get_by_label('another try').click(); page.wait_for_selector('text=2/2', timeout=90_000)
    second = page.locator('.assistant .said').last.inner_text(); assert second and second != first
    page.get_by_label('the try before').click(); assert page.locator('.assistant .said').last.inner_text() == first
    with page.expect_response(lambda r: '"thumb":1' in (r.request.post_data or '')): page.locator('.assistant').last.get_by_label('good').click()
    assert page.locator('.assistant').last.get_by_label('good').get_attribute('aria-pressed') == 'true'
    log = max((out/'chats').glob('queen-of-hearts-*.jsonl'), key=lambda p: p.stat().st_mtime)
    lines = [json.loads(l) for l in log.read_text().splitlines()]
    assert lines[-1]['mes'] == first and set(lines[-1]['swipes']) == {first, second} and lines[-1]['extra'] == dict(thumb=1)
    shot(page, 'talk'); assert not page.wrong, page.wrong


def test_blind(page, served):
    url, out = served
    page.check('#blind'); page.select_option('#one', 'prompt'); page.select_option('#two', 'base')
    for k, click in enumerate(('the first is better', 'no difference', 'the second is better')):
        page.fill('#line', f'What do you think of Tuesday number {k}?'); page.click('#send')
        page.wait_for_selector('.duel .acts', timeout=120_000)
        if not k: shot(page, 'blind')
        html = page.locator('.duel').inner_html(); assert 'prompt' not in html and 'told' not in html
        with page.expect_response('**/page/pick') as got: page.get_by_label(click).click()
        told = got.value.json(); assert {told['a'], told['b']} == {'prompt', 'base'}
        page.wait_for_function('() => document.getElementById("tally").textContent.startsWith("That was")'); page.wait_for_selector('.duel', state='detached')
    rec, = load_records(out/'records', step='picks'); picks = [json.loads(l) for l in (out/'picks.jsonl').read_text().splitlines()]
    assert rec['metrics']['no difference between base and prompt']['n'] == 3 and rec['metrics']['prompt over base']['n'] == 2
    assert [p['choice'] for p in picks][1] == 'tie' and picks[0]['choice'] == picks[0]['first'] and picks[2]['choice'] == picks[2]['second']
    assert picks[0]['replies'][0] and picks[0]['messages'][-1]['content'].startswith('What do you think')
    shot(page, 'blind-done'); assert not page.wrong, page.wrong


def test_drawn_lines(page, served):
    "Two people who take the drawn lines are asked the same, hear the same, and are told apart."
    url, out = served; before = len((out/'picks.jsonl').read_text().splitlines()) if (out/'picks.jsonl').exists() else 0
    for who in ('Ada', 'Bo'):
        page.reload(wait_until='networkidle'); page.select_option('#who', 'queen-of-hearts'); page.check('#blind')
        page.select_option('#one', 'prompt'); page.select_option('#two', 'base'); page.fill('#listener', who)
        for k in range(2):
            page.click('#next'); page.wait_for_selector('.duel .acts', timeout=120_000)
            if who == 'Ada' and not k: shot(page, 'drawn')
            with page.expect_response('**/page/pick'): page.get_by_label('the first is better').click()
            page.wait_for_selector('.duel', state='detached')
    picks = [json.loads(l) for l in (out/'picks.jsonl').read_text().splitlines()][before:]
    ada, bo = ([p for p in picks if p['listener'] == w] for w in ('Ada', 'Bo'))
    assert [p['line'] for p in ada] == [p['line'] for p in bo] and len({p['line'] for p in ada}) == 2 and all(p['line'] for p in ada)
    assert [p['messages'] for p in ada] == [p['messages'] for p in bo] and all(len(p['messages']) == 1 for p in ada)
    said = [[dict(zip((p['first'], p['second']), p['replies'])) for p in some] for some in (ada, bo)]
    assert said[0] == said[1] and said[0][0]['prompt'], said
    rec, = load_records(out/'records', step='picks'); assert rec['metrics']['agreement of people']['n'] == 2
    page.fill('#line', 'A line of my own'); page.click('#send'); page.wait_for_selector('.duel .acts', timeout=120_000); page.get_by_label('no difference').click()
    page.wait_for_selector('.duel', state='detached'); assert json.loads((out/'picks.jsonl').read_text().splitlines()[-1])['line'] == ''
    assert not page.wrong, page.wrong


def test_stop_and_errors(page, served):
    "What is stopped is kept as far as it came; what the server refuses is said."
    page.fill('#line', 'Tell me a very long story about the sea.'); page.click('#send')
    page.wait_for_function('() => { const s = [...document.querySelectorAll(".assistant .said")].pop(); return s && s.textContent.length > 3 }', timeout=90_000)
    page.click('#stop'); page.wait_for_selector('#send:visible')
    assert len(page.locator('.assistant .said').last.inner_text()) > 3
    page.evaluate("document.querySelector('#how').append(new Option('odd', 'odd'))"); page.select_option('#how', 'odd')
    page.fill('#line', 'Hello?'); page.click('#send')
    page.wait_for_function('() => document.getElementById("wrong").textContent.includes("not served")', timeout=30_000)
    assert page.locator('.turn').last.get_attribute('class') == 'turn user'


def test_by_keyboard(page, served):
    "Without a mouse: a line is said, another try is asked for, focus stays where one was, Escape stops; what is heard is told once, when it is whole."
    page.wait_for_function('() => document.activeElement.id === "line"')
    page.keyboard.type('Good evening!'); page.keyboard.press('Enter'); page.wait_for_selector('.assistant:last-child .acts', timeout=90_000)
    name, said = page.locator('#who option:checked').inner_text(), page.locator('.assistant .said').last.inner_text()
    page.wait_for_function('w => document.getElementById("heard").textContent === w', arg=f'{name}: {said}')
    assert [s.split(':')[0] for s in page.locator('.turn .unseen').all_text_contents()][-2:] == ['You', name]
    page.get_by_label('good').last.focus(); page.keyboard.press('Enter'); page.wait_for_function('() => document.activeElement.title === "good" && document.activeElement.getAttribute("aria-pressed") === "true"')
    page.get_by_label('another try').focus(); page.keyboard.press('Enter'); page.wait_for_selector('#stop:visible'); page.keyboard.press('Escape'); page.wait_for_selector('#send:visible')


@pytest.mark.skipif(not os.environ.get('YOTHALIA_AXE'), reason='YOTHALIA_AXE names no axe.min.js (npm pack axe-core)')
def test_read_aloud(page, served):
    "What axe-core looks for: names, roles, contrast, in both colour schemes, with and without the blind comparison."
    page.fill('#line', 'Good evening!'); page.click('#send'); page.wait_for_selector('.assistant:last-child .acts', timeout=90_000)
    source = Path(os.environ['YOTHALIA_AXE']).read_text()
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme); page.evaluate(source); page.check('#blind')
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")['violations']
        assert not found, [(v['id'], v['help'], [n['html'][:100] for n in v['nodes']]) for v in found]


def test_phone(page, served):
    page.set_viewport_size(dict(width=390, height=760)); page.reload(wait_until='networkidle')
    wide = page.evaluate('document.documentElement.scrollWidth'); assert wide <= 390, wide
    for id in ('who', 'line', 'send'):
        b = page.locator(f'#{id}').bounding_box(); assert b and b['x'] >= 0 and b['x']+b['width'] <= 390 and b['y']+b['height'] <= 760, (id, b)
    page.fill('#line', 'Good evening!'); page.click('#send'); page.wait_for_selector('.assistant:last-child .acts', timeout=90_000)
    shot(page, 'phone'); page.check('#blind'); shot(page, 'phone-blind')
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
