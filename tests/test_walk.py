"""Rows as people have them, walked from the file to the end: data, LoRA, quantization, benchmark, profiling."""
import importlib, inspect, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

os.environ |= dict(MPLBACKEND='agg', YOTHALIA_PROGRESS='off')
from yothalia.findings import findings
from yothalia.runner import JOBS, STEPS, job_notebook, look_first, plan, room, without_lessons
from yothalia.core import *
from yothalia.cleaning import label_rows
from yothalia.rows import sample_rows
from yothalia.files import DataError

ROOT, BIN = Path(__file__).parent.parent, Path(sys.executable).parent
TINY = ['train_rows=3', 'valid_rows=1', 'evals=1', 'batch=3', 'replies=1', 'reply_tokens=2', 'precisions=[bf16]', 'loss_rows=1', 'prompts=1', 'new_tokens=2',
        'tracks=[speaker, random]', 'questions=1', 'modes=[cloze]', 'iteration_rows=1', 'iteration_questions=1', 'matmul_size=256', 'lines=1', 'facts=0']
MORE = {'alpaca': ['merged=true', 'batch=1', 'evals=3'], 'transcript': ['precisions=[nf4]', 'modes=[cloze, letter, generate]']}  # for the walks by command


def the_run(step, cfg):
    "Execute a notebook's run in this process, with the module's own definitions instead of the exported cells."
    cells = without_lessons(json.loads(job_notebook(step).read_text()))['cells']
    module = importlib.import_module(f'yothalia.{room(JOBS[step].notebook or step)}')
    space = {k: v for k, v in vars(module).items() if callable(v) or inspect.ismodule(v) or not k.islower()} | {'__name__': '__main__'}
    for c in cells:
        text, tags = ''.join(c['source']), c['metadata'].get('tags', [])
        body = '\n'.join(l for l in text.splitlines() if not l.startswith('#|'))
        imports = all(l.startswith(('import ', 'from ')) for l in body.strip().splitlines())
        if c['cell_type'] == 'code' and 'skip-execution' not in tags and (imports or not text.startswith('#| export')): exec(body, space)
        if 'parameters' in tags: space.update(cfg.model_dump())


def of(character, n, lang=None): return [r for r in sample_rows() if r['character'] == character and lang in (None, r['lang'])][:n]


