"""Notebooks and modules agree, notebooks are clean, and importing is quick."""
import ast, importlib, io, json, os, re, shutil, subprocess, sys, tokenize
from pathlib import Path

import pytest

from yothalia.core import notebook
from yothalia.runner import JOBS, config_class, job_notebook, notebook_parameters, without_lessons

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(o.startswith(('.', '_')) for o in p.relative_to(ROOT/'nbs').parts))
NAMES = [p.relative_to(ROOT/'nbs').as_posix() for p in NOTEBOOKS]
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
        assert json.loads((copy/p.relative_to(ROOT)).read_text()) == json.loads(p.read_text()), f'{p.relative_to(ROOT)} has metadata to clean: run nbdev_clean'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_anatomy(path):
    cs = cells(path)
    assert all(c.get('id') for c in cs), 'cells without ids: the module can never be in sync'
    assert len({c['id'] for c in cs}) == len(cs), 'two cells have the same id'
    n = sum('parameters' in c['metadata'].get('tags', []) for c in cs)
    assert n == 1 if path.stem in JOBS else n < 2, f'{n} cells are tagged parameters: a job has exactly one, another room one at most'
    for c in cs:
        if c['cell_type'] != 'code': continue
        out = json.dumps(c['outputs'])
        assert '"output_type": "error"' not in out, f'a saved output is an error: {source(c)[:60]}'
        assert '"name": "stderr"' not in out, f'a saved output holds stderr: {source(c)[:60]}'
        assert not re.search(r'"[^"]*(/root/|/home/|/work/|/tmp/)', out), f'a saved output shows a path of a machine: {source(c)[:60]}'
    assert any(c.get('outputs') for c in cs if c['cell_type'] == 'code') or path.name == 'index.ipynb', 'no saved outputs'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem != 'index'], ids=[n for n in NAMES if 'index' not in n])
def test_links_lead_somewhere(path):
    "The site's builder would refuse a page that names another one wrongly."
    named = [m for c in cells(path) if c['cell_type'] == 'markdown' for m in re.findall(r'\]\(([\w./-]+\.(?:ipynb|md))', source(c))]
    assert not (lost := [n for n in named if not (path.parent/n).exists()]), lost


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_air(path):
    "Lines of 120 columns; an exported cell of 25 lines, a statement a line, and few expressions folded into one."
    code = [source(c) for c in cells(path) if c['cell_type'] == 'code']
    wide = [l for s in code for l in s.splitlines() if len(l) > 120]
    assert not wide, f'over 120 columns: {wide}'
    for s in code:
        if not s.startswith('#| export'): continue
        lines = [l for l in s.splitlines() if l.strip() and not l.lstrip().startswith('#')]
        assert len(lines) <= 25, f'{len(lines)} lines in one cell: {lines[0]}'
        signs = tokenize.generate_tokens(io.StringIO(s).readline)
        assert not [t for t in signs if t.type == tokenize.OP and t.string == ';'], f'statements joined by a semicolon: {s[:80]}'


@pytest.mark.parametrize('path', sorted((ROOT/'yothalia').glob('[!_]*.py')), ids=lambda p: p.stem)
def test_functions(path):
    "At most seven parameters, and five comprehensions, lambdas and conditional expressions."
    folded = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.IfExp
    for f in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        name, a = f'{path.stem}.{f.name}', f.args
        n = len([p for p in a.posonlyargs + a.args + a.kwonlyargs if p.arg not in ('self', 'cls')])
        assert n <= 7, f'{name} takes {n} parameters: let those that travel together be one object'
        n = sum(isinstance(x, folded) for x in ast.walk(f))
        assert n <= 5, f'{name} folds {n} expressions into others: give some a name'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_defaults(path):
    "The parameters cell and the room's configuration say the same: names, defaults, and a type for papermill's help."
    cell = next((c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])), None)
    if cell is None: return
    names = notebook_parameters(path)
    assert all(re.match(r'\w+: \w+ = .+# ', l) for l in source(cell).splitlines()), 'a parameter needs a type and a comment'
    config = re.search(r'configure\((\w+Config), (?:globals\(\)|given)\)', '\n'.join(map(source, cells(path))))
    if config is None: return  # 07_run only names a run
    module = importlib.import_module('yothalia.' + re.search(r'default_exp (\w+)', '\n'.join(map(source, cells(path))))[1])
    if not hasattr(module, config[1]): return  # a room of lessons keeps its configuration to itself
    fields = {k: v.get_default(call_default_factory=True) for k, v in getattr(module, config[1]).model_fields.items()}
    assert names == fields, {k: (names.get(k), fields.get(k)) for k in names.keys() | fields.keys() if names.get(k) != fields.get(k)}
    assert path.stem not in JOBS or getattr(module, config[1]) is config_class(path.stem)


