"""The package as it is installed: in a folder that holds nothing, it brings along all that a run needs, and writes only there."""
import os, shutil, subprocess, sys, sysconfig
from pathlib import Path

import pytest

from yothalia.runner import STEPS

ROOT = Path(__file__).parent.parent
SHORT = ['data=lesson', 'epochs=1.0', 'replies=1', 'reply_tokens=4', 'precisions=[bf16]', 'loss_rows=1', 'prompts=1', 'at_once=1', 'new_tokens=2',
         'tracks=[speaker]', 'questions=2', 'modes=[cloze]', 'dev_questions=0', 'iteration_rows=1', 'iteration_questions=1', 'matmul_size=256', 'lines=1', 'facts=0']


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The folder of an environment in which the wheel is installed, beside the libraries of this one."
    box = tmp_path_factory.mktemp('wheel')
    copy = box/'source'
    copy.mkdir()
    for name in ('nbs', 'runs', 'yothalia'): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py', 'README.md', 'LICENSE', 'MANIFEST.in'): shutil.copy(ROOT/name, copy/name)
    def sh(*cmd): subprocess.run(list(map(str, cmd)), check=True, cwd=box, stdout=subprocess.DEVNULL, timeout=300)
    sh(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', box/'dist', copy)
    sh(sys.executable, '-m', 'venv', '--without-pip', box/'env')
    python = box/'env/bin/python'
    there = subprocess.run([python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])'], capture_output=True, text=True, check=True).stdout.strip()
    sh(sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-deps', next((box/'dist').glob('*.whl')))
    (Path(there)/'others.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    shutil.rmtree(copy)
    yield box/'env/bin/yothalia', Path(there)/'yothalia'


def yothalia(command, folder, *args, **kw):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'YOTHALIA_ROOT')} | dict(COLUMNS='200', NO_COLOR='1', PYTHONDONTWRITEBYTECODE='1')
    return subprocess.run([str(command), *args], cwd=folder, env=env, capture_output=True, text=True, timeout=900, **kw)


def files_of(folder): return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}


def test_a_run_in_an_empty_folder(installed, tmp_path):
    "check, run, results, chat and submit in a folder that holds nothing; the package itself stays as it is."
    command, package = installed
    before = files_of(package)
    assert 'rows' in yothalia(command, tmp_path, 'check', 'lesson').stdout
    got = yothalia(command, tmp_path, 'run', '--name', 'mine', *[a for s in SHORT for a in ('-p', s)])
    assert got.returncode == 0, got.stdout[-3000:] + got.stderr[-2000:]
    assert {'02_lora.ipynb', 'adapter', 'records', 'summary.png'} <= {p.name for p in (tmp_path/'_runs/mine').iterdir()}
    again = yothalia(command, tmp_path, 'run', '--name', 'mine', *[a for s in SHORT for a in ('-p', s)])
    assert again.stdout.count('done before, skipped') == len(STEPS), again.stdout
    said = yothalia(command, tmp_path, 'chat', 'mine', '--new-tokens', '8', input='Good morning!\n')
    assert said.returncode == 0 and 'Saved as _runs/mine/chats' in said.stdout, said.stdout + said.stderr[-2000:]
    dry = yothalia(command, tmp_path, 'submit', '--dry-run', '--name', 'far', '-p', 'data=lesson')
    assert dry.returncode == 0 and dry.stdout.count('#!/bin/bash') == len(STEPS), dry.stdout + dry.stderr
    assert {p.name for p in tmp_path.iterdir()} == {'_runs'} and files_of(package) == before


def test_what_is_wrong_is_a_sentence(installed, tmp_path):
    command, _ = installed
    for args, says in ((['run', 'runs/sampel.yml'], 'did you mean sample?'), (['run', '--steps', '02_lora'], 'has no rows yet'),
                       (['chat'], 'no card, adapter or run')):
        got = yothalia(command, tmp_path, *args)
        assert got.returncode == 1 and says in got.stdout and 'Traceback' not in got.stdout + got.stderr, got.stdout + got.stderr


def test_notebooks_for_papermill(installed, tmp_path):
    "The jobs as notebooks: papermill runs one of them where there is no checkout, and none is written over."
    command, package = installed
    got = yothalia(command, tmp_path, 'notebooks', 'jobs')
    assert got.returncode == 0 and {p.stem for p in (tmp_path/'jobs').iterdir()} == set(STEPS), got.stdout + got.stderr
    assert 'already' in yothalia(command, tmp_path, 'notebooks', 'jobs').stdout
    python = command.parent/'python'
    done = yothalia(python, tmp_path, '-m', 'papermill', '-k', 'python3', '--no-progress-bar', 'jobs/01_data.ipynb', 'done.ipynb', '-p', 'data', 'lesson', '-p', 'out', '_runs/mine')
    assert done.returncode == 0 and (tmp_path/'_runs/mine/records/data.json').exists(), done.stderr[-3000:]
