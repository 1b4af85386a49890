"""Many who talk at once: each hears what it would hear alone, whoever else comes and goes."""
import os, random, threading, time
from dataclasses import replace

import pytest, torch

from yothalia.session import Voice
from yothalia.sampling import Sampling, hear as heard_alone
from yothalia.rows import sample_rows
from yothalia.engine import Engine, Request
from yothalia.models import load_model, load_tokenizer
from yothalia.prompts import find_template, render
from yothalia.rendering import text_ids

os.environ['YOTHALIA_PROGRESS'] = 'off'


@pytest.fixture(scope='module')
def lm(): return load_model('smollm2-135m', 'fp32')


@pytest.fixture(scope='module')
def tok(): return load_tokenizer('smollm2-135m')


def alone(lm, tok, prompt, s):
    return heard_alone(Voice(lm, tok), tok.decode(prompt), s)


def test_sixteen_clients_of_four_characters(lm, tok):
    "They come at random moments and want replies of different lengths, drawn with a seed; every reply is the one that its history gives alone, none is lost."
    made, who = random.Random(0), ('queen-of-hearts', 'brasswick', 'don-quixote', 'baba-yaga')
    rows = [made.choice([r for r in sample_rows() if r['character'] == who[k % 4]]) for k in range(16)]
    prompts = [text_ids(tok, render(r, tok)[0]) for r in rows]
    hows = [Sampling(temperature=.7, top_p=.9, seed=k, max_tokens=made.randrange(2, 9)) for k in range(16)]
    engine, heard = Engine(lm, tok, places=6, waiting=16), {}
    def client(k):
        time.sleep(made.random()); heard[k] = ''.join(engine.ask(Request(prompts[k], replace(hows[k]))).pieces(120))
    threads = [threading.Thread(target=client, args=(k,)) for k in range(16)]
    for t in threads: t.start()
    for t in threads: t.join(240)
    engine.stop()
    assert sorted(heard) == list(range(16))
    assert [heard[k] for k in range(16)] == [alone(lm, tok, p, h) for p, h in zip(prompts, hows)]
    assert engine.tokens > 1.5*engine.steps  # they were answered together


