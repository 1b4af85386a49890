"Batch files through a real bash: whatever a run is called, nothing but the step is run."
import random, subprocess
from pathlib import Path
import pytest
from yothalia.runner import RunError
from yothalia.slurm import Site, batch_file

LETTERS = 'abZ019._,=+-éß里 ;$()`\'"\\|&<>*?!#~{}[]\n\t/%^'
STUBS = 'yothalia() { printf "%s\\n" "$*" >> ran; }; apptainer() { printf "%s\\n" "$*" >> ran; }; scontrol() { :; }; export -f yothalia apptainer scontrol; SLURM_JOB_ID=1; SLURM_ARRAY_TASK_ID=0\n'


def run(text, box):
    "A batch file, with yothalia and apptainer told apart from all else: what was run, and what lies in the folder."
    got = subprocess.run(['bash', '-c', STUBS + text], cwd=box, capture_output=True, text=True, timeout=30)
    return got, (box/'ran').read_text().splitlines() if (box/'ran').exists() else []


def test_names(tmp_path):
    "A thousand names of letters that a shell reads: refused, or run as what they are; nothing else comes to be."
    draw, taken = random.Random(0), 0
    for k in range(1000):
        name = ''.join(draw.choice(LETTERS if k % 2 else LETTERS[:14]) for _ in range(draw.randrange(1, 9))) + draw.choice(('', '', ';touch pwned', '$(touch pwned)', '`touch pwned`', '\ntouch pwned'))
        try: text = batch_file(name, '01_data', Site())
        except RunError: continue
        taken += 1
        if taken % 8: continue
        box = tmp_path/str(k); (box/'_runs'/name).mkdir(parents=True)
        got, ran = run(text, box)
        assert ran == [f'step _runs/{name} 01_data'] and got.returncode == 0 and {p.name for p in box.iterdir()} == {'_runs', 'ran'}, (name, got.stderr)
    assert 100 < taken < 700


@pytest.mark.parametrize('site', [dict(partition='a b;touch pwned'), dict(account='$(touch pwned)'), dict(container='my image; touch pwned.sif')])
def test_a_sites_words(tmp_path, site):
    (tmp_path/'_runs'/'x').mkdir(parents=True)
    got, ran = run(batch_file('x', '01_data', Site(**site)), tmp_path)
    assert len(ran) == 1 and not (tmp_path/'pwned').exists() and not (tmp_path/'pwned.sif').exists(), got.stderr


def test_a_container_within_quotes(tmp_path):
    "The training of several processes runs its container through another bash."
    (tmp_path/'_runs'/'x').mkdir(parents=True)
    stub = 'srun() { shift; "$@"; }; hostname() { echo h; }\n'
    got, ran = run(stub + batch_file('x', '02_lora', Site(container="it's mine.sif", gpus=2)), tmp_path)
    assert len(ran) == 2 and "it's mine.sif torchrun" in ran[0] and ran[0].endswith('_runs/x') and "it's mine.sif yothalia step _runs/x 02_lora" in ran[1], (ran, got.stderr)


def test_more_than_a_line():
    with pytest.raises(RunError, match='more than a line'): batch_file('x', '01_data', Site(partition='a\ntouch pwned'))
