"Exports: a server that answers as vLLM does, servers that do not, and the commands as a user types them."
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np, pytest, torch
from typer.testing import CliRunner

from yothalia.core import rooted
from yothalia.rows import lesson_rows
from yothalia.commands import app
from yothalia.export import *
from yothalia.verify import *
from yothalia.lora import LoraConfig, add_lora
from yothalia.convert import EMBEDDED, ModelError
from yothalia.models import load_model, load_tokenizer, switched
from yothalia.prompts import PERSONA
from yothalia.questions import make_tracks

class Engine(BaseHTTPRequestHandler):
    "Answers /v1/completions with prompt_logprobs and /tokenize as vLLM does, by a real model; `mode` makes it misbehave."
    model = tok = key = None
    mode = ''
    def log_message(self, *_): pass
    def say(self, what, code=200):
        body = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(code); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_POST(self):
        q = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if self.key and self.headers.get('Authorization') != f'Bearer {self.key}': return self.say(dict(error=dict(message='no key')), 401)
        if self.mode == 'broken': return self.say(dict(error='out of order'), 500)
        if self.mode == 'nonsense': return self.say(b'<html>')
        if self.path == '/tokenize': return self.say(dict(tokens=self.tok.apply_chat_template(q['messages'], add_generation_prompt=True, tokenize=True, return_dict=False)))
        ids = torch.tensor([q['prompt']])
        with torch.inference_mode(): logp = self.model(ids).logits[0].float().log_softmax(-1)
        of = [None] + [{str(t): dict(logprob=float(logp[i, t]), rank=1, decoded_token='')} for i, t in enumerate(q['prompt'][1:])]
        self.say(dict(choices=[dict(text='x', prompt_logprobs=None if self.mode == 'without' else of)]))

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A model with an adapter that changes every reply, what it is asked, and a server."
    torch.manual_seed(0)
    model, tok = add_lora(load_model(EMBEDDED, 'fp32'), LoraConfig(rank=4)), load_tokenizer(EMBEDDED)  # what 16 bits round, the server may round otherwise
    for n, p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.15)
    rows = lesson_rows(3)[:5]
    asked = Asked(rows, make_tracks(lesson_rows(4), ['speaker'], 1, 4)['speaker'], PERSONA)
    Engine.model, Engine.tok = model.eval(), tok
    server = ThreadingHTTPServer(('127.0.0.1', 0), Engine); threading.Thread(target=server.serve_forever, daemon=True).start()
    tested = answers_of(asked, tok, by_model(model))
    with switched(model, False): base = answers_of(asked, tok, by_model(model))
    yield dict(model=model, tok=tok, asked=asked, url=f'http://127.0.0.1:{server.server_port}/v1', tested=tested, base=base)
    server.shutdown()

@pytest.fixture(autouse=True)
def behave(monkeypatch): monkeypatch.setattr(Engine, 'mode', ''); monkeypatch.setattr(Engine, 'key', None)

def served(w): return compare_export(w['tok'], w['tested'], w['base'], .01, answers_of_server(w['asked'], w['url'], 'holmes', w['tok']), w['tested'])

def test_a_served_model_is_verified(world):
    v = served(world)
    assert v.same, v
    assert v.checks['prompt'][0] and v.checks['weights'][0] and abs(v.metrics['share kept']['value'] - 1) < .1

def test_a_server_without_the_adapter_is_found_out(world):
    with switched(world['model'], False): v = served(world)
    assert not v.same and 'not applied' in v.checks['weights'][1], v

def test_a_server_with_another_template_is_found_out(world, monkeypatch):
    other = load_tokenizer(EMBEDDED); other.chat_template = other.chat_template.replace('<|im_start|>', '<|im_start|> ')
    monkeypatch.setattr(Engine, 'tok', other)
    v = served(world)
    assert not v.same and not v.checks['prompt'][0] and 'another chat template' in v.checks['prompt'][1], v

@pytest.mark.parametrize('mode,words', [('broken', '500'), ('without', 'prompt_logprobs'), ('nonsense', 'JSON')])
def test_servers_that_cannot_be_asked(world, monkeypatch, mode, words):
    monkeypatch.setattr(Engine, 'mode', mode)
    with pytest.raises(ModelError, match=words): served(world)

def test_the_key_comes_from_the_environment(world, monkeypatch):
    monkeypatch.setattr(Engine, 'key', 'very-secret-key'); monkeypatch.delenv('YOTHALIA_API_KEY', raising=False)
    with pytest.raises(ModelError, match='401'): served(world)
    monkeypatch.setenv('YOTHALIA_API_KEY', 'very-secret-key')
    assert served(world).same

def test_nobody_is_there(world):
    with pytest.raises(ModelError, match='does not answer'): answers_of_server(world['asked'], 'http://127.0.0.1:9/v1', 'x', world['tok'])

def test_commands_say_what_is_missing(tmp_path):
    def said(*args, code=1):
        got = CliRunner().invoke(app, list(args), env=dict(COLUMNS='200', NO_COLOR='1', TERM='dumb'))
        assert got.exit_code == code, got.output
        return ' '.join(got.output.split())
    assert 'no trained adapter' in said('export', '--name', 'no-such-run')
    assert 'no trained adapter' in said('verify', str(tmp_path), '--name', 'no-such-run')
    assert 'no folder with files' in said('push', str(tmp_path/'nothing'), 'me/x')
    (tmp_path/'config.json').write_text('{"token": "hf_' + 'a'*20 + '"}'); (tmp_path/'README.md').write_text('x')
    assert 'something like a token' in said('push', str(tmp_path), 'me/x')
    (tmp_path/'config.json').write_text('{}')
    assert 'Nothing was sent' in said('push', str(tmp_path), 'me/x', code=0)
