"""The commands that stand in the README and in the guides, as they stand."""
import csv, os, re, shlex, shutil, subprocess, sys
from pathlib import Path

import pytest, typer

from yothalia.commands import app
from yothalia.core import load_records, read_jsonl
from yothalia.data import lesson_data
from yothalia.runner import JOBS, room

ROOT, BIN = Path(__file__).parent.parent, Path(sys.executable).parent
PAGES = [ROOT/'README.md', ROOT/'CONTRIBUTING.md', *sorted((ROOT/'nbs/guides').glob('*.md'))]


def lines_of(page):
    "The lines of a page's shell blocks, without comments; continued lines are one."
    blocks = re.findall(r'```bash\n(.*?)```', page.read_text(encoding='utf-8'), re.S)
    return [l for b in blocks for l in b.replace('\\\n', ' ').splitlines() if l.strip() and not l.startswith('#')]


COMMANDS = [(p.name, l) for p in PAGES for l in lines_of(p) if re.match(r'(\S*/)?yothalia ', l)]


@pytest.mark.parametrize('page, line', COMMANDS, ids=[f'{p}-{i}' for i, (p, _) in enumerate(COMMANDS)])
def test_a_command_is_understood(page, line):
    "Each `yothalia …` names a command and options that there are."
    _, name, *args = shlex.split(line.split(' > ')[0], comments=True)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, [a for a in args if a != '…'])


def test_step_names_in_the_pages():
    "`--steps` names steps that there are."
    for p in PAGES:
        for some in re.findall(r'--steps ([\w,]+)', p.read_text(encoding='utf-8')):
            assert {room(s) for s in some.split(',')} <= set(map(room, JOBS)), (p.name, some)


@pytest.fixture
def mine(tmp_path):
    "A folder with the project's notebooks and somebody's rows."
    for name in ('nbs', 'yothalia', 'runs', 'results'): (tmp_path/name).symlink_to(ROOT/name)
    for f in ('settings.ini', 'README.md'): shutil.copy(ROOT/f, tmp_path/f)
    with (tmp_path/'my_rows.csv').open('w', newline='', encoding='utf-8') as f:
        w = csv.writer(f)
        w.writerow(['persona', 'user', 'reply'])
        w.writerows([r['instruction'], r['user'], r['reply']] for r in lesson_data())
    return tmp_path


def test_papermill_as_the_guide_says(mine):
    "The two lines of the guide train on all rows; a folder without rows, and an unknown name, are one sentence."
    env = os.environ | dict(YOTHALIA_ROOT=str(mine), PYTHONPATH=str(ROOT), PATH=f'{BIN}:{os.environ["PATH"]}', YOTHALIA_PROGRESS='off')
    def sh(line): return subprocess.run(shlex.split(line) + ['--no-progress-bar'], cwd=mine, env=env, capture_output=True, text=True, timeout=900)
    make, *some = [l for l in lines_of(ROOT/'nbs/guides/papermill.md') if l.startswith(('mkdir', 'papermill nbs'))]
    assert len(some) == 2 and make.startswith('mkdir')
    subprocess.run(shlex.split(make), cwd=mine, check=True)
    astray = sh(some[1].replace('-p out _runs/ghost', '-p out _runs/gohst'))
    assert astray.returncode and '_runs/gohst has no rows' in astray.stderr, astray.stderr[-1500:]
    bad = sh(some[0] + ' -p sead 3')
    assert bad.returncode and "did you mean 'seed'" in bad.stderr, bad.stderr[-1500:]
    for line in some:
        got = sh(line)
        assert got.returncode == 0, got.stderr[-3000:]
    train = read_jsonl(mine/'_runs/ghost/data/train.jsonl')
    lora = load_records(mine/'_runs/ghost/records', step='lora')[0]
    assert lora['metrics']['training rows']['value'] == len(train) >= 20 and lora['run']['params']['epochs'] == 3.0
