"""Real engines behind: what a vLLM scores and says is what this project's own engine scores and says; llama.cpp's server; several of both behind an nginx, as the guide has it. `YOTHALIA_VLLM` and `YOTHALIA_LLAMA` name their commands, for example in an environment of its own."""
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest

ROOT = Path(__file__).parent.parent
VLLM, LLAMA = os.environ.get('YOTHALIA_VLLM'), os.environ.get('YOTHALIA_LLAMA')
with_vllm = pytest.mark.skipif(not VLLM, reason='YOTHALIA_VLLM names no vLLM')
with_llama = pytest.mark.skipif(not LLAMA, reason='YOTHALIA_LLAMA names no llama-server')
ENV = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='2', VLLM_NO_USAGE_STATS='1', DO_NOT_TRACK='1')


@pytest.fixture
def vllm(tmp_path):
    "Starts a vLLM with the default model, and ends it."
    from yothalia.models import resolve_model
    started = []
    def start(*more):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        log = (tmp_path/'vllm.log').open('w')
        p = subprocess.Popen([VLLM, 'serve', resolve_model('smollm2-135m'), '--served-model-name', 'small', '--host', '127.0.0.1', '--port', str(port), '--max-model-len', '2048',
                              '--dtype', 'float32', '--enforce-eager', *more], env=ENV, stdout=log, stderr=subprocess.STDOUT)
        started.append(p); end = time.monotonic() + 300
        while True:
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=1); return f'http://127.0.0.1:{port}/v1'
            except OSError:
                assert p.poll() is None and time.monotonic() < end, (tmp_path/'vllm.log').read_text()[-2000:]
                time.sleep(.5)
    yield start
    for p in started:
        p.terminate()
        try: p.wait(30)
        except subprocess.TimeoutExpired: p.kill()


@with_vllm
def test_scores_and_replies(vllm):
    "Log-likelihoods of replies to a thousandth of a nat, a letter by log-probabilities, and the same greedy replies."
    from yothalia.behind import Behind
    from yothalia.asking import question_item
    from yothalia.sampling import Sampling
    from yothalia.contestants import Contestant
    from yothalia.rows import sample_rows
    from yothalia.engine import Engine, Request
    from yothalia.models import load_model, load_tokenizer
    from yothalia.prompts import PERSONA, render
    from yothalia.rendering import text_ids
    from yothalia.questions import make_tracks
    from yothalia.scoring import score_items
    url, tok, lm = vllm(), load_tokenizer('smollm2-135m'), load_model('smollm2-135m', 'fp32')
    rows = sample_rows()[:120]
    qs = make_tracks(rows, ['random'], 4, 5, 0)['random'][:4]
    items = [question_item(q, tok, PERSONA, 128) for q in qs]
    one = Contestant('openai:small', url, 4, tok=tok)
    own, theirs = dict(score_items(lm, items)), dict(one.score_items(items))
    assert max(np.abs(np.array(own[k]) - np.array(theirs[k])).max() for k in own) < .005
    assert one.climb(qs[0]) == 'logprobs' and len(one.in_all_orders(qs[0], True)['letter']) == 5
    how = Sampling(temperature=0., guard=0, max_tokens=16)
    prompts = [text_ids(tok, render(r, tok)[0]) for r in rows[:4]]
    def said(engine):
        asked = [engine.ask(Request(p, replace(how))) for p in prompts]
        out = [''.join(r.pieces(120)) for r in asked]; engine.stop(); return out
    behind, again = Behind(tok, url, 'small'), Behind(tok, url, 'small')
    assert said(behind) == said(Engine(lm, tok)) and behind.takes_ids
    again.look(); assert set(again.can.values()) == {'yes'}, again.can
    own = Engine(lm, tok) # how likely the words were, by either
    a, b = (e.ask(Request(prompts[0], replace(how), likely=3)) for e in (again, own))
    assert ''.join(a.pieces(120)) == ''.join(b.pieces(120)); again.stop(); own.stop()
    assert [t for t, *_ in a.shown] == [t for t, *_ in b.shown] and np.allclose([p for _, p, _ in a.shown], [p for _, p, _ in b.shown], atol=.005)
    assert {i for i, _ in b.shown[0][2]} <= {i for i, _ in a.shown[0][2]}


@with_vllm
def test_adapter_by_name(vllm, tmp_path):
    "An adapter that vLLM loads from its folder and calls by a name is worn by the character that has it."
    from yothalia.adapters import load_adapters, random_adapters
    from yothalia.behind import Behind
    from yothalia.sampling import Sampling
    from yothalia.rows import sample_rows
    from yothalia.engine import Engine, Request
    from yothalia.models import load_model, load_tokenizer
    from yothalia.prompts import render
    from yothalia.rendering import text_ids
    pm = random_adapters(['knight'])
    for n, p in pm.named_parameters():
        if 'lora_B' in n: p.data *= 10  # so that it is heard
    pm.save_pretrained(tmp_path)
    url, tok = vllm('--enable-lora', '--max-lora-rank', '8', '--lora-modules', f'knight={tmp_path/"knight"}'), load_tokenizer('smollm2-135m')
    prompt, how = text_ids(tok, render(sample_rows()[0], tok)[0]), Sampling(temperature=0., guard=0, max_tokens=12)
    def said(engine):
        # one after the other: vLLM 0.32 on a CPU mixes up adapters that share a step
        out = [''.join(engine.ask(Request(prompt, replace(how), on=o)).pieces(120)) for o in ('knight', False)]; engine.stop(); return out
    theirs = said(Behind(tok, url, 'small'))
    assert theirs == said(Engine(load_adapters(load_model('smollm2-135m', 'fp32'), {'knight': tmp_path/'knight'}), tok)) and theirs[0] != theirs[1]


