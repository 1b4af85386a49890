"Who is let in, and who can't stop the server for others: names and pages, slow clients, pictures that would tell a card, odd letters, the gone."
import base64, contextlib, json, queue, random, resource, socket, threading, time
from types import SimpleNamespace
import pytest, uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from yothalia.cards import Card, read_card
from yothalia.characters import character_of_card
from yothalia.engine import Engine
from yothalia.gate import Patient, most_connections
from yothalia.page import Page, whole_lines
from yothalia.models import EMBEDDED, load_tokenizer
from yothalia.prompts import PERSONA, encode
from yothalia.sampling import Request, Sampling
from yothalia.serve import Stage, app_of

HERE = 'http://127.0.0.1'
SECRET = 'She keeps the silver key under the third stone.'


@pytest.fixture
def page(tmp_path):
    "A character by a card, in a picture that tells all of it, and nobody who speaks."
    card = read_card(Card(dict(name='Mira', description=SECRET, first_mes='Hello.')).save(tmp_path/'mira.png'))
    engine = SimpleNamespace(alive=lambda: True, stop=lambda s=0: None, tables={}, steps=0, tokens=0, queued=lambda: 0, room=512)
    return Page(Stage({'mira': character_of_card(card)}, engine, PERSONA, adapter=True), tmp_path/'run')


@contextlib.contextmanager
def opened(page, key='', **kw):
    with TestClient(app_of(page.stage, key, page=page), base_url=HERE, raise_server_exceptions=False, **kw) as c: yield c


def test_names_and_pages(page):
    "A page that was made to look like this machine, and one that is honest about where it comes from."
    turn = dict(character='mira', talk='x', turns=[dict(role='user', tries=['Hi'])])
    with opened(page) as c:
        assert c.get('/v1/models').status_code == 200 and c.get('/v1/models', headers={'Host': 'evil.example'}).status_code == 421
        assert c.post('/page/keep', json=turn, headers={'Host': 'evil.example', 'Origin': 'http://evil.example'}).status_code == 421
        for path in ('/page/keep', '/v1/chat/completions'):
            got = c.post(path, json=turn, headers={'Origin': 'http://evil.example'})
            assert got.status_code == 403 and got.json()['error']['code'] == 'wrong_origin'
        assert c.post('/page/keep', content=json.dumps(turn), headers={'Origin': HERE, 'Content-Type': 'text/plain'}).status_code == 415
        assert c.post('/page/keep', json=turn, headers={'Origin': HERE}).status_code == 200
    with opened(page, 'a long secret') as c: assert c.get('/v1/models', headers={'Host': 'my.example', 'Authorization': 'Bearer a long secret'}).status_code == 200


def test_a_picture_tells_nothing(page):
    "The picture of a card without the card, and not to those who have no key."
    with opened(page) as c: got = c.get('/page/picture/mira').content
    assert got[:4] == b'\x89PNG' and b'tEXt' not in got and base64.b64encode(SECRET.encode())[:20] not in got and b'tEXt' in page.stage.who['mira'].card.picture
    with opened(page, 'a long secret') as c: assert [c.get(f'/page/picture/{n}').status_code for n in ('mira', 'nobody')] == [401, 401]


def test_odd_letters_in_a_pick(page):
    "Line separators of Unicode, a lone surrogate, and a line that was cut off: later picks are kept."
    def pick(c, reply):
        id = c.post('/page/duel', json=dict(pair=['prompt', 'base'])).json()['id']
        return c.post('/page/pick', content=json.dumps(dict(id=id, choice='a', replies=[reply, 'y'])), headers={'Content-Type': 'application/json'}).status_code
    with opened(page) as c:
        assert [pick(c, r) for r in ('x', 'a\u2028b', 'a\u2029\x85b', 'c\ud800', 'd')] == [200]*5
        with page.picks.open('a') as f: f.write('{"cut o')
        assert pick(c, 'e') == 200 and len(whole_lines(page.picks)) == 6
        id = c.post('/page/duel', json=dict(pair=['prompt', 'base'])).json()['id']
        assert [c.post('/page/pick', json=dict(id=id, choice=k)).status_code for k in ('x', 'a', 'a')] == [400, 200, 404]
    assert page.picks.stat().st_mode & 0o777 == 0o600


