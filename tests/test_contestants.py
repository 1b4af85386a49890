"""A model behind an address that fails in every way: what is kept, what is said, and how often it is asked."""
import json, os, socket, threading, time

import pytest, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from typer.testing import CliRunner

from yothalia.benchmark import BenchmarkConfig, benchmark
from yothalia.contestants import Contestant, ContestantError, allowed, contestant, forecast
from yothalia.core import configure, read_jsonl
from yothalia.rows import sample_rows
from yothalia.questions import make_tracks

os.environ['YOTHALIA_PROGRESS'] = 'off'


class Endpoint:
    "A server on this machine that answers each request as a function says: text, status, headers."
    def __init__(self, answer):
        self.asked, self.lock = [], threading.Lock()
        async def chat(request):
            body = json.loads(await request.body())
            with self.lock: self.asked.append(body); n = len(self.asked)
            got = answer(n, body)
            text, status, headers = got
            return Response(text, status, headers, media_type='application/json')
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route('/v1/chat/completions', chat, methods=['POST'])]), port=port, log_level='critical', ws='none'))
        threading.Thread(target=self.server.run, daemon=True).start()
        end = time.monotonic() + 20
        while not self.server.started and time.monotonic() < end: time.sleep(.01)
        self.url = f'http://127.0.0.1:{port}/v1'


def said(text, **more): return json.dumps(dict(id='x', object='chat.completion', created=0, model='m', usage=dict(prompt_tokens=7, completion_tokens=3, total_tokens=10),
    choices=[dict(index=0, finish_reason='stop', logprobs=None, message=dict(role='assistant', content=text))]) | more), 200, {}


def failed(status, text='no', **headers): return json.dumps(dict(error=dict(message=text, type='error', param=None, code=None))), status, headers


ONE = [dict(role='user', content='?')]


def raw_server(data: bytes, then_close=True):
    "An endpoint below HTTP: it sends some bytes and hangs up, or says nothing at all."
    s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(20)
    def serve():
        while True:
            try: c, _ = s.accept()
            except OSError: return
            c.recv(65536); c.sendall(data)
            if then_close: c.close()
    threading.Thread(target=serve, daemon=True).start()
    return f'http://127.0.0.1:{s.getsockname()[1]}/v1'


@pytest.mark.parametrize('bad', [failed(429, 'slow down', **{'Retry-After': '1'}), failed(500), failed(503), failed(408), ('{"choices": []}', 200, {}), ('<html>', 200, {})])
def test_waits_and_goes_on(bad):
    "What may pass is tried again, after the time that the server asks for."
    e = Endpoint(lambda n, body: bad if n == 1 else said('No.1')); start = time.monotonic()
    assert Contestant('openai:m', e.url, retries=3).send(ONE).message.content == 'No.1' and len(e.asked) == 2
    if 'Retry-After' in bad[2]: assert .9 < time.monotonic()-start < 10


@pytest.mark.parametrize('bad, says', [(failed(401), 'refuses the key'), (failed(403), 'does not allow'), (failed(404), 'has no model'), (failed(429, **{'Retry-After': '0'}), 'too many requests'),
                                       (failed(500), 'fails'), (('nonsense', 200, {}), 'nobody understands'), (('{"choices": [{}]}', 200, {}), 'nobody understands')])
def test_gives_up_with_a_sentence(bad, says):
    e = Endpoint(lambda n, body: bad)
    with pytest.raises(ContestantError, match=says): Contestant('openai:m', e.url, retries=1).send(ONE)
    assert len(e.asked) <= 6


def test_lines_that_break():
    whole = said('No.1')[0].encode(); head = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(whole)
    for url, says in ((raw_server(head + whole[:40]), 'breaks off'), (raw_server(b''), 'breaks off'), (raw_server(b'\0\1\2 no HTTP'), 'breaks off')):
        with pytest.raises(ContestantError, match=says): Contestant('openai:m', url, retries=1, timeout=5).send(ONE)
    start = time.monotonic()
    with pytest.raises(ContestantError, match='in time'): Contestant('openai:m', raw_server(b'', False), retries=0, timeout=1).send(ONE)
    assert time.monotonic()-start < 10


def questions(n=6): return dict(random=make_tracks([r for r in sample_rows() if r['lang'] == 'en'][:60], ['random'], n, 3, 0)['random'])


def settings(out, url, **kw):
    return configure(BenchmarkConfig, dict(out=str(out), model='openai:m', base_url=url, modes=['letter', 'generate'], letter_questions=0, generate_questions=0, options=3, parallel=3) | kw)


