"Models where the processor has 16-bit arithmetic, and where it only imitates it."
import os, subprocess, sys, time
import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM
from yothalia import models
from yothalia.core import ConfigError, configure, cores
from yothalia.models import ModelError, arithmetic, load_model, quantization_config, weight_tensors, weights_bytes
from yothalia.decoding import decodes_together
from yothalia.lora import LoraConfig, add_lora


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    "A small model whose file holds 32-bit numbers."
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=2))
    folder = tmp_path_factory.mktemp('stored'); m.save_pretrained(folder)
    return str(folder), m


@pytest.mark.parametrize('has, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_is_computed_as_the_device_can(monkeypatch, stored, has, dtype):
    monkeypatch.setattr(models, 'has_bf16', lambda: has)
    folder, m = stored
    got, whole = load_model(folder, 'bf16'), load_model(folder, 'fp32')
    assert {p.dtype for p in got.parameters()} == {dtype} and arithmetic() == dtype
    assert quantization_config('nf4').bnb_4bit_compute_dtype == dtype
    for (name, p), q in zip(m.named_parameters(), got.parameters()):
        assert torch.equal(p.bfloat16(), q.bfloat16()) and torch.equal(q, q.bfloat16().to(q.dtype)), name
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), whole.parameters()))
    ids = torch.arange(32)[None]
    with torch.inference_mode(): exact, loss = (o(input_ids=ids, labels=ids).loss.item() for o in (m, got))
    assert loss != exact and abs(loss - exact) < .02


@pytest.mark.parametrize('precision, kind', [('bf16', 'bfloat16'), ('nf4', 'bfloat16'), ('fp32', 'float32')])
def test_files_are_written_alike_everywhere(monkeypatch, stored, tmp_path, precision, kind):
    monkeypatch.setattr(models, 'has_bf16', lambda: False)
    m = load_model(stored[0], precision, to_save=True); m.save_pretrained(tmp_path)
    assert str(m.dtype) == f'torch.{kind}'
    if precision == 'nf4': assert m.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16


def test_what_is_not_quantized_weighs_more_where_it_is_computed_in_fp32(stored):
    at = {p: (weights_bytes(stored[0], p), weights_bytes(stored[0], p, 32)) for p in ('fp32', 'bf16', 'nf4')}
    assert at['fp32'][0] == at['fp32'][1] == at['bf16'][1] == 2*at['bf16'][0]
    assert at['nf4'][0] < at['nf4'][1] < at['bf16'][1]


def test_four_bits_are_the_same_four_bits(monkeypatch, stored, tmp_path):
    "Quantized here or there, saved or not: the codes are those of the bf16 weights, and what is computed agrees."
    load_model(stored[0], 'bf16', to_save=True).save_pretrained(tmp_path/'bf16')
    load_model(str(tmp_path/'bf16'), 'nf4', to_save=True).save_pretrained(tmp_path/'nf4')
    monkeypatch.setattr(models, 'has_bf16', lambda: False)
    here, back = load_model(stored[0], 'nf4'), load_model(str(tmp_path/'nf4'), 'nf4')
    monkeypatch.setattr(models, 'has_bf16', lambda: True)
    there = load_model(stored[0], 'nf4')
    with pytest.raises(models.ModelError, match='say precision=nf4'): load_model(str(tmp_path/'nf4'), 'bf16')
    codes = lambda m: torch.cat([p.flatten().view(torch.uint8) for p in m.parameters() if p.dtype == torch.uint8])
    assert torch.equal(codes(here), codes(there)) and torch.equal(codes(here), codes(back)) and len(codes(here))
    ids = torch.arange(32)[None]
    with torch.inference_mode(): a, b, c = (m(ids).logits.float() for m in (here, back, there))
    assert torch.equal(a, b) and (a - c).abs().max() < .05


def test_threads_sleep_where_others_are_at_work():
    "A process that finds the cores busy has torch's threads sleep while they wait; what the environment says stands."
    if cores() < os.cpu_count(): pytest.skip('only a share of this machine is ours')
    code = 'import os, yothalia.core as c; print(os.environ.get("OMP_WAIT_POLICY"), c.cores(), round(c.used_by_others(.3), 2))'
    def told(**env): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60,
                                           env={k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')} | env).stdout.split()
    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(os.cpu_count())]
    try:
        time.sleep(.5)
        said, n, busy = told()
        assert said == 'PASSIVE' and float(busy) > .3 and int(n) == cores()
        assert told(OMP_WAIT_POLICY='ACTIVE')[0] == 'ACTIVE'
    finally:
        for p in others: p.kill()