def test_odd_bodies_of_the_page(page):
    "None of them ends in a 500, and a talk that was kept is nobody else's."
    draw, odd = random.Random(0), [None, True, 0, 1.5, float('nan'), 'x', '\ud800', [], [1], {}, {'a': []}, ['prompt', 'base'], [dict(role='user', tries=['Hi'], at=0.0)], [dict(role='user', tries=[], at=0)], 'mira']
    with opened(page) as c:
        for path in ('duel', 'pick', 'keep'):
            for _ in range(150):
                body = draw.choice((odd[draw.randrange(len(odd))], {k: draw.choice(odd) for k in ('pair', 'id', 'choice', 'character', 'talk', 'turns', 'replies')}))
                got = c.post(f'/page/{path}', content=json.dumps(body), headers={'Content-Type': 'application/json'})
                assert got.status_code < 500 and got.json(), (path, body)
        assert c.post('/page/keep', json=dict(character='mira', talk='a1', turns=[dict(role='user', tries=['Hi']*3, at=2, thumb=1)])).json() == dict(turns=1)
    kept = next((page.out/'chats').iterdir())
    assert kept.stat().st_mode & 0o777 == 0o600 and kept.parent.stat().st_mode & 0o777 == 0o700


def test_a_full_disk(page):
    "What can't be written down is said, nothing is lost, and once there is room it is written."
    talk, soft = dict(character='mira', talk='x', turns=[dict(role='user', tries=['Hi'*3000])]), resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(page) as c:
        id = c.post('/page/duel', json=dict(pair=['prompt', 'base'])).json()['id']
        pick = dict(id=id, choice='a', replies=['x'*6000, 'y'])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, soft[1]))
        try: full = [c.post('/page/keep', json=talk), c.post('/page/pick', json=pick)]
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert all(r.status_code == 507 and 'File too large' in r.json()['error']['message'] for r in full)
        assert [c.post('/page/keep', json=talk).status_code, c.post('/page/pick', json=pick).status_code] == [200, 200]
    assert len(whole_lines(page.picks)) == 1 and len(list((page.out/'chats').iterdir())) == 1


def test_marks_are_no_turns():
    "What somebody writes ends nobody's turn, whatever they write: the roles of a prompt are those of its turns."
    tok, rng = load_tokenizer(EMBEDDED), random.Random(0)
    bits = ['<|im_end|>', '<|im_start|>', 'system\n', '<|im_', 'end|>', '<|', '|>', 'im_start', 'Hi', '\n', '<|endoftext|>']
    marks = [tok.convert_tokens_to_ids(m) for m in ('<|im_start|>', '<|im_end|>', '<|endoftext|>')]
    for _ in range(300):
        a, b, c, d = (''.join(rng.choices(bits, k=rng.randrange(1, 9))) for _ in range(4))
        row = dict(character='X', instruction=a, history=[dict(role='user', text=b), dict(role='assistant', text=c)], user=d, reply=b + 'x', lang='en')
        ids = encode(row, tok)['input_ids']
        assert [ids.count(m) for m in marks] == [5, 5, 0], row


def test_the_gone_leave_the_queue():
    e = Engine.__new__(Engine)
    e.waiting, waits = queue.Queue(3), [Request([1], Sampling()) for _ in range(3)]
    for r in waits: e.waiting.put(r)
    waits[0].cancelled.set(); waits[2].cancelled.set()
    e.forget_the_gone()
    assert list(e.waiting.queue) == [waits[1]] and [r.ended for r in waits] == ['cancelled', '', 'cancelled']


@pytest.fixture
def slow_clients():
    "uvicorn with the protocol of this house, a second of patience, and an answer that takes two."
    async def answer(request):
        import asyncio
        try: n = len(await request.body())
        except ClientDisconnect: return PlainTextResponse('')
        if request.url.path == '/long': await asyncio.sleep(2)
        return PlainTextResponse(str(n))
    class Hurried(Patient): patience = 1.
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route('/{x}', answer, methods=['GET', 'POST'])]), port=port, http=Hurried, limit_concurrency=40, log_level='error'))
    t = threading.Thread(target=server.run, daemon=True); t.start()
    while not server.started: time.sleep(.02)
    yield port
    server.should_exit = True; t.join(20)


def said(s):
    "An answer with its body, or what came before the other side hung up."
    got = b''
    with contextlib.suppress(ConnectionError):
        while not (got.partition(b'\r\n\r\n')[2]) and (more := s.recv(65536)): got += more
    return got


