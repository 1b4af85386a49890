"""Conversations: nothing is lost in the tree, a reply ends where it should, and what is kept of a prompt changes nothing."""
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch

pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings, strategies as st

from yothalia.characters import Character, character_of
from yothalia.session import Session, Voice
from yothalia.terminal import talk
from yothalia.sampling import PRESETS, Sampling, held_back, next_token, said_again
from yothalia.rows import sample_rows
from yothalia.models import load_model, load_tokenizer
from yothalia.prompts import find_template, render
from yothalia.files import DataError
from yothalia.rows import read_rows

ROOT = Path(__file__).parent.parent
os.environ['YOTHALIA_PROGRESS'] = 'off'


@pytest.fixture(scope='module')
def voice(): return Voice(load_model('smollm2-135m', 'fp32'), load_tokenizer('smollm2-135m'))


@pytest.fixture(scope='module')
def queen(): return character_of([r for r in sample_rows() if r['character'] == 'queen-of-hearts'])


class Parrot:
    "A voice that says what number of answer this is."
    def __init__(self, tok): self.tok, self.n = tok, 0
    def ask(self, r):
        self.n += 1; r.text, r.ended = f'Answer {self.n}.', 'turn'
        r.flow = iter([r.text]); return r


steps = st.lists(st.one_of(st.tuples(st.just('say'), st.sampled_from(['Hello.', 'Why?\nReally?', '你好', '{{user}}'])), st.tuples(st.just('again'), st.none()),
                           st.tuples(st.just('undo'), st.none()), st.tuples(st.just('edit'), st.just('Else.')), st.tuples(st.just('go'), st.integers(0, 12)),
                           st.tuples(st.just('thumb'), st.booleans()), st.tuples(st.just('greet'), st.none())), max_size=14)

@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps)
def test_nothing_is_lost(tmp_path_factory, voice, queen, steps):
    "Whatever is done in whatever order: no turn changes or goes, the path leads from the beginning to here, and it can be saved, loaded, and read as rows."
    s, seen = Session(Parrot(voice.tok), queen, 'Alice'), {}
    for what, value in steps:
        try:
            if what in ('say', 'again'): list(s.say(value) if what == 'say' else s.again())
            else: getattr(s, what)(*([] if value is None else [value]))
        except ValueError: pass
        for t in s.turns:
            assert seen.setdefault(t.id, (t.parent, t.role, t.text)) == (t.parent, t.role, t.text) and t.parent < t.id
        path = s.path()
        assert (path[-1].id if path else 0) == s.at and all(b.parent == a.id for a, b in zip(path, path[1:]))
    assert len(seen) == len(s.turns)
    log = s.save(tmp_path_factory.mktemp('log')/'talk.jsonl')
    new = Session(Parrot(voice.tok), queen, 'Alice'); new.load(log)
    assert (new.turns, new.at, new.greeting) == (s.turns, s.at, s.greeting)
    roles = [t.role for t in s.path()]
    if any(t.thumb < 0 for t in s.path()):  # a thumb down is a mark: such a reply is context, not learned
        try: assert not {t.text for t in s.path() if t.thumb < 0} & {r['reply'] for r in read_rows(log).rows} - {t.text for t in s.path() if t.thumb >= 0}
        except DataError: pass
    elif any(a == 'user' and b == 'assistant' for a, b in zip(roles, roles[1:])):
        rows, _ = read_rows(log)
        assert rows[-1]['reply'].endswith(next(t.text for t in s.path()[::-1] if t.role == 'assistant').splitlines()[-1]) or roles[-1] == 'user'


def test_what_is_kept_changes_nothing(voice, queen):
    "A voice that remembers what it has read says the same as one that reads everything anew, over ten turns, tries and branches; and it reads less."
    def ten(v, forget):
        s, read, whole = Session(v, queen, 'Alice', find_template('examples'), replace(PRESETS['lively'], max_tokens=12, seed=4), 1024), 0, 0
        for k, line in enumerate(('Good morning!', 'Any tarts?', 'Who is that?', 'May I play croquet?')):
            for how in (lambda: s.say(line), s.again) if k % 2 else (lambda: s.say(line),):
                if forget: v.kept, v.cache = [], None
                list(how()); read += s.last.read; whole += len(s.last.prompt)
        return [t.text for t in s.turns], read, whole
    a, read, whole = ten(Voice(voice.model, voice.tok), False); b, all_of_it, _ = ten(Voice(voice.model, voice.tok), True)
    assert a == b and all_of_it == whole and read < .8*whole


def test_ends_before_the_person_speaks(voice):
    "A model that goes on with the person's line is cut there, in one piece or drop by drop; nothing of the stop text is ever shown."
    words = 'I see.\nAlice: And what do you see?'
    ids = voice.tok(words, add_special_tokens=False)['input_ids']
    class Fixed(Voice):
        def listen(self, *_): self.left = iter([*ids, voice.tok.eos_token_id]); return self.one(), 1
        def step(self, *_): return self.one()
        def one(self): return torch.nn.functional.one_hot(torch.tensor(next(self.left)), len(voice.tok)).float()
    s = Session(Fixed(voice.model, voice.tok), Character('Tom', {'en': 'You are Tom.'}), 'Alice', sampling=PRESETS['greedy'])
    said = list(s.say('What do you see?'))
    assert ''.join(said) == s.path()[-1].text == 'I see.' and s.last.ended == 'stop text'
    assert held_back('I see.\nAl', s.stops()) == 3


def test_broken_off(voice, queen):
    "Ctrl-C in the middle of a reply: what was said stays, and the talk goes on."
    s = Session(voice, queen, 'Alice', sampling=replace(PRESETS['greedy'], max_tokens=20))
    heard = s.say('Tell me about croquet.'); first = next(heard)
    heard.close()
    assert s.path()[-1].text.startswith(first.strip()) and s.path()[-1].ended == 'broken off'
    list(s.say('Go on.')); assert [t.role for t in s.path()] == ['user', 'assistant']*2


def test_guard():
    "Without the guard the likeliest token comes for ever; with it no run of n tokens is said twice."
    logits, said = torch.arange(40.).flip(0), []
    for _ in range(60): said.append(next_token(logits.clone(), said, Sampling(temperature=0., guard=3)))
    runs = [tuple(said[k:k+3]) for k in range(len(said)-2)]
    assert len(set(runs)) == len(runs)
    assert next_token(torch.ones(1), [0]*9, Sampling(guard=2)) == 0  # where nothing else is left
    assert said_again([0, 0, 0], 1) == {0}


def test_typed(tmp_path):
    "The command as a user types it: an answer, a wrong command, a log that a second talk goes on with; and a place that is none."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore', 'COLUMNS': '300'}
    from yothalia.characters import make_card
    card = make_card([r for r in sample_rows() if r['character'] == 'brasswick']).save(tmp_path/'brasswick.png')
    def typed(text, *args):
        return subprocess.run([sys.executable, '-c', 'from yothalia.commands import app; app()', 'chat', *args], input=text, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=240)
    log = tmp_path/'log.jsonl'
    got = typed(f'Good morning!\n/agian\n/save {log}\n', str(card), '--new-tokens', '8', '--user', 'Alice')
    assert got.returncode == 0, got.stderr[-2000:]
    assert 'did you mean /again' in got.stdout and 'Saved as' in got.stdout and log.exists()
    more = typed('/tree\n', str(card), '--log', str(log), '--new-tokens', '4')
    assert 'user: Good morning!' in more.stdout
    wrong = typed('', 'nothing-there'); assert wrong.returncode == 1 and 'no card, adapter or run' in wrong.stdout and 'Traceback' not in wrong.stderr
