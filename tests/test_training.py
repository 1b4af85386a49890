"""Trainings that are killed, that share a step among processes, and that lose one of them."""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from yothalia.core import seed_everything
from yothalia.training import TrainError, TrainingArgs, Training, join_processes, last_checkpoint, shard, sharded

ROOT = Path(__file__).parent.parent
os.environ['YOTHALIA_PROGRESS'] = 'off'


def tiny(folder, dropout=0., spread=False, dtype=torch.float32, **kw):
    "A training of a small model that was never trained, on numbers; some ten milliseconds a step."
    seed_everything(0)
    made = random.Random(0)
    rows = [[made.randrange(200) for _ in range(made.randrange(20, 60))] for _ in range(44)]
    examples = [dict(input_ids=r, labels=[-100]*8 + r[8:]) for r in rows]
    m = LlamaForCausalLM(LlamaConfig(vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).to(dtype)
    m = get_peft_model(m, LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear', r=4, lora_dropout=dropout), autocast_adapter_dtype=False)
    if spread: shard(m)
    return Training(m, examples[:40], examples[40:], TrainingArgs(**dict(batch=8, epochs=30., evals=30, learning_rate=1e-3, pack_tokens=128) | kw), folder)


def forked(folder) -> int:
    "A child process that trains to the end; its number."
    if pid := os.fork(): return pid
    try: tiny(folder).run(); os._exit(0)
    except BaseException: os._exit(1)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_at_any_moment(tmp_path):
    "SIGKILL at twenty random moments, some while a checkpoint is written: the same weights in the end, and never more than an interval lost."
    torch.set_num_threads(1)
    whole = tiny(tmp_path/'whole'); start = time.time(); whole.run(); took = time.time()-start
    moments, folder, at, inside = random.Random(1), tmp_path/'killed', 0, 0
    for _ in range(20):
        pid = forked(folder); time.sleep(moments.uniform(.02, max(.3, took/8)))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        inside += any(p.name.endswith('.tmp') for p in folder.iterdir()) if folder.exists() else 0
        kept = last_checkpoint(folder)
        now = int(kept.name.split('-')[1]) if kept else 0
        assert now >= at, 'a checkpoint was lost'
        at = now
    assert os.waitpid(forked(folder), 0)[1] == 0
    end = tiny(folder); assert end.run() == 150
    assert torch.equal(end.flat.live, whole.flat.live) and end.at.best == whole.at.best
    print(f'{inside} of 20 inside a save, at step {at} of 150')


def test_interrupted_with_dropout(tmp_path):
    "What is dropped depends on the step, not on when the process began."
    whole = tiny(tmp_path/'whole', .2, epochs=3.); whole.run()
    one = tiny(tmp_path/'broken', .2, epochs=3.); step = one.take_step
    def stopped(): one.asked = one.at.step == 6; return step()
    one.take_step = stopped
    with pytest.raises(KeyboardInterrupt): one.run()
    two = tiny(tmp_path/'broken', .2, epochs=3.)
    assert two.run() == 7 and torch.equal(two.flat.live, whole.flat.live)
    plain = tiny(tmp_path/'plain', epochs=3.); plain.run()
    assert not torch.equal(plain.flat.live, whole.flat.live)  # there is dropout at all


TOGETHER = '''
import sys; sys.path.insert(0, "tests")
from test_training import *
torch.set_num_threads(1); join_processes(1.)
spread = 'spread' in sys.argv
t = tiny(Path(sys.argv[1]), pack_tokens=64, spread=spread, recompute=spread)
assert sharded(t.model) == t.sharded == spread
if 'die' in sys.argv and t.rank == 1 and not last_checkpoint(t.folder):
    step = t.take_step
    t.take_step = lambda: os.kill(os.getpid(), 9) if t.at.step == 20 else step()
t.run()
if t.rank == 0: torch.save(t.flat.live, Path(sys.argv[1])/"end.pt"); (Path(sys.argv[1])/"log.json").write_text(json.dumps(t.at.log))
torch.distributed.destroy_process_group()
'''

def together(tmp_path, folder, *more):
    (tmp_path/'together.py').write_text(TOGETHER)
    return subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'together.py'), str(folder), *more],
                          cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, 'PYTHONPATH': str(ROOT)})