@pytest.mark.parametrize('step', JOBS)
def test_run_needs_no_lesson(step):
    "A run leaves the lessons out: what is left defines all that it uses."
    from pyflakes.checker import Checker
    from pyflakes.messages import ImportStarUsage, UndefinedName
    left = [source(c) for c in without_lessons(json.loads(job_notebook(step).read_text(encoding='utf-8')))['cells']
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


# Floors of the house, from the ground up. A module imports from its own floor and from those below; `studies` and what is fast serve nobody below them.
FLOORS = ['core files rendering convert models', 'shapes logs scripts cards rows cleaning splitting privacy data prompts runs', 'scoring questions', 'packing fused training labels tuned lora', 'decoding asking tables', 'benchmark stats contestants replies', 'holds leaks public',
          'quantization profiling', 'sampling characters session terminal chat listeners', 'adapters engine behind bodies answers ollama gate serve page', 'findings verify export check',
          'validity specificity templates sweep speed load', 'runner slurm report site', 'all commands']


def arrows():
    "Who imports whom, imports inside of functions counted."
    found = {}
    for p in (ROOT/'yothalia').glob('[!_]*.py'):
        for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            names = []
            if isinstance(n, ast.ImportFrom) and (n.level == 1 or (n.module or '').split('.')[0] == 'yothalia'):
                inner = (n.module or '').removeprefix('yothalia').lstrip('.')
                names = [inner.split('.')[0]] if inner else [a.name for a in n.names]
            if isinstance(n, ast.Import): names = [a.name.split('.')[1] for a in n.names if a.name.startswith('yothalia.')]
            found.setdefault(p.stem, set()).update(m for m in names if m != p.stem and (ROOT/'yothalia'/f'{m}.py').exists())
    return found


def test_no_circle_and_no_arrow_upward():
    from graphlib import TopologicalSorter
    of, floor = arrows(), {m: i for i, f in enumerate(FLOORS) for m in f.split()}
    assert set(of) == set(floor), f'on no floor: {set(of) ^ set(floor)}'
    list(TopologicalSorter(of).static_order())  # a CycleError names the circle
    up = sorted(f'{a} → {b}' for a, bs in of.items() for b in bs if floor[b] > floor[a])
    assert not up, up


def test_the_main_road_needs_nothing_fast():
    "What 01 to 05 import, directly or not, holds no study and no engine; quantization times the decoder, which has its plain way."
    of, todo, seen = arrows(), ['data', 'lora', 'quantization', 'benchmark', 'profiling'], set()
    while todo:
        if (m := todo.pop()) not in seen: seen.add(m); todo += of[m]
    assert not seen & {*'adapters engine behind serve page validity specificity templates sweep speed load'.split()}, seen


@pytest.mark.parametrize('step', JOBS)
def test_papermill_reads_the_parameters(step):
    "papermill's own reading of a parameters cell, which is narrower than Python's, finds every one of them."
    import papermill
    path = job_notebook(step)
    assert set(papermill.inspect_notebook(str(path))) == set(notebook_parameters(path))


TYPED = {'benchmark/public.ipynb'}  # quotes what others have published


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_measured_numbers_are_filled_in(path):
    "What is said of a measurement comes from its record: no share and no fraction is typed (1.5 is a model's name)."
    name, inside, found = path.relative_to(ROOT/'nbs').as_posix(), False, []
    if name in TYPED: return
    for c in cells(path):
        if c['cell_type'] != 'markdown': continue
        for h in re.findall(r'^## (.*)$', source(c), re.M): inside = bool(re.search(r'real \w+ gave', h))
        text = re.sub(r'`[^`]*`|\]\([^)]*\)|\b1\.5B?\b', '', source(c))
        if inside: found += re.findall(r'\b\d[\d.,]*%|\b\d+\.\d+', text)
    assert not found


def test_front_page_is_a_page():
    "Who opens it reads it: 900 words, the two commands as they stand, a picture with words."
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert len(text.split()) <= 900 and 'make run' in text and 'make test' in text and re.search(r'!\[[^]]{40,}\]\(results/front\.png\)', text)


def test_a_version_is_one_version():
    "What a release would be refused for is seen before: settings, package, citation and changes name the same."
    import configparser, yothalia
    c = configparser.ConfigParser(delimiters=['=']); c.read(ROOT/'settings.ini'); version = c['DEFAULT']['version']
    assert version == yothalia.__version__ and f'\n## {version}, ' in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    assert f'\nversion: {version}\n' in (ROOT/'CITATION.cff').read_text(encoding='utf-8')


def test_worn_from_another_folder(tmp_path):
    "The command of a checkout finds notebooks and recipes from whatever folder it is called in."
    env = {k: v for k, v in os.environ.items() if k != 'YOTHALIA_ROOT'} | dict(PYTHONPATH=str(ROOT))
    code = 'from yothalia.core import shipped; from yothalia.commands import app; print(shipped("runs")); app(["run", "--list", "steps"])'
    got = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0 and str(ROOT/'runs') in got.stdout and '02_lora' in got.stdout, got.stdout + got.stderr