def alpaca():
    "One character, no persona anywhere, replies of one to five words among them."
    short = ['Yes.', 'No.', 'Never.', 'Perhaps tomorrow.', 'I could eat.', 'Ask the cat.', 'Not before tea, dear.']
    rows = [dict(instruction=r['user'], input='', output=r['reply']) for r in (*of('captain-marrow', 36), *of('baba-yaga', 24))]
    for i in range(0, 28, 4): rows[i]['output'] = short[i//4]
    return 'my_girl.json', json.dumps(rows, ensure_ascii=False), []


def messages():
    "OpenAI messages of up to 20 turns."
    rows, out = of('sherlock-holmes', 36), []
    for i, n in ((0, 10), (10, 8), (18, 3), (21, 1), (22, 6), (28, 8)):
        talk = [m for r in rows[i:i+n] for m in (dict(role='user', content=r['user']), dict(role='assistant', content=r['reply']))]
        out.append(json.dumps(dict(messages=[dict(role='system', content=rows[0]['instruction']), *talk])))
    return 'chats.jsonl', '\n'.join(out), []


def transcript():
    "A play with six speakers, of whom one is the character."
    lines, names, extra = of('queen-of-hearts', 30), ['Alice', 'The Hatter', 'White Rabbit', 'Knave', 'Duchess'], []
    for i, r in enumerate(lines): extra += [f"{names[i % 5]}: {r['user']}", f"{names[(i+1) % 5]}: Mind your head, {i}." if i % 3 == 0 else '(A croquet ball rolls by.)', f"QUEEN: {r['reply']}"] + ([''] if i % 2 else [])
    return 'play.txt', '\n'.join(extra), ['character=queen', 'persona=You are the Queen of Hearts.']


def tavern():
    "A SillyTavern log."
    lines = [dict(user_name='You', character_name='Marrow', create_date='2026-1-1', chat_metadata={}), dict(name='Marrow', is_user=False, mes='*drifts in* Tea?')]
    for r in of('captain-marrow', 30): lines += [dict(name='You', is_user=True, mes=r['user']), dict(name='Marrow', is_user=False, is_system=False, mes=r['reply'], swipes=[r['reply']])]
    return 'Marrow - 2026-1-1.jsonl', '\n'.join(map(json.dumps, lines)), ['persona=You are Captain Marrow, ghost of a pirate.', 'tracks=[speaker, voice]', 'questions=3']


def japanese():
    "40 rows in Japanese, some in kanji alone."
    things = '月 雨 猫 犬 桜 山 海 風 雪 星 川 森 花 鳥 魚 本 茶 酒 米 塩 火 水 土 木 金 石 砂 雲 雷 虹 朝 昼 夜 春 夏 秋 冬 道 橋 門'.split()
    says = ['{}ならば、わしが若いころに三つほど拾ってな、まだ蔵にしまってあるぞ。', 'やれやれ、{}の話をすると長くなる。まずは座って、お茶でも飲みなさい。', '{}は毎日、{}のように静かで、時々わしより賢いのう。', '東京見物']
    rows = [dict(persona='あなたは山奥に住む古い狸です。', user=f'{t}について教えてください。', reply=says[i % 4].format(t, things[-i-1]) + ('' if i % 4 < 3 else t)) for i, t in enumerate(things)]
    return 'tanuki.csv', None, rows


def two_languages():
    "One character in two languages."
    return 'yothalia.jsonl', '\n'.join(json.dumps(dict(persona=r['instruction'], user=r['user'], reply=r['reply'], character='yothalia'), ensure_ascii=False) for lang in ('zh', 'en') for r in of('yothalia', 20, lang)), []


def long_replies():
    "Replies of 3,000 characters."
    rows, long = [r for r in sample_rows() if r['lang'] == 'en'], []
    for i in range(16): long.append(dict(persona='You are a tireless storyteller.', user=rows[i]['user'] + f' Tell me all, part {i}.', reply=' '.join(r['reply'] for r in rows[i*14+1:i*14+26])[:3000]))
    return 'long.jsonl', '\n'.join(map(json.dumps, long)), []


def long_personas():
    "Two characters with personas of some 2,000 tokens."
    rows, out = [r for r in sample_rows() if r['lang'] == 'en'], []
    for k, c in enumerate(('brasswick', 'don-quixote')):
        persona = f"You are {c}. " + ' '.join(r['reply'] for r in rows[k*100:k*100+90])[:8400]
        out += [dict(persona=persona, character=c, user=r['user'], reply=r['reply']) for r in of(c, 10)]
    return 'cards.jsonl', '\n'.join(map(json.dumps, out)), ['train_rows=1', 'tracks=[speaker]']


def twelve():
    "12 rows in all: too few for some tracks."
    return 'few.csv', None, [dict(persona=r['instruction'], user=r['user'], reply=r['reply']) for r in of('li-bai', 12)]


def written(make, folder):
    "The file of a set, and what is said of it on the command line."
    name, text, given = make()
    if text is None:
        import csv
        with (folder/name).open('w', newline='', encoding='utf-8') as f: w = csv.DictWriter(f, list(given[0])); w.writeheader(); w.writerows(given)
        return folder/name, []
    (folder/name).write_text(text, encoding='utf-8')
    return folder/name, given


def ended(out, steps=STEPS):
    "What every walk must leave."
    got = {room(s): load_records(out/'records', step=room(s)) for s in steps}
    assert all(got.values()), {s: len(r) for s, r in got.items()}
    assert (out/'adapter'/'seal.json').exists() and findings(out)
    return got


def same_merged(out):
    "The merged model says what base and adapter say."
    import torch
    from yothalia.models import load_model, load_tokenizer
    ids = load_tokenizer('smollm2-135m')('Who are you, and what is in the pot?', return_tensors='pt')['input_ids']
    with torch.inference_mode(): one, two, base = (m(ids).logits[0].float().log_softmax(-1) for m in (load_model(str(out/'merged')), load_model(adapter=str(out/'adapter')), load_model()))
    apart = lambda a, b: float((a-b).abs().mean())
    assert 0 < apart(one, two) < apart(base, two)/2, (apart(one, two), apart(base, two))  # weights in bf16 are rounded, and no more


@pytest.mark.parametrize('make', [alpaca, tavern, twelve], ids=lambda m: m.__name__)
def test_walk_measures(make, tmp_path):
    "The rooms that a run does on request, on rows without personas, of one character, and on twelve rows."
    path, given = written(make, tmp_path)
    few = ['questions=2', 'templates=[rules, examples]', 'new_tokens=2', 'lines=1', 'characters=1', 'train_sizes=[0, 3]', 'loss_rows=2', 'reply_lines=1',
           'factors={learning_rate: [2.0e-3]}', 'rate.steps=8', 'test_rows=1', 'epochs=1.0', 'copies=[0, 2]', 'secrets=1',
           'candidates=5', 'after=[1.0]']
    given = [g for g in given if not g.startswith(('questions=', 'tracks='))]
    steps = ['01_data', 'templates', '02_lora', 'replies', 'curve', *(['rate', 'sweep', 'specificity'] if make is twelve else ['leaks'] if make is tavern else [])]
    planned = plan({}, [*TINY, *given, *few, f'data={path}', f'out={tmp_path}/out'], steps)
    for step, cfg in planned.items(): the_run(step, cfg)
    got = {s: load_records(tmp_path/'out'/'records', step=s) for s in ('templates', 'replies', 'curve')}
    assert len(got['templates']) == (3 if make is tavern else 0) and len(got['curve']) == 2, got
    if make is twelve: assert len(load_records(tmp_path/'out'/'records', step='sweep')) == 3 and load_records(tmp_path/'out'/'records', step='rate')
    if make is tavern: assert load_records(tmp_path/'out'/'records', step='leaks')
    conditions = {'base', 'lora', 'author', 'author, cut'} | ({'prompt', 'both', 'parrot'} if make is not alpaca else set())
    assert {r['what']['condition'] for r in got['replies']} == conditions, got['replies']


@pytest.fixture
def command(request, tmp_path):
    "The command line that walks a set of rows, each notebook in a kernel of its own, and the folder of its run."
    make = request.param
    name = f'test-walk-{make.__name__}'
    shutil.rmtree(ROOT/'_runs'/name, ignore_errors=True)
    path, given = written(make, tmp_path)
    args = [a for g in (*TINY, *MORE[make.__name__], *given, f'data={path}') for a in ('-p', g)]
    yield [str(BIN/'yothalia'), 'run', '--name', name, *args], ROOT/'_runs'/name
    shutil.rmtree(ROOT/'_runs'/name)


def run(cmd): return subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, timeout=900)


