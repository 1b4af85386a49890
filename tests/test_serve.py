"""The server as a process of its own, and OpenAI's own client against it: right calls, wrong calls, many at once, and who goes away."""
import json, os, re, shutil, signal, socket, subprocess, sys, threading, time, urllib.request
from pathlib import Path

import pytest

openai = pytest.importorskip('openai')
from yothalia.characters import make_card
from yothalia.rows import sample_rows

ROOT = Path(__file__).parent.parent
CHARACTERS = ('queen-of-hearts', 'brasswick', 'don-quixote', 'baba-yaga')
WHO = ('queen-of-hearts', 'brasswick', 'don-quixote-of-la-mancha', 'baba-yaga')  # as their cards call them
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore', 'YOTHALIA_PROGRESS': 'off', 'COLUMNS': '300'}
COMMAND = [sys.executable, '-c', 'from yothalia.commands import app; app()', 'serve', 'no-run', '--precision', 'fp32', '--user', 'Alice']


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "Four characters by their cards, on a port of this machine, with a key."
    box, port = tmp_path_factory.mktemp('cards'), free_port()
    cards = [a for c in CHARACTERS for a in ('--card', str(make_card([r for r in sample_rows() if r['character'] == c]).save(box/f'{c}.png')))]
    p = subprocess.Popen([*COMMAND, *cards, '--port', str(port), '--places', '8', '--waiting', '24', '--room', '1024'], env=ENV | dict(YOTHALIA_KEY='open sesame'),
                         cwd=box, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=1); break
        except OSError:
            assert p.poll() is None, p.stdout.read()
            time.sleep(.1)
    yield openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='open sesame', max_retries=0), p, port
    p.kill()


def ask(client, text='Good morning!', model='queen-of-hearts', **kw):
    return client.chat.completions.create(model=model, messages=[dict(role='user', content=text)], **dict(max_tokens=6, seed=1) | kw)


def test_openais_client(server):
    "Models, a reply, the same reply as a stream with its usage, stop and length."
    client, _, _ = server
    assert {m.id for m in client.models.list()} == set(WHO) and client.models.retrieve('brasswick').id == 'brasswick'
    whole = ask(client); said = whole.choices[0].message.content
    assert said and whole.usage.completion_tokens <= 6 and whole.choices[0].finish_reason in ('length', 'stop')
    events = list(ask(client, stream=True, stream_options=dict(include_usage=True)))
    assert ''.join(e.choices[0].delta.content or '' for e in events if e.choices).strip() == said
    assert events[-1].usage == whole.usage and events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    word = said.split()[-1]
    assert word not in (ask(client, stop=[word]).choices[0].message.content or '')


def test_its_other_endpoints(server):
    "Completions and Responses by the same client, whole and streamed: the helper that puts a stream together finds what was said whole."
    client, _, _ = server
    told = dict(model='queen-of-hearts', input='Good morning!', max_output_tokens=6, temperature=0)
    whole = client.responses.create(**told)
    assert whole.output_text == ask(client, temperature=0, seed=None).choices[0].message.content and whole.usage.output_tokens <= 6
    with client.responses.stream(**told) as stream: events = [*stream]
    assert next(e.text for e in events if e.type == 'response.output_text.done') == whole.output_text == events[-1].response.output_text
    assert events[-1].type == f'response.{whole.status}'
    text = client.completions.create(model='queen-of-hearts', prompt='Once upon a time,', max_tokens=4, temperature=0).choices[0].text
    told = client.completions.create(model='queen-of-hearts', prompt='Once upon a time,', max_tokens=4, temperature=0, echo=True, logprobs=1).choices[0]
    assert told.text == 'Once upon a time,' + text == ''.join(told.logprobs.tokens) and told.logprobs.token_logprobs[0] is None and max(told.logprobs.token_logprobs[1:]) < 0
    assert [told.text[o:][:len(t)] for o, t in zip(told.logprobs.text_offset, told.logprobs.tokens)] == told.logprobs.tokens
    assert text == ''.join(e.choices[0].text for e in client.completions.create(model='queen-of-hearts', prompt='Once upon a time,', max_tokens=4, temperature=0, stream=True))
    with pytest.raises(openai.NotFoundError, match='not served here'): client.embeddings.create(model='queen-of-hearts', input='x')