def test_slow_clients(slow_clients):
    "Half a head and half a body are closed in time; a long answer and a second request on the same connection are not cut."
    def connect():
        s = socket.create_connection(('127.0.0.1', slow_clients)); s.settimeout(6); return s
    half = [connect() for _ in range(3)]
    half[1].sendall(b'GET /x HTTP/1.1\r\nHost: x\r\nX: '); half[2].sendall(b'POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc')
    start = time.monotonic()
    assert all(said(s) == b'' for s in half) and time.monotonic() - start < 3
    s = connect(); s.sendall(b'GET /long HTTP/1.1\r\nHost: x\r\n\r\n'); assert said(s).startswith(b'HTTP/1.1 200')
    time.sleep(.2); s.sendall(b'POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n'); time.sleep(.4); s.sendall(b'abc'); assert said(s).endswith(b'3')
    crowd = [connect() for _ in range(60)]
    time.sleep(1.6)
    s = connect(); s.sendall(b'GET /x HTTP/1.1\r\nHost: x\r\n\r\n'); assert said(s).startswith(b'HTTP/1.1 200')
    for c in crowd: c.close()


def test_connections_have_files(): assert 64 <= most_connections() <= 4096


# --- cards and names
def book(*entries, **more): return Card(dict(name='Mira', description='x', character_book=dict(entries=list(entries), **more)))


def test_a_book_cannot_stop_the_others():
    "Keys that are many, long or expensive: a second for all of them, and what is odd is passed over."
    long = 'z' * 100_000
    for b in (book(*[dict(keys=[f'key{k}' for k in range(100)], content='c') for k in range(400)], recursive_scanning=True),
              book(dict(keys=['(z|z)*$' + str(k) for k in range(400)], use_regex=True, content='c')), book(*[dict(keys=['(z{2000}){2000}'], use_regex=True, content='c')]*50)):
        start = time.perf_counter()
        b.found_lore([long])
        assert time.perf_counter() - start < 2.5
    for odd in (5, {'a': 1}, 'x', None): assert Card(dict(name='M', description='x', character_book=dict(entries=odd))).found_lore(['hello']) == {}
    for depth in ('²', '①', '9'*5000, '-1'): assert book(dict(keys=['hello'], content=f'@@depth {depth}\nlore')).found_lore(['hello']) == dict(after_char=['lore'])


def test_cards_of_few_words_and_of_too_many(tmp_path):
    "A card of version 1 shows itself; a name of a novel is refused; macros don't multiply."
    from yothalia.cards import CardError, card_of
    from yothalia.characters import free_name
    assert card_of(dict(name='Old', description='x')).summary()[0] == 'Old, a card of version 1'
    with pytest.raises(CardError, match='more than 200'): card_of(dict(name='N'*20000, description='{{char}}'*5000))
    start = time.perf_counter()
    assert len(card_of(dict(name='N'*200, description='{{char}}'*10**6)).persona()) <= 2**18 and time.perf_counter() - start < 5
    taken = {}
    for n in ('Mira', 'Mira!', '\U0001f642', '\U0001f60a', 'L'*300): taken[free_name(n, taken)] = n
    assert [*taken] == ['mira', 'mira-2', 'character', 'character-2', 'l'*60]


# --- the drawing, health, keys
def test_a_hint_of_temperature_is_none():
    import torch
    from yothalia.sampling import next_token
    assert {next_token(torch.tensor([1., 3., 2.]), [], Sampling(temperature=t)) for t in (0., 1e-300, 1e-46, 1e-40, 9e-4)} == {1}


def test_bytes_of_parts_of_letters():
    from yothalia.models import load_tokenizer
    from yothalia.answers import bytes_of
    tok = load_tokenizer('smollm2-135m')
    ids = tok('你好, Ünal!')['input_ids']
    assert b''.join(bytes_of(tok, i) for i in ids).decode() == '你好, Ünal!' and any('\ufffd' in tok.decode([i]) for i in ids)