@with_llama
def test_llama():
    "llama.cpp does all but score a prompt, and says how likely its words were."
    from yothalia.behind import Behind, engine_command, free_port, started
    from yothalia.convert import embedded_gguf
    from yothalia.models import load_tokenizer
    from yothalia.sampling import Request, Sampling
    tok, (cmd, name) = load_tokenizer('smollm2-135m'), engine_command('llama.cpp', str(embedded_gguf()), at := free_port(), LLAMA)
    with started(cmd, at, name) as running:
        behind = Behind(tok, running.url, name)
        behind.look()
        assert {k for k, v in behind.can.items() if v != 'yes'} == {'those of a prompt'}, behind.can
        r = behind.ask(Request(tok('Once upon a time there was')['input_ids'], Sampling(temperature=0., max_tokens=6), likely=2))
        said = ''.join(r.pieces(60)); behind.stop()
        assert said and tok.decode([t for t, *_ in r.shown]).strip() == said.strip() and all(p <= 0 and len(top) == 2 for _, p, top in r.shown)


@with_llama
@pytest.mark.skipif(not shutil.which('nginx'), reason='there is no nginx')
def test_several_machines(tmp_path):
    "The guide's nginx before two engines and two servers; when one of each is gone, requests are answered all the same."
    from yothalia.behind import engine_command, free_port
    from yothalia.convert import embedded_gguf
    from yothalia.data import DataConfig, prepare
    for name in ('nbs', 'yothalia', 'runs'): (tmp_path/name).symlink_to(ROOT/name)
    for f in ('settings.ini', 'README.md'): shutil.copy(ROOT/f, tmp_path/f)
    os.environ['YOTHALIA_ROOT'] = str(tmp_path)
    try: prepare(DataConfig(data='lesson', out='_runs/page'))
    finally: del os.environ['YOTHALIA_ROOT']
    ports = {k: free_port() for k in ('10.0.0.1:8001', '10.0.0.2:8001', '10.0.0.3:8000', '10.0.0.4:8000', '127.0.0.1:8001', '127.0.0.1:8000')}
    [conf] = re.findall(r'```nginx\n(.*?)```', (ROOT/'nbs/guides/serving.md').read_text(), re.S)
    for k, at in ports.items(): conf = conf.replace(k, f'127.0.0.1:{at}')
    (tmp_path/'nginx.conf').write_text(f'daemon off;\npid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\n' + conf.replace('http {', 'http {\n  access_log off;'))
    engines, servers, (front, name) = list(ports.values())[:2], list(ports.values())[2:4], (ports['127.0.0.1:8000'], str(embedded_gguf()))
    serve = [sys.executable, '-c', 'from yothalia.commands import app; app()', 'serve', 'page', '--engine', f'http://127.0.0.1:{ports["127.0.0.1:8001"]}/v1', '--engine-model', 'm', '--port']
    env, quiet = os.environ | dict(YOTHALIA_ROOT=str(tmp_path), PYTHONPATH=str(ROOT)), dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    all_ = [subprocess.Popen(engine_command('llama.cpp', name, at, LLAMA)[0], **quiet) for at in engines]
    all_ += [subprocess.Popen(serve + [str(at)], cwd=tmp_path, env=env, **quiet) for at in servers]
    all_.append(subprocess.Popen(['nginx', '-c', str(tmp_path/'nginx.conf'), '-p', str(tmp_path)], **quiet))
    def said(who='yothalia'):
        body = json.dumps(dict(model=who, messages=[dict(role='user', content='Good morning!')], max_tokens=6)).encode()
        got = urllib.request.urlopen(urllib.request.Request(f'http://127.0.0.1:{front}/v1/chat/completions', body), timeout=60)
        return json.loads(got.read())['choices'][0]['message']['content']
    try:
        for at in engines + servers:
            end = time.monotonic() + 120
            while True:
                try: urllib.request.urlopen(f'http://127.0.0.1:{at}/health', timeout=1); break
                except OSError: assert time.monotonic() < end; time.sleep(.3)
        who = json.loads(urllib.request.urlopen(f'http://127.0.0.1:{front}/v1/models', timeout=10).read())['data'][0]['id']
        assert all(said(who).strip() for _ in range(4))
        for p in (all_[0], all_[2]): p.kill(); p.wait(10)
        assert all(said(who).strip() for _ in range(6))
    finally:
        for p in all_: p.terminate()
        for p in all_: p.wait(40)
