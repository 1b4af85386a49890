"""Programs that people talk with, as they come: each is started for real and holds a talk with the server. `YOTHALIA_NODE` names a folder where the packages of NODE are installed by npm, `YOTHALIA_CLIENTS` the Python of an environment with those of PYTHON, `YOTHALIA_WEBUI` the command open-webui of another one."""
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NODE, CLIENTS, WEBUI = (os.environ.get(f'YOTHALIA_{k}') for k in ('NODE', 'CLIENTS', 'WEBUI'))
CHROME = shutil.which('chromium') or shutil.which('google-chrome')
SHOTS = os.environ.get('YOTHALIA_SHOTS')
WHO, LINE = 'baba-yaga', 'Good morning! What is in your pot?'

# package → what it prints: a reply for each way of asking, as a list in JSON
NODE_CLIENTS = {
    'openai': """import OpenAI from 'openai'
const c = new OpenAI({baseURL: url + '/v1', apiKey: 'none'}), messages = [{role: 'user', content: line}], out = []
out.push((await c.chat.completions.create({model, messages, max_tokens: 8})).choices[0].message.content)
let s = ''; for await (const e of await c.chat.completions.create({model, messages, max_tokens: 8, stream: true, stream_options: {include_usage: true}})) s += e.choices[0]?.delta?.content ?? ''
out.push(s, (await c.responses.create({model, input: line, max_output_tokens: 8})).output_text)
s = ''; for await (const e of await c.responses.create({model, input: line, max_output_tokens: 8, stream: true})) if (e.type === 'response.output_text.delta') s += e.delta
out.push(s); console.log(JSON.stringify(out))""",
    '@ai-sdk/openai-compatible': """import {generateText, streamText} from 'ai'
import {createOpenAICompatible} from '@ai-sdk/openai-compatible'
const p = createOpenAICompatible({name: 'yothalia', baseURL: url + '/v1'})
let s = ''; for await (const t of streamText({model: p(model), prompt: line, maxOutputTokens: 8}).textStream) s += t
console.log(JSON.stringify([(await generateText({model: p(model), prompt: line, system: 'A kitchen at night.', maxOutputTokens: 8})).text, s]))""",
    'ollama': """import {Ollama} from 'ollama'
const o = new Ollama({host: url}), messages = [{role: 'user', content: line}], options = {num_predict: 8}
let s = ''; for await (const e of await o.chat({model, messages, options, stream: true})) s += e.message.content
console.log(JSON.stringify([(await o.chat({model, messages, options})).message.content, s, (await o.generate({model, prompt: line, options})).response, (await o.list()).models[0].name]))""",
    '@langchain/openai': """import {ChatOpenAI} from '@langchain/openai'
const l = new ChatOpenAI({model, apiKey: 'none', maxTokens: 8, configuration: {baseURL: url + '/v1'}})
let s = ''; for await (const e of await l.stream(line)) s += e.content
console.log(JSON.stringify([(await l.invoke(line)).content, s]))"""}

PYTHON_CLIENTS = {
    'litellm': """import litellm
how = dict(api_base=url+'/v1', api_key='none', max_tokens=8); m = [dict(role='user', content=line)]
out = [litellm.completion(model=f'openai/{model}', messages=m, **how).choices[0].message.content,
       ''.join(e.choices[0].delta.content or '' for e in litellm.completion(model=f'openai/{model}', messages=m, stream=True, **how)),
       litellm.text_completion(model=f'text-completion-openai/{model}', prompt=line, **how).choices[0].text,
       litellm.completion(model=f'ollama_chat/{model}', api_base=url, messages=m, max_tokens=8).choices[0].message.content]""",
    'langchain_openai': """from langchain_openai import ChatOpenAI
l = ChatOpenAI(model=model, base_url=url+'/v1', api_key='none', max_tokens=8)
out = [l.invoke(line).content, ''.join(e.content for e in l.stream(line))]""",
    'langchain_ollama': """from langchain_ollama import ChatOllama
l = ChatOllama(model=model, base_url=url, num_predict=8)
out = [l.invoke(line).content, ''.join(e.content for e in l.stream(line))]""",
    'pydantic_ai': """from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
out = [Agent(OpenAIChatModel(model, provider=OpenAIProvider(base_url=url+'/v1', api_key='none')), model_settings=dict(max_tokens=8)).run_sync(line).output]"""}