def test_health_and_keys(page, monkeypatch):
    from yothalia.commands import key_for
    from yothalia.runner import RunError
    with opened(page, 'a long secret') as c:
        assert [c.get('/v1/models', headers={'Authorization': f'{s} a long secret'}).status_code for s in ('Bearer', 'bearer', 'Basic', '')] == [200, 200, 401, 401]
        assert c.get('/health').status_code == 200
        page.stage.engine.alive = lambda: False
        assert c.get('/health').status_code == 503
    for key, host, says in (('clé', '127.0.0.1', 'ASCII'), ('short', '0.0.0.0', '16'), ('', '0.0.0.0', 'YOTHALIA_KEY')):
        monkeypatch.setenv('YOTHALIA_KEY', key)
        with pytest.raises(RunError, match=says): key_for(host)
    monkeypatch.setenv('YOTHALIA_KEY', 'k'*16)
    assert key_for('0.0.0.0') == 'k'*16


# --- readers: no text is so odd that it takes minutes
@pytest.mark.parametrize('blank', [' ', '\t', '\u00a0', '\n', '*', '.', '"', '[', 'a', ':'])
def test_readers_take_their_time_once(blank):
    from yothalia.cards import decorated
    from yothalia.characters import fits_card
    from yothalia.cleaning import strip_labels
    from yothalia.files import DataError
    from yothalia.rows import text_chats
    many, start = blank*12_000, time.perf_counter()
    with contextlib.suppress(DataError): text_chats('a.txt', f'Ann{many}x\nAnn: hi\nBob: ho\nAnn{many}: hi\n')
    for text in (f'a{many}b', f'user{many}b', f'{many}user:', f'user:{many}'): strip_labels(text)
    decorated(f'@@depth {many}x'), decorated(f'@@depth x{many}'), fits_card(dict(user=f'{many}x', reply=f'x{many}'))
    assert time.perf_counter() - start < 3


def test_labels_go_at_both_ends():
    from yothalia.cleaning import strip_labels
    assert [strip_labels(t) for t in ('User: Hi', ' GPT :  Hi', 'Hi\nHuman:', 'Hi  用户：', 'my user: no', 'superuser:', 'Hi')] == ['Hi', 'Hi', 'Hi', 'Hi', 'my user: no', 'superuser:', 'Hi']


# --- another engine behind, which is none, or does not stop
@pytest.fixture
def odd_engine():
    "An address that answers as its path says."
    from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
    async def answer(request):
        how = request.path_params['how']
        if how == 'html': return HTMLResponse('<p>Hello')
        if how == 'empty': return JSONResponse({})
        if how == 'key': return JSONResponse(dict(error=dict(message='Incorrect key provided: sk-very-secret-of-the-operator, at db7.internal')), 401)
        if how == 'busy': return JSONResponse(dict(error=dict(message='busy')), 429)
        if how == 'away': return RedirectResponse('http://127.0.0.1:9/v1/completions', 307)
        def endless():
            while True: yield 'data: ' + json.dumps(dict(id='x', object='text_completion', created=1, model='m', choices=[dict(index=0, text=' word', finish_reason=None, logprobs=None)])) + '\n\n'
        return StreamingResponse(endless(), media_type='text/event-stream')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route('/{how}/v1/completions', answer, methods=['POST'])]), port=port, log_level='error'))
    t = threading.Thread(target=server.run, daemon=True); t.start()
    while not server.started: time.sleep(.02)
    yield f'http://127.0.0.1:{port}'
    server.should_exit = server.force_exit = True; t.join(20)


@pytest.mark.parametrize('how, says, status', [('html', 'ValueError', 502), ('empty', 'ValueError', 502), ('key', 'AuthenticationError 401', 502), ('busy', 'RateLimitError 429', 429),
                                               ('away', '307', 502), ('endless', '', 500)])
def test_odd_engines_behind(odd_engine, monkeypatch, caplog, how, says, status):
    "What is no engine is told by its kind; the key goes to nobody, not into the log either; a talk goes nowhere else, and ends."
    from yothalia.behind import Behind
    from yothalia.models import load_tokenizer
    monkeypatch.setenv('YOTHALIA_API_KEY', 'sk-very-secret-of-the-operator')
    tok = load_tokenizer('smollm2-135m')
    b = Behind(tok, f'{odd_engine}/{how}/v1', 'm', places=1)
    b.client = b.client.with_options(max_retries=0)
    r = b.ask(Request(tok('Hello')['input_ids'], Sampling(max_tokens=5)))
    text = ''.join(r.pieces(60))
    assert (r.ended == 'limit' and text.startswith('word word')) if how == 'endless' else (says in r.ended and r.status == status and not text), r.ended
    assert 'secret' not in r.ended + caplog.text and 'internal' not in r.ended
    b.stop()


