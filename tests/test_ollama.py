"Ollama's own client, and bodies as its front ends send them, against the application; and what leaves before the first word."
import asyncio, json, random, socket, threading, time
import pytest, uvicorn
from starlette.testclient import TestClient
from yothalia.answers import ChatAnswer
from yothalia.bodies import Chat, read_body
from yothalia.characters import character_of
from yothalia.engine import Engine
from yothalia.models import load_model, load_tokenizer
from yothalia.prompts import PERSONA
from yothalia.rows import sample_rows
from yothalia.sampling import Request, Sampling
from yothalia.serve import Stage, Streamed, app_of
ollama = pytest.importorskip('ollama')

QUEEN, HI = 'queen-of-hearts', [dict(role='user', content='Any ideas for lunch today?')]


@pytest.fixture(scope='module')
def stage():
    rows, tok = sample_rows(), load_tokenizer('smollm2-135m')
    s = Stage({QUEEN: character_of([r for r in rows if r['character'] == QUEEN])}, Engine(load_model('smollm2-135m', 'fp32'), tok, 4, 1024, 64), PERSONA, 'Alice', 5, adapter=False)
    yield s
    s.engine.stop()


@pytest.fixture(scope='module')
def http(stage):
    with TestClient(app_of(stage), raise_server_exceptions=False, base_url='http://127.0.0.1') as c: yield c


@pytest.fixture(scope='module')
def client(stage):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app_of(stage), port=port, log_level='error', lifespan='off'))
    t = threading.Thread(target=server.run, daemon=True); t.start()
    while not server.started: time.sleep(.02)
    yield ollama.Client(host=f'http://127.0.0.1:{port}')
    server.should_exit = True; t.join(20)


def test_ollamas_client(client, http):
    "Lists, shows, talks, streams, generates; the reply is the one that OpenAI's address gives."
    assert [m.model for m in client.list().models] == [QUEEN] and client.show(QUEEN).capabilities == ['completion'] and [m.model for m in client.ps().models] == [QUEEN]
    same = http.post('/v1/chat/completions', json=dict(model=QUEEN, messages=HI, temperature=0)).json()['choices'][0]
    whole = client.chat(f'{QUEEN}:latest', HI, options=dict(temperature=0, num_ctx=4096, repeat_penalty=1))
    assert whole.message.content == same['message']['content'] and whole.done and whole.done_reason == same['finish_reason'] and whole.eval_count == 5 and whole.total_duration > 0
    parts = [*client.chat(QUEEN, HI, options=dict(temperature=0, num_predict=3), stream=True)]
    assert same['message']['content'].startswith(''.join(p.message.content for p in parts)) and [p.done for p in parts] == [False]*(len(parts)-1) + [True] and parts[-1].done_reason == 'length'
    told = client.generate(QUEEN, HI[0]['content'], options=dict(temperature=0))
    assert told.response == same['message']['content'] and ''.join(p.response for p in client.generate(QUEEN, HI[0]['content'], options=dict(temperature=0), stream=True)) == told.response
    with pytest.raises(ollama.ResponseError, match="did you mean 'queen-of-hearts'"): client.chat('queen-of-harts', HI)
    with pytest.raises(ollama.ResponseError, match='not served here'): client.embed(QUEEN, 'x')


def test_odder_wishes(http):
    "A text to go on from, a model that shall only be loaded, pictures, tools, and what the machine would be told."
    raw = http.post('/api/generate', json=dict(model=QUEEN, prompt='Once upon a', raw=True, stream=False, options=dict(temperature=0))).json()
    assert raw['response'] == http.post('/v1/completions', json=dict(model=QUEEN, prompt='Once upon a', temperature=0)).json()['choices'][0]['text']
    for path in ('/api/chat', '/api/generate'):
        assert http.post(path, json=dict(model=QUEEN, keep_alive=-1, stream=False)).json()['done_reason'] == 'load'
        assert http.post(path, json=dict(model='nobody')).json() == dict(error="There is no character 'nobody'; /v1/models lists them.")
        assert http.post(path, content=b'{').json() == dict(error='The body is not JSON.')
    body = dict(model=QUEEN, messages=[dict(role='user', content='Look!', images=['aGk='])], tools=[dict(type='function')], think=True, keep_alive='5m', stream=False, options=dict(num_predict=2, mirostat=1, num_gpu=1))
    assert http.post('/api/chat', json=body).headers['X-Yothalia-Ignored'] == 'tools, think, mirostat, messages[0].content: image'
    assert http.get('/api/version').json()['version'] and http.get('/api/nothing').json()['error'].startswith('GET /api/nothing is not served')


def test_odd_bodies(http):
    "A thousand of them: an answer, or a sentence."
    draw, seen = random.Random(5), set()
    odd = [None, True, -1, 1.5, 'x', '', [], {}, [1], [{}], {'a': 1}, [dict(role='user')], [dict(role='user', content='Hi', images=5)], [dict(role='user', content=[], images=['x'])], 2**70, QUEEN, f'{QUEEN}:latest']
    keys = 'model messages prompt system images raw stream options format think keep_alive suffix template context'.split()
    for _ in range(1000):
        body = dict(model=QUEEN, stream=False) | {k: draw.choice(odd) for k in draw.sample(keys, draw.randrange(1, 6))}
        if draw.random() < .3: body['options'] = {k: draw.choice(odd) for k in ('temperature', 'num_predict', 'stop', 'seed', 'top_k')}
        if isinstance(body.get('options'), dict): body['options'].setdefault('num_predict', 1)
        got = http.post(draw.choice(['/api/chat', '/api/generate', '/api/show']), json=body)
        seen.add(got.status_code)
        assert got.status_code in (200, 400, 404), (body, got.text)
        assert got.status_code == 200 or isinstance(got.json()['error'], str)
    assert seen == {200, 400, 404}


def test_a_scene_that_nobody_hears(http):
    "Under a condition in which the model is told nothing, that a client's scene was left out is said."
    body = dict(messages=[dict(role='system', content='It rains.'), *HI], max_tokens=1)
    said = lambda name: http.post('/v1/chat/completions', json=body | dict(model=name)).headers.get('X-Yothalia-Ignored')
    assert said(QUEEN) is None and said(f'{QUEEN}@base') == 'messages[0].content: told under @prompt and @both only'
    got = http.post('/v1/responses', json=dict(model=f'{QUEEN}@base', input='Hi', instructions='It rains.', max_output_tokens=1))
    assert got.headers['X-Yothalia-Ignored'] == 'instructions: told under @prompt and @both only'


def test_gone_before_the_first_word():
    "A client that has left before its stream begins is not answered any further."
    r = Request([1], Sampling())
    answer = ChatAnswer([r], read_body(Chat, dict(model='x', messages=HI)), None)
    async def run():
        async def receive(): return dict(type='http.disconnect')
        async def send(m): raise OSError('nobody there')
        class Gone:
            async def is_disconnected(self): return True
        try: await Streamed(answer, Gone(), {})(dict(type='http', asgi=dict(spec_version='2.0')), receive, send)
        except BaseException: pass
    asyncio.run(run())
    assert r.cancelled.is_set()