def answers(url, p=None, seconds=120):
    end = time.monotonic() + seconds
    while True:
        try: urllib.request.urlopen(url, timeout=2).read(); return
        except OSError:
            assert (p is None or p.poll() is None) and time.monotonic() < end, 'it does not answer'
            time.sleep(.3)


def port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


@pytest.fixture(scope='module')
def box(tmp_path_factory):
    "A run with the shipped sample, and what is written for front ends."
    box = tmp_path_factory.mktemp('clients')
    for name in ('nbs', 'yothalia', 'runs'): (box/name).symlink_to(ROOT/name)
    for f in ('settings.ini', 'README.md'): shutil.copy(ROOT/f, box/f)
    from yothalia.data import DataConfig, prepare
    os.environ['YOTHALIA_ROOT'] = str(box)
    try: prepare(DataConfig(data='sample', out='_runs/page'))
    finally: del os.environ['YOTHALIA_ROOT']
    return box


@pytest.fixture(scope='module')
def url(box):
    "The run, served by the command."
    at = port()
    env = os.environ | dict(YOTHALIA_ROOT=str(box), PYTHONPATH=str(ROOT))
    p = subprocess.Popen([sys.executable, '-c', 'from yothalia.commands import app; app()', 'serve', 'page', '--port', str(at), '--new-tokens', '24'],
                         cwd=box, env=env, stdout=(box/'serve.log').open('w'), stderr=subprocess.STDOUT)
    answers(f'http://127.0.0.1:{at}/health', p)
    yield f'http://127.0.0.1:{at}'
    p.terminate(); p.wait(30)


def told(cmd, **kw):
    got = subprocess.run(cmd, capture_output=True, text=True, timeout=200, **kw)
    assert got.returncode == 0, got.stderr[-3000:]
    said = json.loads(got.stdout.splitlines()[-1])
    assert said and all(s.strip() for s in said), said


@pytest.mark.skipif(not NODE, reason=f'YOTHALIA_NODE names no folder with {", ".join(NODE_CLIENTS)}')
@pytest.mark.parametrize('client', NODE_CLIENTS)
def test_node(client, url, tmp_path):
    (tmp_path/'node_modules').symlink_to(Path(NODE)/'node_modules')
    (tmp_path/'talk.mjs').write_text(f'const [url, model, line] = process.argv.slice(2)\n{NODE_CLIENTS[client]}')
    told(['node', 'talk.mjs', url, WHO, LINE], cwd=tmp_path)


@pytest.mark.skipif(not CLIENTS, reason=f'YOTHALIA_CLIENTS names no Python with {", ".join(PYTHON_CLIENTS)}')
@pytest.mark.parametrize('client', PYTHON_CLIENTS)
def test_python(client, url):
    if subprocess.run([CLIENTS, '-c', f'import {client}'], capture_output=True).returncode: pytest.skip(f'{client} is not installed there')
    told([CLIENTS, '-c', f'import json, sys\nurl, model, line = sys.argv[1:]\n{PYTHON_CLIENTS[client]}\nprint(json.dumps(out))', url, WHO, LINE],
         env=os.environ | dict(LITELLM_LOCAL_MODEL_COST_MAP='True'))


@pytest.fixture
def tavern(tmp_path):
    "A SillyTavern of its own."
    place, at = Path(NODE)/'node_modules/sillytavern', port()
    p = subprocess.Popen(['node', 'server.js', '--port', str(at), '--dataRoot', str(tmp_path/'data'), '--configPath', str(tmp_path/'config.yaml'), '--browserLaunchEnabled', 'false'],
                         cwd=place, stdout=(tmp_path/'log').open('w'), stderr=subprocess.STDOUT)
    answers(f'http://127.0.0.1:{at}/', p, 200)
    yield f'http://127.0.0.1:{at}/'
    p.terminate(); p.wait(30)


