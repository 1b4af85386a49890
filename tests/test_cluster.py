"""On a real Slurm of two nodes on this machine: chains, arrays, failures, time limits, a node that dies, training on both nodes."""
import json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
RUN = ROOT/'_runs'
pytestmark = pytest.mark.skipif(not (os.environ.get('YOTHALIA_TEST_CLUSTER') and shutil.which('slurmctld')), reason='make test-cluster starts a Slurm for these')
SHORT = ['01_data', '02_lora']
LONG = ['-p', '02_lora.epochs=3.0', '-p', '02_lora.batch=4', '-p', '02_lora.evals=4', '-p', '02_lora.replies=0']
FEW = ['-p', '02_lora.replies=0', '-p', '02_lora.epochs=1.0', '-p', '02_lora.batch=4', '-p', '02_lora.evals=2']
EARLY = [('ct-road', [], ['01_data', '02_lora', '03_quantization', '04_benchmark', '05_profiling']), ('ct-whole', LONG, SHORT),
         ('ct-fail', ['-p', '02_lora.max_tokens=16'], ['01_data', '02_lora', '04_benchmark'])]


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "Two nodes, and a site file for them; every job of an earlier test run is gone."
    box = Path(os.environ.get('YOTHALIA_SLURM') or tmp_path_factory.mktemp('slurm'))
    up = subprocess.run(['bash', str(ROOT/'tests/slurm_here.sh'), 'start', str(box)], stderr=(box/'start.err').open('w'), timeout=90)
    if up.returncode: pytest.skip(f'no Slurm can be started on this machine: {(box/"start.err").read_text()[-500:]}')
    (box/'tiny.yml').write_text('data: lesson\nseed: 0\n')
    site = dict(cpus=2, gpus=0, warn=10, time='00:15:00', setup=[f'source {BIN}/activate', 'export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore'])
    (box/'site.yml').write_text(yaml.safe_dump(site))
    os.environ |= dict(SLURM_CONF=str(box/'slurm.conf'), YOTHALIA_SITE=str(box/'site.yml'))
    for p in RUN.glob('ct-*'): shutil.rmtree(p)
    for name, more, steps in EARLY: (box/f'{name}.said').write_text(submit(box, name, *more, steps=steps))  # both nodes have work from the start
    yield box
    subprocess.run(['bash', str(ROOT/'tests/slurm_here.sh'), 'stop', str(box)], timeout=60)


