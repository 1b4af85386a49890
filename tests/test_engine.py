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
