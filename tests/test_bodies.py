"Requests as front ends send them, against the application: answered, or refused in words; what was left out is said; nothing ends in a 500."
import json, random
import pytest
from starlette.testclient import TestClient
from yothalia.bodies import Chat, Refused, conversation, left_out, likely_of, read_body, sampling_of
from yothalia.characters import character_of
from yothalia.engine import Engine
from yothalia.models import load_model, load_tokenizer
from yothalia.prompts import PERSONA
from yothalia.rows import sample_rows
from yothalia.serve import Stage, app_of

def S(t='Scene: a kitchen at night.'): return dict(role='system', content=t)
def U(t='What is in the pot?'): return dict(role='user', content=t)
def A(t='Soup, and you may not'): return dict(role='assistant', content=t)
TOOL = dict(type='function', function=dict(name='clock', description='', parameters=dict(type='object', properties={})))
PICTURE = dict(type='image_url', image_url=dict(url='data:image/png;base64,AA', detail='low'))

# what a client sends → what of it is left out
TAKEN = [
    (dict(messages=[S(), U()], temperature=1, frequency_penalty=0, presence_penalty=0, top_p=1, stream=False, logit_bias={}, n=None, seed=None, stop=['\nUser:']), []),
    (dict(messages=[S(), U(), S('Write short lines.')]), []), (dict(messages=[S(), U(), A(), S('[Continue the last message]')]), []),
    (dict(messages=[S(), U(), A()]), []), (dict(messages=[S()]), []), (dict(messages=[S(), A('Who is there?')]), []),
    (dict(messages=[U()], frequency_penalty=.4, presence_penalty=-.4), []), (dict(messages=[U()], n=2), []),
    (dict(messages=[U()], tools=[TOOL], tool_choice='auto'), ['tools']), (dict(messages=[U()], tools=[TOOL], tool_choice='required'), ['tools', 'tool_choice']),
    (dict(messages=[dict(role='user', content=[dict(type='text', text='Look'), PICTURE])]), ['messages[0].content: image_url']),
    (dict(messages=[dict(role='user', content=[PICTURE])]), ['messages[0].content: image_url']),
    (dict(messages=[S(), dict(role='user', content=[dict(type='text', text='Hi')])], tools=[TOOL]), ['tools']),
    (dict(messages=[U()], response_format=dict(type='text')), []), (dict(messages=[U()], response_format=dict(type='json_object')), ['response_format']),
    *((dict(messages=[U()], max_tokens=k), []) for k in (-1, 0, None)), (dict(messages=[U()], max_completion_tokens=2), []),
    (dict(messages=[U()], stop=['a b c', '', 'd e', 'f', 'g', 'h']), []), (dict(messages=[U()], stop=''), []), (dict(messages=[U()], temperature=0, top_p=0), []),
    (dict(messages=[U()], seed=-1), []), (dict(messages=[U()], seed=2**70), []), (dict(messages=[U()], top_k=-1, min_p=.05), []), (dict(messages=[U()], repetition_penalty=1.1), ['repetition_penalty']),
    (dict(messages=[U()], user='u', metadata={}, store=False, reasoning_effort='low', service_tier='auto', parallel_tool_calls=True), []),
    (dict(messages=[U(), dict(role='assistant', content=None, tool_calls=[]), U()]), []), (dict(messages=[U()], logprobs=5), []),
    (dict(messages=[U(), dict(role='assistant', content=None), dict(role='tool', tool_call_id='1', content='12:30')]), []),
    (dict(messages=[U()], tools=None, tool_choice='none'), []), (dict(messages=[S(), U('')]), []), (dict(messages=[U()], modalities=['text']), []),
    (dict(messages=[U()], modalities=['text', 'audio'], audio=dict(voice='x')), ['modalities', 'audio']), (dict(messages=[U()], temprature=.3), ['temprature']),
    (dict(messages=[dict(role='user', name='Bob', content='Hi'), dict(role='assistant', name='Mia', content='Ho'), dict(role='user', name='Ann', content='He')]), [])]