def test_resumes_and_asks_nothing_twice(tmp_path, monkeypatch):
    "It breaks down in the middle; what was answered is on disk, and a second try asks the rest."
    import yothalia.benchmark as b
    monkeypatch.setattr(b, 'described', lambda cfg: dict(step='benchmark', model=cfg.model, data_hash='x', options=3, split='none'))
    monkeypatch.setattr(b, 'save_rules', lambda *a, **k: dict(what=dict(mode='rules'), metrics={}))
    (tmp_path/'data').mkdir(); (tmp_path/'data/train.jsonl').write_text('')
    cured = threading.Event()
    def answer(n, body):
        if n > 20 and not cured.is_set(): return failed(500, 'gone')
        return failed(400, 'no response_format') if 'response_format' in body else said('I take No.1.')
    e, qs = Endpoint(answer), questions()
    cfg = settings(tmp_path, e.url)
    one, cfg2 = contestant(cfg, qs); one.client = one.client.with_options(max_retries=0)
    with pytest.raises(ContestantError, match='kept'): benchmark(cfg2, one, None, qs)
    lines = read_jsonl(tmp_path/'records'/'benchmark-random-letter-base.questions.jsonl'); assert 0 < len(lines) < 6
    cured.set(); before = len(e.asked)
    two, cfg3 = contestant(cfg, qs); records = benchmark(cfg3, two, None, qs)
    asked = [b['messages'][0]['content'] for b in e.asked[before:] if not b.get('logprobs') and 'response_format' not in b]
    rotations = 3*6*2 + 6*2  # letter in all orders, generate; base and prompt
    assert rotations - 3*len(lines) - 3 <= len(asked) <= rotations - 3*len(lines) + 3
    done = [r for r in records if r['what']['mode'] != 'rules']
    assert {r['what']['rung'] for r in done} == {'text'} and {r['what']['mode'] for r in done} == {'letter', 'generate'}
    assert all(r['metrics']['requests']['value'] > 0 for r in done)


def test_logprobs_ignored_and_nonsense_between():
    "An endpoint that ignores what it does not know, and now and then says anything at all: a format error, not a crash."
    qs = questions(4)['random']
    e = Endpoint(lambda n, body: said('What a lovely day!') if n % 4 == 0 else said('No.2, my dear.'))
    c = Contestant('openai:m', e.url, parallel=2)
    got = dict(c.ask_mode('letter', qs, BenchmarkConfig(), frozenset(), True))
    assert c.rung == 'text' and sorted(got) == [0, 1, 2, 3] and all(o['unread'] <= 1 for o in got.values())
    assert not any(b.get('logprobs') for b in e.asked[1:]) and sum('response_format' in b for b in e.asked) == 1


def test_costs_are_told_before(tmp_path, monkeypatch):
    monkeypatch.setenv('YOTHALIA_API_KEY', 'not a real one')
    qs = questions()
    far = settings(tmp_path, 'https://example.org/v1')
    with pytest.raises(ContestantError, match="prices"): allowed(far, forecast(far, qs))
    dear = settings(tmp_path, 'https://example.org/v1', price=[500., 900.], most_cost=.01)
    with pytest.raises(ContestantError, match='most_cost'): allowed(dear, forecast(dear, qs))


def test_keys_stay_here(monkeypatch, tmp_path):
    "OpenAI's key goes to OpenAI only; no key is written down."
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-of-openai'); monkeypatch.delenv('YOTHALIA_API_KEY', raising=False)
    e = Endpoint(lambda n, body: said('No.1')); c = Contestant('openai:m', e.url)
    assert c.client.api_key == 'none'
    with pytest.raises(ContestantError, match='YOTHALIA_API_KEY'): Contestant('openai:m', 'https://example.org/v1')
    with pytest.raises(ContestantError, match='no key or password'): Contestant('openai:m', 'https://a:b@example.org/v1')


def test_command(monkeypatch):
    "From the command line: only what can be done with it is planned, the rest is refused in one sentence."
    from yothalia.commands import app
    from yothalia.runner import plan
    assert list(plan({}, ['model=openai:m'])) == ['01_data', '04_benchmark']
    got = CliRunner().invoke(app, ['run', '-p', 'model=openai:m', '--steps', '01_data,02_lora', '--name', 'never'])
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    early = CliRunner().invoke(app, ['run', '-p', 'model=openai:m', '--name', 'never'])
    assert early.exit_code == 1 and 'OPENAI_API_KEY is not set' in ' '.join(early.output.split())
    assert got.exit_code == 1 and '02_lora cannot be done with a model behind an address' in ' '.join(got.output.split())