def interrupted(cmd, out):
    "What a run says that gets Ctrl-C in the middle of the training, after its first checkpoint."
    p = subprocess.Popen(cmd, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background job ignores Ctrl-C, and hands that down
    deadline = time.time() + 240
    while not list((out/'checkpoints').glob('*/checkpoint-*/seal.json')):
        assert p.poll() is None and time.time() < deadline, p.stdout.read()
        time.sleep(.1)
    os.killpg(p.pid, signal.SIGINT)
    said = p.communicate(timeout=120)[0]
    assert p.returncode == 130, said
    return said


@pytest.mark.parametrize('command', [alpaca], ids=lambda m: m.__name__, indirect=True)
def test_walk_interrupted(command):
    "Without personas, interrupted in the training; the same command goes on to the end and repeats nothing that was done."
    cmd, out = command
    said = interrupted(cmd, out)
    assert 'goes on from there' in said and 'prompt and both are left out' in said, said
    assert not (out/'adapter').exists() and (out/'02_lora.ipynb').exists()
    got = run(cmd)
    assert got.returncode == 0 and '01_data  done before, skipped' in got.stdout, got.stdout[-3000:] + got.stderr[-2000:]
    assert {r['what']['condition'] for r in ended(out)['benchmark']} - {'none'} == {'base', 'lora'}
    assert 'my-girl' in got.stdout, got.stdout
    same_merged(out)
    assert run(cmd).stdout.count('skipped') == len(STEPS)
    other = run([*cmd, '-p', 'seed=5', '--steps', '01_data'])  # all that follows depends on it
    assert other.stdout.count('skipped') == 0 and other.returncode == 0, other.stdout


@pytest.mark.parametrize('command', [transcript], ids=lambda m: m.__name__, indirect=True)
def test_walk_by_command(command):
    cmd, out = command
    got = run(cmd)
    assert got.returncode == 0, got.stdout[-3000:] + got.stderr[-2000:]
    assert {r['what']['condition'] for r in ended(out)['benchmark']} - {'none'} == {'base', 'prompt', 'lora', 'both'} and 'QUEEN' in got.stdout


@pytest.mark.parametrize('make', [long_personas, long_replies, two_languages, messages, japanese, twelve, tavern], ids=lambda m: m.__name__)
def test_walk(make, tmp_path):
    path, given = written(make, tmp_path)
    steps = STEPS if make in (long_personas, twelve) else ('01_data', '02_lora', '04_benchmark')  # what precision and profile do is not up to the rows' form
    planned = plan({}, [*TINY, f'data={path}', *given, f'out={tmp_path}/out'], steps)
    look_first(planned)
    for step in steps: the_run(step, planned[step])
    got = ended(tmp_path/'out', steps)
    what = got['data'][0]['what']
    rows = [r for p in ('train', 'valid', 'test') for r in read_jsonl(tmp_path/'out'/'data'/f'{p}.jsonl')]
    if make is messages: assert max(len(r['history']) for r in rows) >= 2 and what['characters'] == 1 and {r['character'] for r in rows} == {'sherlock-holmes'}
    if make is japanese: assert set(what['languages']) == {'ja'}, what['languages']
    if make is two_languages: assert set(what['languages']) == {'zh', 'en'} and what['characters'] == 1
    if make is tavern:
        assert {r['character'] for r in rows} == {'Marrow'} and any(r['history'] for r in rows)
        rules = {r['what']['track']: r for r in got['benchmark'] if r['what']['mode'] == 'rules'}  # what is asked of a character alone
        assert set(rules) == {'own', 'random'} and 'learned from the choices' in rules['own']['metrics'], rules
    if make is long_replies: assert max(len(r['reply']) for r in rows) == 3000 and got['lora'][0]['metrics']['dropped rows']['value'] == 0
    if make is long_personas: assert any(r['what']['track'] == 'speaker' and r['what']['mode'] == 'cloze' for r in got['benchmark'])
    if make is twelve: assert {r['what']['track'] for r in got['benchmark']} == {'random'}  # one character: nobody else could have said it