# what can't be meant → what the sentence must hold
WRONG = [(dict(messages=[U()], temperature='0.7'), 'number'), (dict(messages=[U()], temperature=float('nan')), 'finite'), (dict(messages=[U()], temperature=-1), 'greater'),
         (dict(messages=[U()], max_tokens=1.5), 'integer'), (dict(messages=[U()]*2001), '2000'), (dict(messages=[dict(role=[], content='x')]), 'role'), (dict(messages=[U(5)]), 'content'),
         (dict(messages=[U()], stream='false'), 'stream'), (dict(messages=[U()], stream_options=True), 'stream_options'), (dict(messages=[U()], n=99), '16'), (dict(messages=[U()], stop=[1]), 'stop'),
         (dict(messages=[U()], logprobs=50), 'logprobs'), (dict(messages=[U()], logit_bias={'x': 1}), 'logit_bias'), (dict(messages=[U()], seed=float('inf')), 'seed'), ([1], 'object'), (None, 'object')]


@pytest.fixture(scope='module')
def stage():
    rows, tok = sample_rows(), load_tokenizer('smollm2-135m')
    who = {n: character_of([r for r in rows if r['character'] == n]) for n in ('queen-of-hearts', 'brasswick')}
    s = Stage(who, Engine(load_model('smollm2-135m', 'fp32'), tok, 4, 1024, 64), PERSONA, 'Alice', 3, adapter=False)
    yield s
    s.engine.stop()


@pytest.fixture(scope='module')
def client(stage):
    with TestClient(app_of(stage, origins=['https://front.example']), raise_server_exceptions=False, base_url='http://127.0.0.1') as c: yield c


def post(client, body, path='/v1/chat/completions', **kw):
    if isinstance(body, dict): body = dict(model='queen-of-hearts') | body
    return client.post(path, content=json.dumps(body), headers={'Content-Type': 'application/json'} | kw)


@pytest.mark.parametrize('body, lost', TAKEN)
def test_taken(client, stage, body, lost):
    "An answer, with a header that names what was left out; the strict way refuses just these."
    got = post(client, body)
    assert got.status_code == 200, got.text
    assert [x for x in got.headers.get('X-Yothalia-Ignored', '').split(', ') if x] == lost
    assert len(got.json()['choices']) == (body.get('n') or 1) and got.json()['usage']['completion_tokens'] <= 3*(body.get('n') or 1)
    stage.strict = True
    try: got = post(client, body)
    finally: stage.strict = False
    assert got.status_code == (400 if lost else 200)
    if lost: assert f'does not support {lost[0]}' in got.json()['error']['message'] and f'{lost[0]} is not supported' in got.json()['error']['message']


@pytest.mark.parametrize('body, says', WRONG)
def test_wrong(client, body, says):
    got = post(client, body)
    assert got.status_code == 400 and says in got.json()['error']['message'], got.text


def prompt(stage, *messages, **more):
    r = stage.requests_of(read_body(Chat, dict(model='queen-of-hearts', messages=list(messages)) | more))[0]
    return stage.engine.tok.decode(r.prompt), r


def test_where_words_go(stage):
    "The scene behind the persona, an aside in the person's turn, a beginning in the reply; of a long talk half of the room at least."
    persona = stage.who['queen-of-hearts'].personas['en']
    text, _ = prompt(stage, S('They sit in a boat.'), U())
    assert persona + '\nThey sit in a boat.' in text
    text, _ = prompt(stage, U(), S('Be brief.'))
    assert 'What is in the pot?\n[Be brief.]' in text and text.index('[Be brief.]') > text.index(persona)
    text, r = prompt(stage, U(), A('Queen of Hearts: Soup, and'))
    assert text.endswith('Soup, and') and 'Queen of Hearts: Soup' not in text and r.begun
    talk = [m for k in range(40) for m in (U(f'Line {k}: what is in the pot?'), A('Soup! Ten years!'))] + [U('And now?')]
    assert len(prompt(stage, *talk, max_tokens=10**6)[1].prompt) > 350 > len(prompt(stage, U(), max_tokens=10**6)[1].prompt)