def test_logprobs(server):
    "Each token with its log-probability and the likeliest beside it, the same whole and streamed; greedy takes the likeliest."
    client, _, _ = server
    whole = ask(client, temperature=0, logprobs=True, top_logprobs=5).choices[0]
    shown = whole.logprobs.content
    assert ''.join(t.token for t in shown).strip().startswith(whole.message.content[:5]) and len(shown) <= 6
    for t in shown:
        assert t.logprob <= 0 and len(t.top_logprobs) == 5 and bytes(t.bytes).decode() == t.token
        assert [o.logprob for o in t.top_logprobs] == sorted((o.logprob for o in t.top_logprobs), reverse=True)
    assert shown[0].token == shown[0].top_logprobs[0].token
    events = [e.choices[0].logprobs for e in ask(client, temperature=0, stream=True, logprobs=True, top_logprobs=5) if e.choices and e.choices[0].logprobs]
    assert [(t.token, t.logprob) for e in events for t in e.content] == [(t.token, t.logprob) for t in shown]
    assert ask(client).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match='top_logprobs needs logprobs'): ask(client, top_logprobs=3)
    with pytest.raises(openai.BadRequestError, match='top_logprobs must be less'): ask(client, logprobs=True, top_logprobs=50)


ELSEWHERE = """
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, streamText } from 'ai';
const at = key => createOpenAICompatible({ name: 'yothalia', baseURL: process.argv[2], apiKey: key, includeUsage: true });
const told = { prompt: 'Good morning!', maxOutputTokens: 6, seed: 1, maxRetries: 0 };
const whole = await generateText({ model: at('open sesame')('queen-of-hearts'), ...told });
const pieces = [], stream = streamText({ model: at('open sesame')('queen-of-hearts'), ...told });
for await (const p of stream.textStream) pieces.push(p);
const wrong = {};
for (const [k, model] of [['name', at('open sesame')('braswick')], ['key', at('no')('queen-of-hearts')]])
  await generateText({ model, ...told }).catch(e => wrong[k] = [e.statusCode, e.message]);
console.log(JSON.stringify({ text: whole.text, why: whole.finishReason, usage: whole.usage.outputTokens, pieces, streamed: (await stream.usage).outputTokens, wrong }));
"""


