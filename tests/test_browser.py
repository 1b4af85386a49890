"""In a real browser: the site's pages, links, search and phone width; JupyterLab runs notebooks from top to bottom."""
import functools, http.server, json, os, re, shutil, socket, subprocess, sys, threading, time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CHROME = shutil.which('chromium') or shutil.which('google-chrome')
playwright = pytest.importorskip('playwright.sync_api', reason='make test-browser installs playwright')
pytestmark = pytest.mark.skipif(not (CHROME and os.environ.get('YOTHALIA_TEST_BROWSER')), reason='make test-browser runs these, where Chromium is installed')
SHOTS = os.environ.get('YOTHALIA_SHOTS')  # a folder for screenshots, to be looked at


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox'])
        yield b
        b.close()


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built and served."
    out = tmp_path_factory.mktemp('site')/'_docs'
    start = time.time()
    made = subprocess.run([str(BIN/'yothalia'), 'docs', '--no-quarto', '--out', str(out)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stdout + made.stderr
    assert time.time() - start < 300
    handler = functools.partial(type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None)), directory=str(out))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield out, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def shot(page, name, **kw):
    if SHOTS: Path(SHOTS).mkdir(parents=True, exist_ok=True); page.screenshot(path=f'{SHOTS}/{name}.png', **kw)


def test_every_page_opens(browser, site):
    "No error in the console, every link and picture within the site there, every picture with words for those who cannot see it."
    out, url = site
    page, wrong, links = browser.new_page(), [], set()
    page.route(lambda u: not u.startswith(url), lambda r: r.abort())  # a site must stand without others
    page.on('console', lambda m: wrong.append((page.url, m.text)) if m.type == 'error' and 'Failed to load resource' not in m.text else None)
    page.on('pageerror', lambda e: wrong.append((page.url, str(e))))
    page.on('response', lambda r: wrong.append((page.url, r.url, r.status)) if r.url.startswith(url) and r.status >= 400 else None)
    pages = sorted(p.relative_to(out).as_posix() for p in out.rglob('*.html'))
    assert len(pages) > 50
    for p in pages:
        page.goto(f'{url}/{p}', wait_until='load')
        links |= set(page.eval_on_selector_all('a[href]', 'es => es.map(e => e.href)'))
        bare = page.eval_on_selector_all('main img', 'es => es.filter(e => !e.alt).map(e => e.src.slice(0, 60))')
        assert not bare, f'{p} has pictures without an alternative text: {bare}'
        cut = page.eval_on_selector_all('main pre.sourceCode', 'es => es.filter(e => e.scrollWidth > e.clientWidth+1).map(e => e.textContent.slice(0, 60))')
        assert not cut, f'{p} has code that runs out at the right: {cut}'
    inside = {l[len(url):].partition('#')[0].lstrip('/') or 'index.html' for l in links if l.startswith(url)}
    assert not wrong, wrong[:5]
    assert not [l for l in inside if not (out/l).exists()], [l for l in inside if not (out/l).exists()]


def test_titles_search_and_reference(browser, site):
    out, url = site
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.goto(url); shot(page, 'index')
    side = page.inner_text('#quarto-sidebar, nav.sidebar, .sidebar')
    assert 'LoRA' in side and 'Guides' in side and '.ipynb' not in side and len(side.split('\n')) <= 15, side  # folded
    page.goto(f'{url}/guides/character.html')
    assert 'Bring your own character' in page.inner_text('#quarto-sidebar, nav.sidebar, .sidebar')  # unfolded where one is
    page.goto(url)
    found = json.loads((out/'search.json').read_text())
    assert any('load_model' in json.dumps(o) for o in found)
    page.keyboard.press('/') if not page.query_selector('input[type=search]:visible') else None
    box = page.query_selector('input[type=search]:visible') or page.wait_for_selector('input[type=search]:visible', timeout=5000)
    box.fill('load_model'); page.wait_for_timeout(1500); shot(page, 'search')
    assert 'load_model' in page.inner_text('body')
    page.goto(f'{url}/api/models.html'); shot(page, 'reference')
    assert 'load_model' in page.inner_text('main') and 'adapter' in page.inner_text('main')
    assert 'llms' in (out/'llms.txt').name and '02_lora' in (out/'llms.txt').read_text()


def test_phone_and_dark(browser, site):
    "Nothing is wider than a phone but what scrolls by itself, in light and dark."
    out, url = site
    for scheme in ('light', 'dark'):
        page = browser.new_context(viewport=dict(width=390, height=844), color_scheme=scheme).new_page()
        for p in ('index', 'guides/character', '04_benchmark', 'results/replies', 'api/core'):
            page.goto(f'{url}/{p}.html'); page.wait_for_timeout(200); shot(page, f'phone-{scheme}-{p.replace("/", "-")}')
            wide = page.evaluate('document.documentElement.scrollWidth')
            assert wide <= 400, f'{p} is {wide} pixels wide on a phone'


