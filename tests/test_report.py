"""The report in a real Chromium: from the disk, without a network, wide and on a phone, light and dark; by the shipped records."""
import json, os, shutil
from pathlib import Path

import pytest

from yothalia.core import load_records, read_jsonl, save_record, write_jsonl
from yothalia.report import MOST, write_report

ROOT = Path(__file__).parent.parent
CHROME = shutil.which('chromium') or shutil.which('google-chrome')
SHOTS = os.environ.get('YOTHALIA_SHOTS')  # a folder for screenshots, to be looked at


@pytest.mark.parametrize('name', sorted(p.name for p in (ROOT/'results').iterdir() if p.is_dir()))
def test_of_each_folder(name, tmp_path):
    "Every folder of records gives a file that can be sent, and whose sections have words for each picture."
    page = write_report(ROOT/'results'/name, str(tmp_path/'r.html')).read_text(encoding='utf-8')
    assert len(page.encode()) < MOST and page.count('<svg') == page.count('role="img" aria-label="')
    data = json.loads(page.split('id="data">')[1].split('</script>')[0])
    assert all(0 <= q['answer'] < len(q['choices']) and max(q['choices']) < len(data['texts']) for q in data['asked'])


def test_thinned(tmp_path):
    "A run of very many replies is thinned evenly until it can be sent, and the page says so."
    r = next(r for r in load_records(ROOT/'results/sample', step='replies') if r['what']['condition'] == 'both')
    lines = [o | dict(user=f'{o["user"]} {k}', reply=o['reply']*4) for k in range(60) for o in read_jsonl(r['path'].parent/r['questions'])]
    save_record(tmp_path/'replies-both.json', r['what'], r['metrics'], r['run']['params'], write_jsonl(tmp_path/'l.jsonl', lines))
    page = write_report(tmp_path).read_text(encoding='utf-8')
    assert len(page.encode()) < MOST/2 and 'spread evenly' in page and f'of {60*36:,}' in page


@pytest.fixture(scope='module')
def chromium():
    if not (CHROME and os.environ.get('YOTHALIA_TEST_BROWSER')): pytest.skip('make test-browser runs these, where Chromium is installed')
    playwright = pytest.importorskip('playwright.sync_api', reason='make test-browser installs playwright')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox'])
        yield b
        b.close()


@pytest.fixture
def opened(chromium, tmp_path):
    "The sample's report, and one line in it that wants to be more than text."
    folder = tmp_path/'sample'; shutil.copytree(ROOT/'results/sample', folder)
    file = folder/'replies-both.lines.jsonl'; lines = read_jsonl(file)
    lines[0] |= dict(reply='</script><img src=x onerror="document.title=`hacked`">'); write_jsonl(file, lines)
    tab = chromium.new_page(); tab.wrong = []
    tab.on('console', lambda m: tab.wrong.append(m.text)); tab.on('pageerror', lambda e: tab.wrong.append(str(e)))
    tab.on('request', lambda r: r.url.startswith('file:') or tab.wrong.append(r.url))
    tab.goto(write_report(folder).as_uri())
    yield tab
    assert not tab.wrong and tab.title() == 'sample'
    tab.close()


def test_looked_through(opened):
    "Lines by character, questions by what went wrong, page by page; text stays text."
    heard, asked = opened.locator('#heard'), opened.locator('#asked')
    assert heard.locator('.card').count() == 3 and '1 to 3 of 36' in heard.inner_text() and heard.locator('img').count() == 0
    heard.get_by_label('character').select_option('baba-yaga'); heard.get_by_label('language').select_option('en')
    assert heard.locator('.card').count() == 3 and all('baba-yaga, en' in t for t in heard.locator('.card h3').all_inner_texts())
    assert any('another hand' in t for t in heard.locator('.card').all_inner_texts())
    asked.get_by_label('which').select_option('fine-tuning mends'); n = int(asked.locator('.turn span').inner_text().split(' of ')[1])
    got = {r['what']['condition']: r for r in load_records(ROOT/'results/sample', step='benchmark', track='speaker')}
    def took(c): return {o['id']: max(range(5), key=o['sum'].__getitem__) == o['answer'] for o in read_jsonl(got[c]['path'].parent/got[c]['questions'])}
    before, after = took('prompt'), took('both')
    asked.get_by_label('track').select_option('speaker'); n = int(asked.locator('.turn span').inner_text().split(' of ')[1])
    assert n == sum(after[i] and not before[i] for i in before) > 0
    assert asked.locator('.card').first.locator('li.right span').all_inner_texts().count('both') == 1
    asked.get_by_role('button', name='next').click(); assert asked.locator('.turn span').inner_text().startswith('4 to ') or n <= 3


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1200, 390])
def test_seen(opened, scheme, width):
    "Nothing runs out of the page, and a picture's writing has the colour of the page's."
    opened.set_viewport_size(dict(width=width, height=844)); opened.emulate_media(color_scheme=scheme)
    assert opened.evaluate('document.documentElement.scrollWidth') <= width
    page = opened.evaluate('getComputedStyle(document.body).color')
    assert opened.evaluate('getComputedStyle(document.querySelector("svg text")).fill') == page
    if SHOTS: Path(SHOTS).mkdir(parents=True, exist_ok=True); opened.screenshot(path=f'{SHOTS}/report-{scheme}-{width}.png', full_page=True)


@pytest.mark.skipif(not os.environ.get('YOTHALIA_AXE'), reason='YOTHALIA_AXE names no axe.min.js (npm pack axe-core)')
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_read_aloud(opened, scheme):
    "What axe-core looks for: names, roles, contrast, in both colour schemes."
    opened.emulate_media(color_scheme=scheme); opened.evaluate(Path(os.environ['YOTHALIA_AXE']).read_text())
    found = opened.evaluate("axe.run(document, {resultTypes: ['violations']})")['violations']
    assert not found, [(v['id'], v['help'], [n['html'][:100] for n in v['nodes']]) for v in found]