def test_two_processes_share_a_step(tmp_path):
    "The same batches, the same losses, the same weights up to rounding as one process; and when one is killed the other ends soon, and both go on."
    one = tiny(tmp_path/'one', pack_tokens=64); one.run()
    got = together(tmp_path, tmp_path/'two'); assert got.returncode == 0, got.stderr[-3000:]
    log = json.loads((tmp_path/'two/log.json').read_text())
    assert [l['step'] for l in log] == [l['step'] for l in one.at.log]
    for a, b in zip(log, one.at.log):
        for k in ('loss', 'eval_loss', 'grad_norm'): assert abs(a.get(k, 0)-b.get(k, 0)) < 2e-3, (a, b)
    end = torch.load(tmp_path/'two/end.pt'); assert (end-one.flat.live).norm() < .02*one.flat.live.norm()
    start = time.time()
    got = together(tmp_path, tmp_path/'dead', 'die'); assert got.returncode != 0 and time.time()-start < 90
    assert 0 < int(last_checkpoint(tmp_path/'dead').name.split('-')[1]) <= 20
    got = together(tmp_path, tmp_path/'dead', 'die'); assert got.returncode == 0, got.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path/'dead/end.pt'), end)


def test_layers_spread_over_two_processes(tmp_path):
    "Each process holds half of the frozen weights, layers are computed again on the way back, and it is the training of one process that has them all."
    one = tiny(tmp_path/'one', pack_tokens=64); one.run()
    got = together(tmp_path, tmp_path/'two', 'spread'); assert got.returncode == 0, got.stderr[-3000:]
    log = json.loads((tmp_path/'two/log.json').read_text())
    for a, b in zip(log, one.at.log, strict=True):
        for k in ('loss', 'eval_loss', 'grad_norm'): assert abs(a.get(k, 0)-b.get(k, 0)) < 2e-3, (a, b)
    end = torch.load(tmp_path/'two/end.pt'); assert (end-one.flat.live).norm() < .02*one.flat.live.norm()


@pytest.mark.parametrize('dropout', [0., .2])
def test_recomputed(tmp_path, dropout):
    "Layers that are computed again give the same weights, dropout included, and afterwards the model is as it was."
    kept = tiny(tmp_path/'kept', dropout, epochs=2.); kept.run()
    again = tiny(tmp_path/'again', dropout, epochs=2., recompute=True); again.run()
    assert again.recomputed and not kept.recomputed
    assert torch.allclose(again.flat.live, kept.flat.live, atol=1e-6) and not again.model.training
    assert not any(getattr(m, 'gradient_checkpointing', False) for m in again.model.modules())


@pytest.mark.parametrize('recompute', [None, True])
def test_fp8(tmp_path, recompute):
    "Products in eight bits learn as much, are measured without them, and are gone afterwards; what cannot be so is refused."
    own = tiny(tmp_path/'own', dtype=torch.bfloat16, epochs=12., learning_rate=5e-3); own.run()
    low = tiny(tmp_path/'low', dtype=torch.bfloat16, fp8=True, recompute=recompute, epochs=12., learning_rate=5e-3); low.run()
    a, b = ([l['eval_loss'] for l in t.at.log if 'eval_loss' in l] for t in (own, low))
    assert a[0] == b[0] and max(abs(x-y) for x, y in zip(a, b, strict=True)) < .02, (a, b)
    x, y = ([l['loss'] for l in t.at.log if 'loss' in l] for t in (own, low))
    assert x != y and y[-1] < y[0] - .05 and abs(x[-1]-y[-1]) < .03, (x[-1], y[-1])
    ids = torch.arange(20)[None]; low.model(input_ids=ids, labels=ids).loss.backward()
    back = [p.grad.clone() for p in low.model.parameters() if p.requires_grad]
    low.fuse_layers(); assert low.fused  # with eight bits once more: other gradients
    low.model.zero_grad(set_to_none=False); low.model(input_ids=ids, labels=ids).loss.backward()
    assert any(not torch.equal(p.grad, g) for p, g in zip((p for p in low.model.parameters() if p.requires_grad), back))
    with pytest.raises(TrainError, match='bf16'): tiny(tmp_path/'no', fp8=True)