def yothalia(*args, ok=True, **env):
    got = subprocess.run([str(BIN/'yothalia'), *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                         env={**os.environ, 'COLUMNS': '200', 'NO_COLOR': '1', **env})
    assert (got.returncode == 0) == ok, got.stdout + got.stderr
    return got.stdout

def submit(box, name, *more, steps=SHORT, **kw): return yothalia('submit', box/'tiny.yml', '--name', name, '--steps', ','.join(steps), *more, **kw)

def ids(name): return {s: v[-1] for s, v in json.loads((RUN/name/'slurm/jobs.json').read_text()).items()}

def scontrol(job):
    out = subprocess.run(['scontrol', 'show', 'job', job, '-o'], capture_output=True, text=True).stdout
    return [dict(re.findall(r'(\w+)=(\S+)', l)) for l in out.splitlines() if l]

def wait(what, seconds, every=2.):
    "Wait until something holds, or fail and show what Slurm has."
    end = time.time() + seconds
    while time.time() < end:
        if r := what(): return r
        time.sleep(every)
    pytest.fail(subprocess.run(['squeue', '-a'], capture_output=True, text=True).stdout + '\n'.join(p.read_text()[-1500:] for p in sorted(RUN.glob('ct-*/slurm/*.out'))[-4:]))

def ended(job): return all(j['JobState'] not in ('PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING') for j in scontrol(job))

def all_done(*names): return lambda: all((RUN/n/'done'/f'{s}.json').exists() for n in names for s in SHORT)

def weights(name):
    from safetensors.torch import load_file
    return load_file(RUN/name/'adapter/adapter_model.safetensors')

def output(name, step='02_lora'): return '\n'.join(p.read_text() for p in sorted((RUN/name/'slurm').glob(f'{step}-*.out')))


def test_the_road(slurm):
    "Five steps, each after the one before; papermill and the default model in every one."
    assert len(re.findall(r'job \d+, after \d+', (slurm/'ct-road.said').read_text())) == 4
    wait(lambda: ended(ids('ct-road')['05_profiling']), 700)
    shown = yothalia('status', 'ct-road')
    assert shown.count('done') == 5 and 'held-out loss' in shown, shown + output('ct-road')
    assert 'done before' in submit(slurm, 'ct-road')  # and nothing is queued
    assert 'loss both' in yothalia('collect', 'ct-road') and 'loss both' in (RUN/'ct-road/collected.csv').read_text() and (RUN/'ct-road/collected.png').stat().st_size > 5000


IMAGE = os.environ.get('YOTHALIA_TEST_IMAGE', '')

@pytest.mark.skipif(not (IMAGE and shutil.which('apptainer')), reason='needs apptainer, and YOTHALIA_TEST_IMAGE: an image of runs/container/yothalia.def')
def test_in_a_container(slurm):
    "With --container a step runs in the image, on the same folder, and asks nothing of the environment outside."
    submit(slurm, 'ct-image', '--container', IMAGE, steps=['01_data'])
    batch = (RUN/'ct-image/slurm/01_data.sh').read_text()
    assert f'apptainer exec --bind "$PWD" {IMAGE} yothalia step' in batch and 'activate' not in batch
    wait(lambda: ended(ids('ct-image')['01_data']), 700)
    assert (RUN/'ct-image/done/01_data.json').exists(), output('ct-image', '01_data')
    made = json.loads((RUN/'ct-image/records/data.json').read_text())['run']['versions']['python']
    assert made.startswith('3.11'), made


def test_a_grid_is_one_array_and_finished_points_are_skipped(slurm):
    (slurm/'grid.yml').write_text('01_data.seed: [1, 2]\n01_data.test_share: [0.2, 0.25, 0.3]\n')
    grid = dict(steps=['01_data'])
    submit(slurm, 'ct-grid', '--grid', slurm/'grid.yml', '--dry-run', **grid)
    first = RUN/'ct-grid/seed=1,test_share=0.2'
    yothalia('step', first)
    said = submit(slurm, 'ct-grid', '--grid', slurm/'grid.yml', **grid)
    assert '5 of 6 runs' in said and 'array 1,2,3,4,5' in said and 'seed=1,test_share=0.2  done before' in said
    before = (first/'done/01_data.json').read_text()
    wait(lambda: ended(ids('ct-grid')['all']), 600)
    shown = yothalia('status', 'ct-grid')
    assert shown.count('done') == 6, shown
    assert (first/'done/01_data.json').read_text() == before
    assert 'no loss, no score' in yothalia('collect', 'ct-grid', ok=False)  # of rows alone


def test_what_fails_cancels_the_rest_and_says_why(slurm):
    job = ids('ct-fail')
    wait(lambda: ended(job['04_benchmark']), 300)
    shown = yothalia('status', 'ct-fail')
    assert 'no row fits into 16 tokens' in shown and 'failed' in shown and 'a step before it failed' in shown, shown


def test_two_submissions_of_one_run(slurm):
    "Both jobs run at once; one works, the other waits and finds it done."
    submit(slurm, 'ct-twice', *FEW); submit(slurm, 'ct-twice', *FEW)
    jobs = json.loads((RUN/'ct-twice/slurm/jobs.json').read_text())['02_lora']
    wait(lambda: all(map(ended, jobs)), 400)
    assert [scontrol(j)[0]['JobState'] for j in jobs] == ['COMPLETED']*2
    assert output('ct-twice').count('done before') == 1 and weights('ct-twice')


def test_a_time_limit_ends_with_the_same_adapter(slurm):
    "Stopped a minute before its time was over, saved, queued again: to the last bit the adapter of the unbroken run."
    (slurm/'early.yml').write_text((slurm/'site.yml').read_text().replace('warn: 10', 'warn: 60'))
    submit(slurm, 'ct-limit', *LONG, YOTHALIA_SITE=str(slurm/'early.yml'))
    job = wait(lambda: ids('ct-limit').get('02_lora'), 10)
    subprocess.run(['scontrol', 'update', f'JobId={job}', 'TimeLimit=2'], check=True)
    wait(lambda: int(scontrol(job)[0]['Restarts']) and scontrol(job)[0]['JobState'] == 'RUNNING', 300)
    subprocess.run(['scontrol', 'update', f'JobId={job}', 'TimeLimit=15'], check=True)  # once is enough
    wait(all_done('ct-whole', 'ct-limit'), 700)
    assert int(scontrol(job)[0]['Restarts']) >= 1 and 'Saved: 02_lora' in output('ct-limit'), output('ct-limit')
    one, two = weights('ct-whole'), weights('ct-limit')
    assert all((one[k] == two[k]).all() for k in one)

def test_a_dead_node_ends_with_the_same_adapter(slurm):
    "Everything on the node is killed; the job goes on elsewhere, from its last checkpoint."
    wait(all_done('ct-whole'), 500)
    submit(slurm, 'ct-node', *LONG)
    job = ids('ct-node')['02_lora']
    wait(lambda: list((RUN/'ct-node/checkpoints').glob('*/*/seal.json')), 300)
    node = scontrol(job)[0]['BatchHost']
    pids = [p for p in os.listdir('/proc') if p.isdigit() and f'SLURM_JOB_ID={job}' in _environ(p)]
    subprocess.run(['pkill', '-9', '-f', f'slurmd -N {node}'])
    subprocess.run(['pkill', '-9', '-f', rf'slurmstepd: \[{job}\.'])  # or it would tell of the death
    for p in pids: subprocess.run(['kill', '-9', p])
    wait(all_done('ct-node'), 500)
    assert scontrol(job)[0]['BatchHost'] != node and int(scontrol(job)[0]['Restarts']) >= 1
    one, two = weights('ct-whole'), weights('ct-node')
    assert all((one[k] == two[k]).all() for k in one)
    subprocess.run(['slurmd', '-N', node], check=True)
    wait(lambda: subprocess.run(['sinfo', '-h', '-t', 'idle', '-o', '%D'], capture_output=True, text=True).stdout.strip() == '2', 60)


def _environ(pid):
    try: return Path(f'/proc/{pid}/environ').read_bytes().decode(errors='replace')
    except OSError: return ''


def test_training_on_two_nodes(slurm):
    "torchrun on both nodes, one process each: up to rounding the same adapter as one process makes."
    told = ['-p', '02_lora.train_rows=8', '-p', '02_lora.batch=4', '-p', '02_lora.precision=fp32', '-p', '02_lora.learning_rate=1e-3', '-p', '02_lora.persona_share=0.0', *FEW]
    submit(slurm, 'ct-one', *told); submit(slurm, 'ct-two', *told, '--nodes', '2')
    wait(all_done('ct-one', 'ct-two'), 500)
    one, two = weights('ct-one'), weights('ct-two')
    far = sum(float((one[k]-two[k]).norm())**2 for k in one)**.5 / sum(float(v.norm())**2 for k, v in one.items() if 'lora_B' in k)**.5
    assert far < .05, far
    assert "'taken_up': 2" in (RUN/'ct-two/02_lora.ipynb').read_text()  # the notebook found a training that was finished