def test_goes_on(client, stage):
    "A reply that was begun goes on as it would have gone on, blank and all."
    whole = post(client, dict(messages=[U()], temperature=0, max_tokens=6)).json()['choices'][0]['message']['content']
    cut = whole.rindex(' ')
    rest = post(client, dict(messages=[U(), A(whole[:cut])], temperature=0, max_tokens=2)).json()['choices'][0]['message']['content']
    assert (whole[:cut] + rest).startswith(whole[:cut] + whole[cut:].rstrip('.,')) or whole.startswith((whole[:cut] + rest).rstrip())


def test_several(client):
    "Several replies by one request are those of as many requests with the next seeds, whole and streamed."
    ask = dict(messages=[U()], seed=5, n=3, temperature=1., max_tokens=3)
    whole = [c['message']['content'] for c in post(client, ask).json()['choices']]
    alone = [post(client, ask | dict(n=1, seed=5+k)).json()['choices'][0]['message']['content'] for k in range(3)]
    events = [json.loads(l[6:]) for l in post(client, ask | dict(stream=True)).text.split('\n\n') if l.startswith('data: {')]
    streamed = [''.join(e['choices'][0]['delta'].get('content', '') for e in events if e['choices'][0]['index'] == k).strip() for k in range(3)]
    assert whole == alone == streamed and len(set(whole)) > 1


def test_fingerprint(client, stage):
    "A mark of the model, where there is one, in a whole reply and in each event."
    stage.mark = 'fp_1'
    try: got = [post(client, dict(messages=[U()])).json()] + [json.loads(l[6:]) for l in post(client, dict(messages=[U()], stream=True)).text.split('\n\n') if l.startswith('data: {')]
    finally: stage.mark = ''
    assert {o['system_fingerprint'] for o in got} == {'fp_1'} and len(got) > 2


def test_penalties(stage):
    "What is subtracted from a token that was said, and a bias, arrive at the drawing."
    s = sampling_of(read_body(Chat, dict(messages=[U()], frequency_penalty=.5, presence_penalty=1, logit_bias={'9': -100})), 8)
    assert (s.frequency, s.presence, s.bias) == (.5, 1, {9: -100})


def test_addresses(client):
    "One model by its name, and what is not there in OpenAI's form."
    assert client.get('/v1/models/brasswick').json()['id'] == 'brasswick'
    for how, path, status in (('get', '/v1/models/braswick', 404), ('post', '/v1/embeddings', 404), ('get', '/v1/chat/completions', 405), ('get', '/nowhere', 404)):
        got = getattr(client, how)(path)
        assert got.status_code == status and got.json()['error']['message'], path


def test_a_text_goes_on(client, stage):
    "/v1/completions: the model goes on from the text as it stands, whole and streamed, of several texts, of tokens; a chat's own prompt gives the chat's reply."
    ask = dict(prompt='Once upon a time,', max_tokens=5, temperature=0)
    whole = post(client, ask, '/v1/completions').json()
    said = whole['choices'][0]['text']
    assert said.startswith(' ') and whole['object'] == 'text_completion' and whole['usage']['completion_tokens'] <= 5
    events = [json.loads(l[6:]) for l in post(client, ask | dict(stream=True), '/v1/completions').text.split('\n\n') if l.startswith('data: {')]
    assert ''.join(e['choices'][0]['text'] for e in events).rstrip() == said.rstrip()
    ids = stage.engine.tok('Once upon a time,')['input_ids']
    several = post(client, ask | dict(prompt=[ids, ids]), '/v1/completions').json()['choices']
    assert [c['text'] for c in several] == [said]*2 and [c['index'] for c in several] == [0, 1]
    for body, says in ((dict(prompt=[]), 'prompt'), (dict(prompt=[10**6]), 'tokens below'), (dict(), 'prompt'), (dict(prompt=['a']*9, n=9), '16')):
        got = post(client, body, '/v1/completions')
        assert got.status_code == 400 and says in got.json()['error']['message'], got.text