def test_an_engine_behind_dies_and_comes_back(tmp_path):
    "Killed in the middle of a reply: that one ends with a word on it, the next is refused at once, and when it is there again it is asked again."
    import os, signal, subprocess, sys, httpx
    from yothalia.behind import Behind
    (tmp_path/'engine.py').write_text("""
import asyncio, json, sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
async def answer(request):
    n = (await request.json())['max_tokens']
    async def words():
        for k in range(n):
            yield 'data: ' + json.dumps(dict(id='x', object='text_completion', created=1, model='m', choices=[dict(index=0, text=' word', finish_reason=None, logprobs=None)])) + '\\n\\n'
            await asyncio.sleep(.1)
        yield 'data: [DONE]\\n\\n'
    return StreamingResponse(words(), media_type='text/event-stream')
uvicorn.run(Starlette(routes=[Route('/v1/completions', answer, methods=['POST'])]), port=int(sys.argv[1]), log_level='error')
""")
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    def start():
        p, end = subprocess.Popen([sys.executable, tmp_path/'engine.py', str(port)]), time.monotonic() + 60
        while True:
            try: httpx.get(f'http://127.0.0.1:{port}/', timeout=5); return p
            except httpx.HTTPError: assert p.poll() is None and time.monotonic() < end; time.sleep(.1)
    tok = load_tokenizer('smollm2-135m')
    engine, card = Behind(tok, f'http://127.0.0.1:{port}/v1', 'm'), Card(dict(name='Mira', description='A keeper.'))
    stage = Stage({'mira': character_of_card(card)}, engine, PERSONA, adapter=False)
    ask = lambda c, n, **kw: c.post('/v1/chat/completions', json=dict(model='mira', messages=[dict(role='user', content='Hi')], max_tokens=n) | kw)
    p = start()
    try:
        with opened(SimpleNamespace(stage=stage, routes=lambda: [])) as c:
            assert ask(c, 3).json()['choices'][0]['message']['content'] == 'word word word'
            threading.Timer(1, lambda: os.kill(p.pid, signal.SIGKILL)).start()
            cut = ask(c, 200, stream=True).text
            assert ' word' in cut and 'the engine behind failed' in cut and cut.endswith('data: [DONE]\n\n')
            gone = ask(c, 3); assert gone.status_code == 502 and gone.json()['error']['message'].startswith('the engine behind failed: APIConnectionError')
            p.wait(10); p = start()
            assert ask(c, 3).json()['choices'][0]['message']['content'] == 'word word word'
    finally: p.kill()


def test_a_contestants_key_stays_here(odd_engine, monkeypatch):
    from yothalia.contestants import Contestant
    monkeypatch.setenv('YOTHALIA_API_KEY', 'sk-very-secret-of-the-operator')
    import openai
    c = Contestant.__new__(Contestant)
    c.client, c.host, c.name = openai.OpenAI(api_key='sk-very-secret-of-the-operator', base_url=f'{odd_engine}/key/v1', max_retries=0), 'h', 'm'
    with pytest.raises(openai.AuthenticationError) as e: c.client.completions.create(model='m', prompt='x')
    assert 'secret' in str(e.value) and 'secret' not in str(c.explained(e.value)) and 'refuses the key' in str(c.explained(e.value))


def test_what_goes_to_a_terminal_and_into_records():
    from yothalia.contestants import ContestantError, check_url
    from yothalia.core import SECRET, shown
    assert shown('Hi\x1b]52;c;aGk=\x07\tthere\n') == 'Hi�]52;c;aGk=�\tthere\n'
    for key in ('xai-'+'a'*20, 'gsk_'+'a'*20, 'AIza'+'a'*35, 'xoxb-123456789012', 'eyJhbGciOi.eyJzdWIiOiIx.abc'): assert SECRET.search(f'is {key} here')
    for url in ('https://h/v1#abc', 'https://h/v1?key=a', 'https://h/hf_abcdefghijklmnopqrst/v1'):
        with pytest.raises(ContestantError, match='no key'): check_url(url)


def test_a_taken_port_is_said_before_the_model_loads():
    from yothalia.commands import free_port
    from yothalia.runner import RunError
    with socket.create_server(('127.0.0.1', 0)) as s:
        with pytest.raises(RunError, match='--port'): free_port('127.0.0.1', s.getsockname()[1])
    free_port('127.0.0.1', 0)