@pytest.mark.skipif(not shutil.which('npm'), reason='needs Node.js with npm')
def test_client_of_another_language(server, tmp_path):
    "A client from npm that many web front ends are built with (Vercel's AI SDK): whole, as a stream, and with a wrong name and key."
    _, _, port = server
    (tmp_path/'package.json').write_text('{"type": "module"}'); (tmp_path/'ask.js').write_text(ELSEWHERE)
    got = subprocess.run(['npm', 'install', '--no-audit', '--no-fund', 'ai@6', '@ai-sdk/openai-compatible@2'], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    if got.returncode: pytest.skip('npm could not install the client: ' + got.stderr[-200:])
    run = subprocess.run(['node', 'ask.js', f'http://127.0.0.1:{port}/v1'], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    o = json.loads(run.stdout.splitlines()[-1])
    assert o['text'] and ''.join(o['pieces']).strip() == o['text'].strip() and o['usage'] == o['streamed'] <= 6 and o['why'] in ('stop', 'length')
    assert o['wrong']['name'][0] == 404 and 'did you mean' in o['wrong']['name'][1] and o['wrong']['key'][0] == 401


def test_wrong_calls(server):
    "Each in OpenAI's form, so that its client raises what its users expect."
    client, _, port = server
    with pytest.raises(openai.NotFoundError, match='did you mean .brasswick'): ask(client, model='braswick')
    with pytest.raises(openai.BadRequestError, match='temperature'): ask(client, temperature=1.9, top_p=1.) and ask(client, extra_body=dict(temperature='hot'))
    with pytest.raises(openai.BadRequestError, match='n must be'): ask(client, n=300)
    with pytest.raises(openai.BadRequestError, match='role must be'): client.chat.completions.create(model='brasswick', messages=[dict(role='cook', content='x')])
    with pytest.raises(openai.NotFoundError, match='did you mean .brasswick'): client.models.retrieve('braswick')
    with pytest.raises(openai.BadRequestError, match='a place holds'): ask(client, 'word '*5000)
    with pytest.raises(openai.APIStatusError, match='longer than'): ask(client, 'x'*2_000_000)
    with pytest.raises(openai.AuthenticationError, match='key is wrong'): ask(openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='guess', max_retries=0))
    assert ask(client).choices[0].message.content  # and it still answers


def test_sixteen_clients(server):
    "Sixteen at once with four characters and histories of their own: each gets the reply that it gets alone."
    client, _, _ = server
    def history(k): return [dict(role='user', content=f'I am number {k}.'), dict(role='assistant', content='So what?'), dict(role='user', content='Which number am I?')]
    def one(k): return client.chat.completions.create(model=WHO[k % 4], messages=history(k), max_tokens=6, temperature=.7, seed=k).choices[0].message.content
    heard = {}
    threads = [threading.Thread(target=lambda k=k: heard.update({k: one(k)})) for k in range(16)]
    for t in threads: t.start()
    for t in threads: t.join(240)
    assert sorted(heard) == list(range(16)) and heard == {k: one(k) for k in range(16)}


def number(port, what):
    r = urllib.request.Request(f'http://127.0.0.1:{port}/metrics', headers={'Authorization': 'Bearer open sesame'})
    return int(re.search(rf'^yothalia_{what} (\d+)$', urllib.request.urlopen(r, timeout=10).read().decode(), re.M)[1])


def test_who_goes_away_frees_the_place(server):
    "A stream that is closed after its first word: seconds later nobody is seated, and its tokens were not all computed."
    _, _, port = server
    before = number(port, 'tokens')
    with openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='open sesame', max_retries=0) as own:
        stream = ask(own, 'Tell me everything.', max_tokens=700, stream=True)
        for e in stream:
            if e.choices and e.choices[0].delta.content: break
        stream.close()
    for _ in range(300):
        if number(port, 'seated') == 0: break
        time.sleep(.1)
    assert number(port, 'seated') == 0 and number(port, 'tokens') - before < 700


def test_stops_gently(server):
    "Told to stop while it answers: the answer is finished, and the process ends."
    client, p, _ = server
    stream = ask(client, 'And now?', max_tokens=30, stream=True); first = next(iter(stream))
    p.send_signal(signal.SIGTERM)
    events = list(stream)
    assert events[-1].choices[0].finish_reason in ('length', 'stop')
    assert p.wait(60) is not None