def test_sixteen_bits_by_a_trial(monkeypatch):
    "A processor that imitates them takes several times as long, and computes in 32; noise of less than a factor of two decides nothing."
    from yothalia import core
    for slower, has in ((1.6, True), (9., False)):
        monkeypatch.setattr(core, '_product_seconds', lambda kind: slower if kind == torch.bfloat16 else 1.)
        core.has_bf16.cache_clear()
        if not torch.cuda.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(): assert core.has_bf16() == has
    core.has_bf16.cache_clear()


@pytest.mark.parametrize('worn', [False, True])
def test_habits_of_a_model_are_left_at_home(worn):
    "What its generation_config says of repetition and sampling changes nothing, with an adapter on it neither; and it is there afterwards."
    from peft import LoraConfig, get_peft_model
    from yothalia.models import EMBEDDED, continued, load_tokenizer
    tok, m = load_tokenizer(EMBEDDED), load_model(EMBEDDED, 'fp32')
    if worn: m = get_peft_model(m, LoraConfig(task_type='CAUSAL_LM', target_modules=['q_proj']))
    prompt = [tok.apply_chat_template([dict(role='user', content='Say hello, hello, hello.')], tokenize=False, add_generation_prompt=True)]
    def said(**how): return torch.manual_seed(0) and continued(m, tok, prompt, 24, **how).tolist()
    ways = {}, dict(do_sample=True, temperature=1.5, top_p=1.)
    before = [said(**w) for w in ways]
    habits = getattr(m, 'get_base_model', lambda: m)().generation_config
    habits.repetition_penalty, habits.top_k, habits.no_repeat_ngram_size, habits.min_p = 3., 2, 2, .5
    assert [said(**w) for w in ways] == before
    assert getattr(m, 'get_base_model', lambda: m)().generation_config.repetition_penalty == 3.


@pytest.mark.parametrize('has', [True, False])
def test_eight_bit_weights_of_torchao(monkeypatch, has, stored, tmp_path):
    pytest.importorskip('torchao')
    monkeypatch.setattr(models, 'has_bf16', lambda: has)
    folder, adapter = stored[0], tmp_path/'adapter'
    learnt = add_lora(load_model(folder, 'fp32'), LoraConfig(rank=4))
    for n, p in learnt.named_parameters():
        if 'lora_B' in n: p.data.normal_(std=.3)
    learnt.save_pretrained(adapter)
    exact, held = (load_model(folder, p, adapter) for p in ('bf16', 'int8-wo'))
    assert held.dtype == arithmetic('int8-wo') == (torch.bfloat16 if has else torch.float32)
    linear = sum(p.numel() for n, p in exact.named_parameters() if 'base_layer' in n)
    less = sum(t.nbytes for t in weight_tensors(exact)) - sum(t.nbytes for t in weight_tensors(held))
    assert .7 < less/linear/(1 if has else 3) <= 1  # a byte of each weight, or three, less what the scales take
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        a, b = (m(input_ids=ids).logits.float() for m in (exact, held))
        with held.disable_adapter(): without = held(input_ids=ids).logits.float()
    assert 0 < (a-b).abs().mean() < .1*a.std() < (b-without).abs().mean()  # rounded a little; the adapter acts
    assert decodes_together(held)


def test_a_precision_without_its_library_or_its_gpu(monkeypatch, stored):
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match='int4-wo needs an NVIDIA GPU of compute capability 8.0'): load_model(stored[0], 'int4-wo')
    monkeypatch.setattr(models, 'find_spec', lambda name: None)
    with pytest.raises(ModelError, match=r"int8-wo needs torchao: pip install 'yothalia\[gpu\]'"): load_model(stored[0], 'int8-wo')
    with pytest.raises(ConfigError, match='fp8 is for speaking: train at bf16 or nf4'): configure(LoraConfig, dict(precision='fp8'))