def test_responses(client):
    "/v1/responses: the same reply as the chat's, its events in order, and what can't be had in words."
    chat = post(client, dict(messages=[S(), U()], max_tokens=4, temperature=0)).json()['choices'][0]['message']['content']
    ask = dict(instructions=S()['content'], input=U()['content'], max_output_tokens=4, temperature=0)
    got = post(client, ask, '/v1/responses').json()
    assert got['output'][0]['content'][0]['text'] == chat and got['status'] in ('completed', 'incomplete') and got['usage']['output_tokens'] <= 4
    events = [json.loads(l.partition('data: ')[2]) for l in post(client, ask | dict(stream=True), '/v1/responses').text.split('\n\n') if l]
    assert ''.join(e['delta'] for e in events if e['type'] == 'response.output_text.delta').strip() == chat
    assert [e['sequence_number'] for e in events] == [*range(len(events))] and events[0]['type'] == 'response.created' and events[-1]['response']['output'][0] == events[-2]['item']
    parts = [dict(role='user', content=[dict(type='input_text', text=U()['content'])])]
    assert post(client, dict(ask, input=parts), '/v1/responses').json()['output'][0]['content'][0]['text'] == chat
    got = post(client, dict(ask, top_logprobs=2), '/v1/responses')
    assert got.status_code == 200 and got.headers['X-Yothalia-Ignored'] == 'top_logprobs'
    got = post(client, dict(ask, previous_response_id='resp_1'), '/v1/responses')
    assert got.status_code == 400 and 'not kept here' in got.json()['error']['message']


def test_other_pages(client):
    "A page of another origin may ask if it was named, and only then."
    ask = {'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'authorization,content-type'}
    got = client.options('/v1/chat/completions', headers=ask | {'Origin': 'https://front.example'})
    assert got.status_code == 200 and got.headers['access-control-allow-origin'] == 'https://front.example'
    assert 'access-control-allow-origin' not in client.options('/v1/chat/completions', headers=ask | {'Origin': 'https://evil.example'}).headers


ODD = [None, True, False, 0, 1, -1, 5, 1.5, 1e308, float('nan'), float('inf'), -float('inf'), 2**70, '', 'x', '0.7', 'null', '\ud800', '\u2028', '\x00', 'é'*50, [], [1], [[]], ['a'], {}, {'a': 1},
       {'type': 'text'}, [{'type': 'text', 'text': 'Hi'}], [{'type': 'text', 'text': 5}], [{'type': 'image_url'}], [None], {'role': 'user', 'content': 'Hi'}, [{'role': 'user', 'content': 'Hi'}]]


def test_ten_thousand_odd_bodies(stage):
    "Each is read, or refused with a sentence and a status of its own: nothing else is raised, and what is read can be drawn with and shown to a template."
    draw, fields, read = random.Random(0), [*Chat.model_fields, 'tools', 'response_format', 'audio', 'user', '\ud800', 'x'], 0
    parts = ('role', 'content', 'name', 'dropped', 'tool_calls')
    for _ in range(10_000):
        body = dict(model='queen-of-hearts', messages=[dict(role=draw.choice(('user', 'system', 'assistant', 'tool')), content=draw.choice(('Hi', '', 'Mira: x', '\n'))) for _ in range(draw.randrange(1, 5))])
        for _ in range(draw.randrange(3)): body[draw.choice(fields)] = draw.choice(ODD)
        if isinstance(body.get('messages'), list) and body['messages'] and isinstance(m := draw.choice(body['messages']), dict) and draw.random() < .4: m[draw.choice(parts)] = draw.choice(ODD)
        try:
            asked = read_body(Chat, json.loads(json.dumps(body)))
            left_out(asked), sampling_of(asked, 8), likely_of(asked)
            told = conversation(asked.messages, 'Queen of Hearts', 'Alice')
            assert told.turns[-1]['role'] == 'user' and all(a['role'] != b['role'] for a, b in zip(told.turns, told.turns[1:]))
            if read % 50 == 0 and asked.model == 'queen-of-hearts': stage.requests_of(asked)
            read += 1
        except Refused as e: assert e.status == 400 and len(str(e)) < 400 and str(e).isprintable(), e
    assert 3000 < read < 9000, read
