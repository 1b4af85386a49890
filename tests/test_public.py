"""Published sets in their own forms (the files themselves, where they are at hand), and lm-evaluation-harness: what it logs is what is scored here."""
import importlib.util, json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest

from yothalia.convert import EMBEDDED, embedded_model
from yothalia.data import lesson_data
from yothalia.models import load_model, load_tokenizer
from yothalia.public import WHOLE, harness_pairs, lm_eval_task, read_lm_eval, read_set
from yothalia.prompts import PERSONA
from yothalia.questions import make_questions
from yothalia.rows import sample_rows
from yothalia.scoring import Item, score_items

PUBLIC = Path(os.environ.get('YOTHALIA_PUBLIC', 'data'))  # a folder with the published files, which are not ours to ship


@pytest.mark.parametrize('file, kind, n, left', [('emotional_perception.json', 'socialbench', 1058, 151), ('motivation_dataset.json', 'cross', 445, 0), ('mutual/dev', 'mutual', 884, 2)])
def test_the_published_file(file, kind, n, left):
    if not (PUBLIC/file).exists(): pytest.skip(f'{file} is not at hand')
    got, qs, out = read_set((PUBLIC/file).resolve())
    assert (got, len(qs), sum(out.values())) == (kind, n, left) and all(q['user'] and 0 <= q['answer'] < len(q['choices']) for q in qs)


@pytest.mark.skipif(not importlib.util.find_spec('lm_eval'), reason='pip install lm_eval')
@pytest.mark.parametrize('track', ['random', 'speaker'])
def test_the_harness_logs_what_is_scored_here(track, tmp_path):
    "Log-likelihoods of the same texts, to two hundred-thousandths of a nat a token: the harness rounds where it takes log_softmax in fp32, and a sum in double is nearer to ours."
    n = int(os.environ.get('YOTHALIA_HARNESS', 40)); qs = make_questions(sample_rows(), n, 5, track=track)[:n]
    tok = load_tokenizer(EMBEDDED); task = lm_eval_task(qs, tok, tmp_path, f'ours_{track}')
    cmd = [sys.executable, '-m', 'lm_eval', 'run', '--model', 'hf', '--model_args', f'pretrained={embedded_model()},dtype=float32', '--tasks', f'ours_{track}',
           '--include_path', str(tmp_path), '--log_samples', '--output_path', str(tmp_path/'out'), '--device', 'cpu', '--batch_size', '8']
    got = subprocess.run(cmd, capture_output=True, text=True, timeout=1500, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    assert got.returncode == 0, got.stderr[-3000:]
    back = read_lm_eval(next((tmp_path/'out').rglob('samples_*.jsonl')))
    there = {o['id'] for o in back}; qs = [q for q in qs if q['id'] in there]
    assert len(qs) > .9*n and [o['id'] for o in back] == [q['id'] for q in qs] and [o['answer'] for o in back] == [q['answer'] for q in qs]
    model, items = load_model(EMBEDDED, 'fp32'), []
    for q in qs:
        for p, c in harness_pairs(q, tok, PERSONA, WHOLE): ids = tok(p, add_special_tokens=False)['input_ids']; items.append(Item(ids, [tok(p + c, add_special_tokens=False)['input_ids'][len(ids):]]))
    ours = np.empty(len(items))
    for k, s in score_items(model, items): ours[k] = s[0]
    apart = np.abs(ours - np.concatenate([o['sum'] for o in back])); tokens = np.array([len(i.choices[0]) for i in items])
    assert (apart/tokens).max() < 2e-5 and np.median(apart) < 1e-3, (apart.max(), (apart/tokens).max())