def test_adapter_is_switched_for_each(tmp_path, tok):
    "Some speak with the adapter and some without, at the same time: each as it would alone."
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    m = get_peft_model(load_model('smollm2-135m', 'fp32'), LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear', r=4), autocast_adapter_dtype=False).eval()
    for n, p in m.named_parameters():
        if 'lora_B' in n: p.data.normal_(std=.3)
    p, s = text_ids(tok, render(next(r for r in sample_rows() if r['lang'] == 'en'), tok)[0]), Sampling(temperature=0., guard=0, max_tokens=8)
    engine = Engine(m, tok, places=4)
    asked = [engine.ask(Request(p, replace(s), on=bool(k % 2))) for k in range(4)]
    heard = [''.join(r.pieces(120)) for r in asked]; engine.stop()
    with m.disable_adapter(): base = heard_alone(Voice(m, tok), tok.decode(p), s, on=False)
    assert heard[0] == heard[2] == base and heard[1] == heard[3] == heard_alone(Voice(m, tok), tok.decode(p), s) and heard[0] != heard[1]


def test_stopped_gently_and_full(lm, tok):
    "Who is being answered is finished, who waits is told, and a queue that is full says so at once."
    import queue
    p = text_ids(tok, 'Once upon a time')
    engine = Engine(lm, tok, places=1, waiting=2)
    first = engine.ask(Request(p, Sampling(temperature=0., max_tokens=12))); first.out.get(timeout=60)
    others = [engine.ask(Request(p, Sampling(max_tokens=4))) for _ in range(2)]
    with pytest.raises(queue.Full): engine.ask(Request(p, Sampling(max_tokens=4)))
    engine.stop(60)
    assert first.ended in ('limit', 'turn') and {o.ended for o in others} == {'the engine has stopped'}




def test_a_short_one_does_not_wait_for_long_ones(lm, tok):
    "Four long replies on two places, and then a short one: it is said first, and all say what they would say alone."
    prompts = [text_ids(tok, t) for t in ('Once upon a time there was a', 'The sea was', 'In the year 1700 a ship', 'My name is')]
    how, engine = Sampling(temperature=0., guard=0, max_tokens=50), Engine(lm, tok, places=2, waiting=16)
    long = [engine.ask(Request(p, replace(how))) for p in prompts]
    long[0].out.get(timeout=60)
    short = engine.ask(Request(text_ids(tok, 'The cat sat on'), replace(how, max_tokens=4)))
    ''.join(short.pieces(120))
    assert not any(r.ended in ('turn', 'limit') for r in long) and max(len(r.ids) for r in long) < 50
    [''.join(r.pieces(120)) for r in long[1:]]; ''.join(p for p in iter(lambda: long[0].out.get(timeout=60), None))
    engine.stop()
    assert [r.text for r in long] == [alone(lm, tok, p, how) for p in prompts] and not engine.standing and not engine.reading


def test_a_long_prompt_is_read_between_the_words_of_others(lm, tok):
    "Whoever is in the middle of a sentence goes on while a newcomer with a thousand tokens is read."
    engine, how = Engine(lm, tok, places=4, room=2048), Sampling(temperature=0., guard=0, max_tokens=60)
    first = engine.ask(Request(text_ids(tok, 'Once upon a time there was a'), replace(how))); first.out.get(timeout=60)
    said, long = len(first.ids), text_ids(tok, 'Once upon a time there was a queen who never laughed. ' * 90)[:1000]
    new = engine.ask(Request(long, replace(how, max_tokens=4)))
    new.out.get(timeout=120)
    meanwhile = len(first.ids) - said
    ''.join(p for p in iter(lambda: first.out.get(timeout=60), None)); ''.join(p for p in iter(lambda: new.out.get(timeout=60), None))
    engine.stop()
    assert meanwhile >= len(long)//engine.piece - 1 and new.text == alone(lm, tok, long, replace(how, max_tokens=4))


def test_what_was_read_is_not_read_again(lm, tok):
    "The next line of a talk is read from where it goes on; another adapter's or another talk's memory is nobody's, and with a seed all is read."
    engine, how, read = Engine(lm, tok, places=3), Sampling(temperature=0., guard=0, max_tokens=5), []
    more = engine.read_some
    def watched(one):
        before = one[1].at if one[1] else engine.begin(one[0]).at
        more(one); read.append((one[0], one[1].at - before)) # the request itself: a number of one that is gone is given again
    engine.read_some = watched
    persona = text_ids(tok, 'You are the Queen of Hearts, and you shout at everybody who comes near to the tarts. ' * 16)
    def say(line, **kw):
        r = engine.ask(Request(persona + text_ids(tok, line), replace(how, **kw))); ''.join(r.pieces(60))
        assert r.text == alone(lm, tok, r.prompt, how), line
        return sum(n for o, n in read if o is r), len(r.prompt)
    say(' Hello there!')
    again, whole = say(' May I have a tart?')
    seeded = [say(' And a cup of tea?', seed=3)[0] for _ in range(3)]
    assert 0 < again < 12 < 2*engine.piece < whole and seeded == [whole - whole//engine.piece*engine.piece]*3 # at a whole piece
    one = engine.ask(Request(persona[:60] + text_ids(tok, ' The secret word is MARMALADE.'), replace(how))); ''.join(one.pieces(60))
    other = engine.ask(Request(persona[:60] + text_ids(tok, ' The secret word is'), replace(how))); ''.join(other.pieces(60))
    engine.stop()
    assert other.text == alone(lm, tok, other.prompt, how) and sum(len(o.ids) for o in engine.kept.all) <= engine.kept.most


def test_stopped_while_it_speaks(lm, tok):
    "A server that is told to stop lets a short reply be finished; a long one ends with a word on it when the time is over, whoever waits is told, and the stream is whole."
    import json, signal, socket, httpx, uvicorn
    from yothalia.characters import character_of
    from yothalia.prompts import PERSONA
    from yothalia.serve import Server, Stage, app_of
    stage = Stage({'queen': character_of([r for r in sample_rows() if r['character'] == 'queen-of-hearts'])}, Engine(lm, tok, 2, 1024, 8), PERSONA, adapter=False)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    server = Server(uvicorn.Config(app_of(stage), port=port, log_level='error', timeout_graceful_shutdown=20), stage.engine, grace=3)
    t = threading.Thread(target=server.run); t.start()
    while not server.started: time.sleep(.05)
    got = {}
    def ask(n):
        body = dict(model='queen', messages=[dict(role='user', content='Tell me a story.')], max_tokens=n, stream=True, temperature=0, logit_bias={str(i): -100 for i in stage.engine.ends})
        with httpx.stream('POST', f'http://127.0.0.1:{port}/v1/chat/completions', json=body, timeout=60) as r: got[n] = list(r.iter_lines())
    asked = [threading.Thread(target=ask, args=(n,)) for n in (6, 700)]
    for a in asked: a.start()
    while len(stage.engine.seated()) < 1: time.sleep(.05)
    time.sleep(.5); start = time.monotonic(); server.handle_exit(signal.SIGTERM, None)
    for a in asked: a.join(60)
    t.join(60)
    assert not t.is_alive() and time.monotonic() - start < 15 and not stage.engine.alive()
    assert got[6][-2] == 'data: [DONE]' and json.loads(got[6][-4][6:])['choices'][0]['finish_reason'] == 'length'
    assert got[700][-2] == 'data: [DONE]' and 'the server was stopped' in json.loads(got[700][-4][6:])['error']['message'] and len(got[700]) > 20


def test_a_first_word_that_goes_wrong(lm, tok):
    "Whoever can't be answered is told, has no place any more, and the others go on."
    how, engine = Sampling(temperature=0., guard=0, max_tokens=24), Engine(lm, tok, places=3)
    p = text_ids(tok, 'Once upon a time there was a')
    good = engine.ask(Request(p, replace(how))); good.out.get(timeout=60)
    short, long = (engine.ask(Request(q, replace(how, bias={5: 'x'}))) for q in (p, p*40))
    for r in (short, long): ''.join(r.pieces(60)); assert r.ended.startswith('TypeError')
    ''.join(p for p in iter(lambda: good.out.get(timeout=60), None))
    later = engine.ask(Request(p, replace(how))); ''.join(later.pieces(60)); engine.stop()
    assert good.text == later.text == alone(lm, tok, p, how) and not engine.seated()