LAB = ['01_data', '02_lora', '03_quantization', '04_benchmark', '05_profiling']

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a copy of the notebooks, as `make lab` starts it."
    box = tmp_path_factory.mktemp('lab')
    for name in ('nbs', 'yothalia', 'results', 'runs'): shutil.copytree(ROOT/name, box/name, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    for name in ('settings.ini', 'README.md', 'constraints.txt'): shutil.copy(ROOT/name, box/name)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, 'YOTHALIA_ROOT': str(box), 'PYTHONPATH': str(box), 'JUPYTER_CONFIG_DIR': str(box/'.jupyter'), 'PYTHONWARNINGS': 'ignore'}
    run = subprocess.Popen([str(BIN/'jupyter'), 'lab', '--no-browser', '--allow-root', f'--port={port}', '--ServerApp.ip=127.0.0.1', '--IdentityProvider.token=test',
                            f'--notebook-dir={box}'], env=env, cwd=box, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield box, f'http://127.0.0.1:{port}'
    run.terminate()
    try: run.wait(20)
    except subprocess.TimeoutExpired: run.kill()


def run_all(browser, address):
    "Open a notebook in JupyterLab and run it; the page, and when it began."
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    for attempt in range(30):
        try: page.goto(f'{address}?token=test&reset', timeout=60_000); break
        except playwright.Error: time.sleep(1)
    page.wait_for_selector('.jp-NotebookPanel .jp-CodeCell', timeout=90_000)
    page.wait_for_function('document.querySelector("#jp-main-statusbar")?.innerText.includes("| Idle")', timeout=90_000)
    start = time.time()
    page.click('text="Run"'); page.click('text="Run All Cells"')
    return page, start


@pytest.mark.parametrize('name', LAB)
def test_run_all_in_jupyterlab(browser, lab, name):
    "Run All from a clean kernel with the defaults ends without an error, in about a minute."
    box, url = lab
    page, start = run_all(browser, f'{url}/lab/tree/nbs/{name}.ipynb')
    page.wait_for_function('document.querySelector("#jp-main-statusbar").innerText.includes("| Busy")', timeout=30_000)
    quiet = 0  # between two cells the kernel is idle for a moment
    while quiet < 6 and time.time() - start < 420:
        page.wait_for_timeout(500)
        still = page.evaluate('document.querySelector("#jp-main-statusbar").innerText.includes("| Idle") && !document.body.innerText.includes("[*]:")')
        quiet = quiet + 1 if still else 0
    took = time.time() - start
    shot(page, f'lab-{name}')
    page.click('text="File"'); page.click('text="Save Notebook"'); page.wait_for_timeout(2000)
    page.click('text="Kernel"'); page.click('text="Shut Down Kernel"'); page.wait_for_timeout(1000)
    cells = [c for c in json.loads((box/'nbs'/f'{name}.ipynb').read_text())['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
    errors = [''.join(c['source'])[:80] + ' → ' + o['ename'] for c in cells for o in c['outputs'] if o['output_type'] == 'error']
    page.close()
    assert not errors, errors
    assert all(c['execution_count'] for c in cells), f'not every cell was run ({took:.0f} s)'
    print(f'{name}: {took:.0f} s')


CHAT = '''from yothalia.chat import *
from yothalia.session import *
from yothalia.characters import *
from yothalia.sampling import *
from yothalia.rows import sample_rows
from yothalia.models import *
from dataclasses import replace
who = character_of([r for r in sample_rows() if r['character'] == 'queen-of-hearts'])
s = Session(Voice(load_model('smollm2-135m', 'fp32'), load_tokenizer('smollm2-135m')), who, 'Alice', sampling=replace(find_preset('lively'), max_tokens=40, seed=1))
chat_cell(s, 'talk.jsonl');'''


def test_chat_cell_in_jupyterlab(browser, lab):
    "A talk in a cell: the answer is seen growing, another try stands beside it, and the saved notebook can be read without a kernel."
    import nbformat
    box, url = lab
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CHAT)], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), box/'chat.ipynb')
    page, _ = run_all(browser, f'{url}/lab/tree/chat.ipynb')
    line = page.wait_for_selector('.jp-OutputArea input[type=text]', timeout=120_000)
    said = lambda: page.evaluate('document.querySelector(".jp-OutputArea-output.jp-RenderedHTML").innerText')
    hello = said(); assert hello.strip(), 'no greeting'
    line.fill('May I have a tart?'); line.press('Enter')
    seen = set()
    for _ in range(600):
        seen.add(said()); page.wait_for_timeout(100)
        if len(seen) > 3 and line.is_enabled(): break
    assert len({s for s in seen if s.startswith(hello) and 'tart' in s}) > 3, 'the answer was not seen growing'
    page.click('text=↻ again'); page.wait_for_function('document.body.innerText.includes("try 2 of 2")', timeout=60_000)
    page.wait_for_timeout(1000); page.click('.jp-OutputArea button:has-text("good")'); page.wait_for_function('document.querySelector(".jp-OutputArea-output.jp-RenderedHTML").innerText.includes("· good")', timeout=30_000)
    shot(page, 'lab-chat')
    page.click('text="File"'); page.click('text="Save Notebook"'); page.wait_for_timeout(2000)
    page.click('text="Kernel"'); page.click('text="Shut Down Kernel"'); page.wait_for_timeout(1000); page.close()
    html = json.dumps(json.loads((box/'chat.ipynb').read_text())['cells'][0]['outputs'], ensure_ascii=False)
    assert 'May I have a tart?' in html and 'try 2 of 2' in html and (box/'talk.jsonl').exists()
