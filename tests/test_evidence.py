"""Every record in results/ comes from the recipe of its folder, at a clean commit of the history, with parameters that the code knows."""
import json, re, subprocess
from pathlib import Path

import pytest, yaml

from yothalia.core import configure, load_records
from yothalia.runner import JOBS, STEPS, config_class, known_steps, plan, room, wanted

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(p for p in (ROOT/'results').iterdir() if p.is_dir())
RECORDS = [(f.name, r) for f in FOLDERS for r in load_records(f)]
step_of = {room(s): s for s in JOBS} | {'agreement': 'curve', 'talks': '06_chat', 'memory': 'replies', 'traffic': 'load'}

TIMED = {'speed', 'load', 'traffic', 'engine', 'decoding', 'adapters'}  # taken alone on the machine, or not at all
BEFORE = {'speed_shard'}  # timings of before the card and the load were kept, which wait for two cards
RETIRED = {'micro_batch'}  # rows at a time on the device, before there were packs: how it was computed, not what


@pytest.mark.parametrize('recipe', sorted((ROOT/'runs').glob('*.yml')), ids=lambda p: p.stem)
def test_recipe(recipe):
    "Nothing in a recipe would be refused."
    plan(yaml.safe_load(recipe.read_text()))


def test_there_are_records_of_every_step(): assert {r['what']['step'] for n, r in RECORDS if n == 'sample'} >= set(map(room, STEPS))


@pytest.mark.parametrize('name, rec', RECORDS, ids=[f"{n}-{r['path'].stem}" for n, r in RECORDS])
def test_record(name, rec):
    run, step = rec['run'], step_of[rec['what']['step']]
    assert run['commit'] and not run['dirty'], 'no clean commit'
    if rec['what']['step'] in TIMED and name not in BEFORE:
        assert run['others'] < .1, f'{run["others"]:.0%} of the machine was used by others'
        assert run['name'] and (run['device'] == 'cpu' or run['card']), 'which card was it?'
    known = subprocess.run(['git', 'log', '--format=%H'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if len(known) > 1: assert run['commit'] in known, 'the commit is not in the history'
    configure(config_class(step), {k: v for k, v in run['params'].items() if k not in RETIRED})
    asked = wanted(yaml.safe_load((ROOT/'runs'/f'{name}.yml').read_text()), [], [step])[step]
    assert {k: run['params'][k] for k in asked} == asked, 'other parameters than the recipe has'
    assert rec['questions'] is None or (rec['path'].parent/rec['questions']).exists()


@pytest.mark.parametrize('notebook', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_cards(notebook):
    "A card that prose names beside a recipe is the one that the recipe's records name."
    for cell in json.loads(notebook.read_text())['cells']:
        for part in re.findall(r'[^.:]*`runs/\w+\.yml`[^:]*', ''.join(cell['source']).replace('\\\n', '')):
            said = set(re.findall(r'[AHB]\d00\b', part))
            if not said: continue
            taken = {r['run']['name'] for n in re.findall(r'`runs/(\w+)\.yml`', part) for m, r in RECORDS if m == n}
            assert all(any(card in t for t in taken) for card in said), f'{part}: {taken}'