def test_memory_is_full(tmp_path):
    "Smaller packs, then layers computed again, then a word about what else there is; what was computed is right all the same."
    def small(folder, enough):
        t = tiny(tmp_path/folder, epochs=1., pack_tokens=1024); inner, seen = t.there_and_back, []
        def there_and_back(p, total):
            seen.append((t.size, t.recomputed)); inner(p, total)  # what was added before is thrown away
            if not enough(t): raise torch.OutOfMemoryError('out of memory')
        t.there_and_back = there_and_back
        return t, seen
    whole = tiny(tmp_path/'whole', epochs=1.); whole.run()
    t, seen = small('halved', lambda t: t.size <= 128); t.run()
    assert t.size == 128 and not t.recomputed and torch.allclose(t.flat.live, whole.flat.live, atol=1e-4)
    t, seen = small('again', lambda t: t.recomputed); t.run()
    assert t.recomputed and t.size == max(t.lengths) and torch.allclose(t.flat.live, whole.flat.live, atol=1e-4)
    t, seen = small('never', lambda t: False)
    with pytest.raises(TrainError, match='one conversation of 5. tokens.*max_tokens'): t.run()
    assert seen[-1][1]


SPREAD = '''
import sys, torch
from yothalia import lora
from yothalia.core import configure
torch.set_num_threads(1)
lora.too_large = lambda *_: True
cfg = configure(lora.LoraConfig, dict(out=sys.argv[1], train_rows=4, valid_rows=2, batch=2, rank=4, precision='fp32'))
lora.save_spread(*lora.fit(cfg), cfg)
torch.distributed.destroy_process_group()
'''

def test_adapter_of_a_model_that_is_spread(tmp_path):
    "Trained by two processes that hold half a model each, its adapter fits the whole model and does what the log says."
    from yothalia.data import DataConfig, load_split, prepare
    from yothalia.tuned import condition_losses, loss_table
    from yothalia.labels import token_budget
    from yothalia.models import load_model, load_tokenizer
    prepare(DataConfig(data='sample', out=str(tmp_path/'run')))
    (tmp_path/'spread.py').write_text(SPREAD)
    got = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'spread.py'), str(tmp_path/'run')],
                         cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert got.returncode == 0, got.stderr[-3000:]
    assert 'measure it with the other rooms' in got.stdout
    model, tok = load_model('smollm2-135m', 'fp32', tmp_path/'run/adapter'), load_tokenizer('smollm2-135m')
    rows = load_split(tmp_path/'run', 'valid').shuffle(seed=0).select(range(2))
    losses = loss_table(condition_losses(model, rows, tok, token_budget(load_split(tmp_path/'run', 'train').shuffle(seed=0).select(range(4)), tok)))
    said = [float(l.split('|')[2]) for l in (tmp_path/'run/adapter/README.md').read_text().splitlines() if l.startswith(('| base', '| with'))]
    assert abs(losses['prompt']['value']-said[0]) < 2e-3 and abs(losses['both']['value']-said[1]) < 2e-3 and said[1] < said[0]


def test_harm_is_not_taken_back(tmp_path):
    "A training after which the held-out examples are less likely keeps its best trained weights, and it is said."
    from yothalia.labels import harm
    t = tiny(tmp_path/'harm', epochs=40., evals=2, learning_rate=5e-2); t.run()
    seen = [l['eval_loss'] for l in t.at.log if 'eval_loss' in l]
    assert min(seen[1:]) > seen[0] and t.at.best[1] > 0 and not torch.equal(t.best, torch.zeros_like(t.best))
    assert any(p.abs().max() > 0 for n, p in t.model.named_parameters() if 'lora_B' in n)
    assert 'did harm' in harm(t.at.log)[0]