def test_others_need_a_key(tmp_path):
    "It does not listen to other machines without a key, and says how to give one; a run that is not there is said, too."
    env = {k: v for k, v in ENV.items() if k != 'YOTHALIA_KEY'}
    got = subprocess.run([*COMMAND, '--host', '0.0.0.0'], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert got.returncode == 1 and 'YOTHALIA_KEY' in got.stdout
    got = subprocess.run(COMMAND, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert got.returncode == 1 and "no run 'no-run'" in got.stdout and 'Traceback' not in got.stderr


def test_adapters_of_their_own(tmp_path):
    "Two characters with an adapter each and one without, in one server: each speaks by its own, and a wrong name is said at once."
    import torch
    from peft import LoraConfig, get_peft_model
    from yothalia.models import load_model
    for k, c in enumerate(CHARACTERS[2:]):
        torch.manual_seed(k)
        m = get_peft_model(load_model('smollm2-135m', 'fp32'), LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear', r=4+k), autocast_adapter_dtype=False)
        for n, p in m.named_parameters():
            if 'lora_B' in n: p.data.normal_(std=.3)
        m.save_pretrained(tmp_path/c)
    port = free_port()
    cards = [a for c in CHARACTERS[1:] for a in ('--card', str(make_card([r for r in sample_rows() if r['character'] == c]).save(tmp_path/f'{c}.png')))]
    own = [a for c, w in zip(CHARACTERS[2:], WHO[2:]) for a in ('--adapter-of', f'{w}={tmp_path/c}')]
    got = subprocess.run([*COMMAND, *cards, '--adapter-of', 'baba-yag=x', '--port', str(port)], env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert got.returncode == 1 and "did you mean 'baba-yaga'" in got.stdout and 'Traceback' not in got.stderr
    p = subprocess.Popen([*COMMAND, *cards, *own, '--port', str(port), '--room', '1024'], env=ENV, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(900):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=1); break
            except OSError:
                assert p.poll() is None, p.stdout.read()
                time.sleep(.1)
        client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='x', max_retries=0)
        say = lambda model: ask(client, model=model, temperature=0).choices[0].message.content
        from concurrent.futures import ThreadPoolExecutor
        names = [f'{w}@{c}' for w in WHO[2:] for c in ('prompt', 'both')] + ['brasswick']
        with ThreadPoolExecutor(5) as pool: said = dict(zip(names, pool.map(say, names)))
        assert len({said[n] for n in names if n.endswith('@both')} | {said[n] for n in names if n.endswith('@prompt')}) == 4
        assert say('baba-yaga') == say('baba-yaga@both') == said['baba-yaga@both'] and say('brasswick@prompt') == said['brasswick']
        with pytest.raises(openai.NotFoundError, match='known are prompt, base'): say('brasswick@both')
        who = json.loads(urllib.request.urlopen(f'http://127.0.0.1:{port}/page/who').read())['characters']
        assert {c['id']: len(c['conditions']) for c in who} == dict(zip(WHO[1:], (2, 4, 4)))
    finally: p.kill()


def test_another_engine_behind(tmp_path):
    "The server before `transformers serve`, which does the work: greedy, it says what the own engine says; an engine that is gone is said, and nothing hangs."
    pytest.importorskip('fastapi', reason='transformers serve needs it')
    from yothalia.behind import Behind
    from yothalia.session import Voice
    from yothalia.sampling import Sampling, hear as heard_alone
    from yothalia.engine import Request
    from yothalia.models import load_model, load_tokenizer, resolve_model
    from yothalia.prompts import render
    from yothalia.rendering import text_ids
    place, port, tok = resolve_model('smollm2-135m'), free_port(), load_tokenizer('smollm2-135m')
    p = subprocess.Popen([str(Path(sys.executable).with_name('transformers')), 'serve', place, '--port', str(port), '--dtype', 'float32'], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(900):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=1); break
            except OSError: assert p.poll() is None; time.sleep(.1)
        behind, own = Behind(tok, f'http://127.0.0.1:{port}/v1', place, places=2), Voice(load_model('smollm2-135m', 'fp32'), tok)
        rows = [next(r for r in sample_rows() if r['character'] == c) for c in CHARACTERS[:3]]
        how = Sampling(temperature=0., guard=0, max_tokens=8)
        asked = [behind.ask(Request(text_ids(tok, render(r, tok)[0]), Sampling(**vars(how)))) for r in rows]
        heard = [''.join(r.pieces(120)).strip() for r in asked]
        assert heard == [heard_alone(own, render(r, tok)[0], how).strip() for r in rows] and all(heard)
        assert {r.ended for r in asked} <= {'limit', 'turn'} and behind.takes_ids is False
        behind.look()
        assert behind.can['in pieces'] == 'yes' and behind.can['top_k'] == behind.can['token ids'] == 'refused' and behind.can['seed'] == 'ignored', behind.can
        odd = Sampling(seed=1, top_k=5, max_tokens=4) # what it would refuse is left out, and said
        assert behind.unheard(odd) == ['temperature', 'seed', 'top_k'] and ''.join(behind.ask(Request(text_ids(tok, render(rows[0], tok)[0]), odd)).pieces(120)).strip()
    finally: p.terminate(); p.wait(30)
    gone = behind.ask(Request(text_ids(tok, 'Hello'), Sampling(max_tokens=4))); assert list(gone.pieces(60)) == [] and 'engine behind' in gone.ended
    behind.stop()
