"""Notebooks and modules agree, notebooks are clean, and importing is quick."""
import ast, importlib, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from yothalia.cluster import JOBS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if not p.name.startswith('_'))
cells = lambda p: json.loads(p.read_text(encoding='utf-8'))['cells']
source = lambda c: ''.join(c['source'])


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what nbdev works on, without the rest."
    box = tmp_path_factory.mktemp('frame')
    for name in ('nbs', 'yothalia'): shutil.copytree(ROOT/name, box/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'README.md'): shutil.copy(ROOT/name, box/name)
    return box


def nbdev(command, box):
    subprocess.run([sys.executable, '-c', f'from nbdev.{command[0]} import {command[1]}; {command[1]}()'], cwd=box, check=True, timeout=300)


def test_modules_are_in_sync(copy):
    nbdev(('doclinks', 'nbdev_export'), copy)
    for p in sorted((ROOT/'yothalia').glob('*.py')):
        assert (copy/'yothalia'/p.name).read_text() == p.read_text(), f'yothalia/{p.name} is not what the notebooks export: run nbdev_export'
    assert {p.name for p in (copy/'yothalia').glob('*.py')} == {p.name for p in (ROOT/'yothalia').glob('*.py')}


def test_notebooks_are_clean(copy):
    nbdev(('clean', 'nbdev_clean'), copy)
    for p in NOTEBOOKS:
        assert json.loads((copy/'nbs'/p.name).read_text()) == json.loads(p.read_text()), f'nbs/{p.name} has metadata to clean: run nbdev_clean'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_anatomy(path):
    cs = cells(path)
    assert all(c.get('id') for c in cs), 'cells without ids: the module can never be in sync'
    assert len({c['id'] for c in cs}) == len(cs), 'two cells have the same id'
    if path.name[:2].isdigit():
        n = sum('parameters' in c['metadata'].get('tags', []) for c in cs)
        assert n == 1, f'{n} cells are tagged parameters, a job has exactly one'
    for c in cs:
        if c['cell_type'] != 'code': continue
        out = json.dumps(c['outputs'])
        assert '"output_type": "error"' not in out, f'a saved output is an error: {source(c)[:60]}'
        assert '"name": "stderr"' not in out, f'a saved output holds stderr: {source(c)[:60]}'
        assert not re.search(r'"[^"]*(/root/|/home/|/work/|/tmp/)', out), f'a saved output shows a path of a machine: {source(c)[:60]}'
    assert any(c.get('outputs') for c in cs if c['cell_type'] == 'code') or path.name == 'index.ipynb', 'no saved outputs'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.name[:2].isdigit()], ids=lambda p: p.name)
def test_defaults(path):
    "The parameters cell and the room's configuration say the same: names, defaults, and a type for papermill's help."
    from yothalia.cluster import notebook_parameters
    names = notebook_parameters(path)
    cell = next(c for c in cells(path) if 'parameters' in c['metadata'].get('tags', []))
    assert all(re.match(r'\w+: \w+ = .+# ', l) for l in source(cell).splitlines()), 'a parameter needs a type and a comment'
    text = '\n'.join(map(source, cells(path)))
    config = re.search(r'configure\((\w+Config), (?:globals\(\)|given)\)', text)
    if config is None: return  # 06_cluster only names a run
    room = re.search(r'default_exp (\w+)', text)[1]
    module = importlib.import_module(f'yothalia.{room}')
    if not hasattr(module, config[1]): return  # a room of lessons keeps its configuration to itself
    fields = {k: v.get_default(call_default_factory=True) for k, v in getattr(module, config[1]).model_fields.items()}
    assert names == fields, {k: (names.get(k), fields.get(k)) for k in names.keys() | fields.keys() if names.get(k) != fields.get(k)}


@pytest.mark.parametrize('step', JOBS)
def test_run_needs_no_lesson(step):
    "A run leaves the lessons out: what is left defines all that it uses."
    from pyflakes.checker import Checker
    from pyflakes.messages import ImportStarUsage, UndefinedName
    from yothalia.cluster import without_lessons
    path = ROOT/'nbs'/f'{step}.ipynb'
    left = [source(c) for c in without_lessons(json.loads(path.read_text(encoding='utf-8')))['cells']
            if c['cell_type'] == 'code' and 'skip-execution' not in c['metadata'].get('tags', [])]
    lines = ('pass' if l.startswith(('%', '!')) else l for s in left for l in s.splitlines())
    tree = ast.parse('\n'.join(lines)); every = Checker(tree).messages
    starred = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*'}
    given = {name for m in starred for name in vars(importlib.import_module(m))}
    found = {m.message_args[0] for m in every if isinstance(m, UndefinedName) or isinstance(m, ImportStarUsage) and m.message_args[0] not in given}
    assert not found, f'defined in no cell that a run executes: {found}'


def test_import_is_quick_and_needs_no_torch():
    code = 'import sys, time; t = time.perf_counter(); import yothalia, yothalia.core; assert "torch" not in sys.modules; print(time.perf_counter()-t)'
    took = float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert took < 5, f'importing took {took:.1f} s'  # about 0.3 s; the limit only catches a heavy import