@pytest.mark.skipif(not (NODE and CHROME and (Path(NODE)/'node_modules/sillytavern').is_dir()), reason='YOTHALIA_NODE holds no sillytavern, or there is no Chromium')
def test_sillytavern(tavern, url, box):
    "The preset and the card that are written for it are imported as FRONTENDS.txt says; a talk, a second try, and a line that goes on."
    playwright = pytest.importorskip('playwright.sync_api')
    os.environ['YOTHALIA_ROOT'] = str(box)
    try:
        from yothalia.export import write_frontends
        made = {p.suffix: p for p in write_frontends('_runs/page', f'{url}/v1') if p.stem == WHO}
    finally: del os.environ['YOTHALIA_ROOT']
    with playwright.sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=CHROME, args=['--no-sandbox'])
        t = b.new_page(viewport=dict(width=1400, height=900))
        def agree(text=None, wait=3000):
            try: (t.get_by_text(text) if text else t.locator('.popup-button-ok:visible').first).click(timeout=wait)
            except playwright.TimeoutError: pass
        def replies(n, unlike='', seconds=90): # all that is said, when nothing has been added for three seconds
            was, since = None, time.monotonic()
            while time.monotonic() < since + 3 or was is None or len(was) != n or was[-1] in ('', '...', unlike):
                said = [m.inner_text().strip() for m in t.locator('#chat .mes[is_user="false"] .mes_text').all()]
                assert (seconds := seconds-.5) > 0, said
                if said != was: was, since = said, time.monotonic()
                t.wait_for_timeout(500)
            return was
        t.goto(tavern); t.locator('.popup-button-ok:visible').first.click(timeout=60_000)
        t.locator('#API-status-top').click()
        t.select_option('#main_api', 'openai'); t.select_option('#chat_completion_source', 'custom')
        t.set_input_files('#openai_preset_import_file', made['.json']); agree('Import as-is', 60_000); agree()
        t.wait_for_function(f"document.querySelector('#custom_api_url_text').value === '{url}/v1'", timeout=60_000)
        assert t.input_value('#custom_model_id') == WHO
        t.locator('#api_button_openai:visible').click()
        t.wait_for_function("[...document.querySelectorAll('.online_status_text')].some(e => e.textContent.trim() === 'Valid')", timeout=60_000)
        t.locator('#API-status-top').click(); t.locator('#rightNavDrawerIcon').click()
        t.set_input_files('#character_import_file', made['.png']); agree()
        t.locator('.character_select').first.click(); t.wait_for_timeout(2000)
        n = t.locator('#chat .mes[is_user="false"]').count() # a greeting, where the card has one
        t.fill('#send_textarea', LINE); t.locator('#send_but').click()
        first = replies(n+1)[-1]
        t.locator('.last_mes .swipe_right').click()
        before = replies(n+1, first)[-1]
        t.locator('#options_button').click(); t.locator('#option_continue').click(); t.wait_for_timeout(1500)
        after = replies(n+1, before)[-1]
        if SHOTS: Path(SHOTS).mkdir(parents=True, exist_ok=True); t.screenshot(path=f'{SHOTS}/sillytavern.png')
        assert after.startswith(before.rstrip()[:40]), (before, after)
        b.close()


@pytest.mark.skipif(not WEBUI, reason='YOTHALIA_WEBUI names no open-webui')
@pytest.mark.parametrize('by', ['openai', 'ollama'])
def test_open_webui(by, url, tmp_path):
    "Open WebUI by either API: the characters are its models, and one of them answers."
    import httpx
    at, off = port(), dict(ENABLE_OLLAMA_API='False', ENABLE_OPENAI_API='False')
    env = os.environ | off | dict(DATA_DIR=str(tmp_path), WEBUI_AUTH='False', HF_HUB_OFFLINE='1', OFFLINE_MODE='True', RAG_EMBEDDING_MODEL='', **(
        dict(ENABLE_OPENAI_API='True', OPENAI_API_BASE_URL=f'{url}/v1', OPENAI_API_KEY='none') if by == 'openai' else dict(ENABLE_OLLAMA_API='True', OLLAMA_BASE_URL=url)))
    env.pop('PYTHONPATH', None)
    p = subprocess.Popen([WEBUI, 'serve', '--host', '127.0.0.1', '--port', str(at)], cwd=tmp_path, env=env, stdout=(tmp_path/'log').open('w'), stderr=subprocess.STDOUT)
    try:
        answers(f'http://127.0.0.1:{at}/health', p, 300)
        c = httpx.Client(base_url=f'http://127.0.0.1:{at}', timeout=120)
        c.headers['Authorization'] = 'Bearer ' + c.post('/api/v1/auths/signin', json=dict(email='', password='')).json()['token']
        models = [m['id'] for m in c.get('/api/models').json()['data']]
        who = next(m for m in models if m.startswith(WHO))
        got = c.post('/api/chat/completions', json=dict(model=who, messages=[dict(role='user', content=LINE)], stream=False)).json()
        assert got['choices'][0]['message']['content'].strip(), got
    finally: p.terminate(); p.wait(60)
