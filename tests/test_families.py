"Shapes of many families, tiny and with random weights: whatever way a model takes, it gives what the plain one gives."
import re
from pathlib import Path
import numpy as np, pytest, torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from yothalia.decoding import decoder_of, decodes_together
from yothalia.fused import fuse
from yothalia.lora import with_lora
from yothalia.convert import quiet
from yothalia.session import Voice
from yothalia.scoring import Item, unfit
from yothalia.packing import example_nll, pack_examples, pack_lengths, pack_nll, packed, packing_way

ROOT = Path(__file__).parent.parent
BASE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=2048, max_position_embeddings=2048,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
WINDOW = dict(head_dim=16, sliding_window=24)
# family → how it differs, and whether its conversations can share a pack
FAMILIES = {
    'llama': ({}, True), 'mistral': (dict(sliding_window=24), True), 'mixtral': (dict(num_local_experts=4), True), 'qwen2': ({}, True), 'qwen3': (dict(head_dim=16), True),
    'qwen3_moe': (MOE | dict(head_dim=16), True), 'gemma2': (WINDOW | dict(query_pre_attn_scalar=16), True), 'gemma3_text': (WINDOW | dict(query_pre_attn_scalar=16), True),
    'phi3': (dict(sliding_window=24), True), 'olmo3': (dict(sliding_window=24), True), 'glm4': (dict(head_dim=16), True), 'internlm3': ({}, True),
    'gpt_oss': (WINDOW | dict(num_local_experts=4, num_experts_per_tok=2), False), 'falcon': (dict(new_decoder_architecture=False), False),
    'lfm2': (dict(layer_types=['conv', 'full_attention']*2), False),
    'granitemoehybrid': (dict(num_local_experts=0, layer_types=['mamba', 'attention']*2, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, shared_intermediate_size=64), False),
    'qwen3_next': (MOE | dict(shared_expert_intermediate_size=32, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
                              linear_value_head_dim=16), False),
    'deepseek_v3': (dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                         v_head_dim=16, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1), True)}


def shape(kind, **how):
    torch.manual_seed(0)
    with quiet(): model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**BASE | FAMILIES[kind][0] | how)).float().eval()
    for p in model.parameters():
        if p.dim() > 1: p.data.normal_(std=.15)
    return model


def rows(n=6):
    rng = np.random.default_rng(0)
    made = [rng.integers(4, 2000, int(rng.integers(12, 60))).tolist() for _ in range(n)]
    return [dict(input_ids=ids, labels=[-100]*5 + ids[5:]) for ids in made]


def alone(model, e):
    logits = model(input_ids=torch.tensor([e['input_ids']]), use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(e['labels'])[1:], ignore_index=-100, reduction='sum')


@pytest.mark.parametrize('kind', FAMILIES)
def test_losses_and_gradients(kind):
    "Held-out losses and a training's gradient are those of each example by itself, in transformers' own attention and peft's own layers."
    model, data = shape(kind), rows()
    with quiet():
        assert (packing_way(model) != 'single') == FAMILIES[kind][1], packing_way(model)
        with torch.no_grad(): right = np.array([alone(model, e).item() for e in data])
        sums, counts = example_nll(model, data)
        assert np.abs(sums - right).max()/counts.min() < 1e-4
        tuned = with_lora(model, LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear', r=4, lora_alpha=8))
        torch.manual_seed(1)
        for n, p in tuned.named_parameters():
            if 'lora_B' in n: p.data.normal_(std=.02)
        sum(alone(tuned, e) for e in data).backward()
        grads = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
        tuned.zero_grad()
        fuse(tuned)
        with packed(tuned):
            for p in pack_lengths([len(e['input_ids']) for e in data], 1 if packing_way(tuned) == 'single' else 512):
                pack_nll(tuned, pack_examples([data[i] for i in p])).sum().backward()
    assert grads and max(((grads[n]-p.grad).norm()/grads[n].norm().clamp(min=1e-6)).item() for n, p in tuned.named_parameters() if n in grads) < 1e-4
    assert not any('router' in n or n.split('.lora_')[0].endswith('.gate') for n in grads)


@pytest.mark.parametrize('kind', FAMILIES)
def test_replies(kind):
    "Several replies of unlike lengths, stepped together or each alone: the logits are those of the whole text read without a cache."
    model, prompts = shape(kind), [list(range(5, 12)), list(range(20, 60)), [9, 8]]
    with torch.inference_mode(), quiet():
        d = decoder_of(model, 3, 64)
        logits, texts = d.seat(prompts), [list(p) for p in prompts]
        for k in range(4):
            drawn = logits.argmax(-1).tolist()
            for t, x in zip(texts, drawn): t.append(x)
            logits = d.step(drawn)
            if k == 2:  # one leaves, and the last one takes its place
                d.table.free(0)
                texts, logits = [texts[2], texts[1]], logits[[2, 1]]
        for t, l in zip(texts, logits): assert (l - model(input_ids=torch.tensor([t]), use_cache=False).logits[0, -1]).abs().max() < 1e-3


# no attention, or slopes in place of positions: what a conversation keeps of them is not a table of keys and values
STATES = {'mamba': dict(state_size=8, num_hidden_layers=2, num_attention_heads=None), 'rwkv': dict(attention_hidden_size=64),
          'falcon': dict(alibi=True, new_decoder_architecture=False), 'bloom': {},
          'bamba': dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, attn_layer_indices=[1, 3])}


@pytest.mark.parametrize('kind', [*STATES, 'gemma3_text', 'lfm2', 'llama', 'qwen3_next'])
def test_a_talk(kind, monkeypatch):
    "What a voice says, token by token, and of a second prompt that begins like the first, is what reading all of it anew gives."
    if kind in STATES: monkeypatch.setitem(FAMILIES, kind, (STATES[kind], False))
    model, voice = shape(kind), Voice.__new__(Voice)
    voice.model, voice.kept, voice.cache, voice.on = model, [], None, None
    rng = np.random.default_rng(1)
    first = rng.integers(4, 2000, 40).tolist()
    for prompt in (first, first + rng.integers(4, 2000, 9).tolist()):
        with torch.inference_mode(), quiet():
            logits, _ = voice.listen(prompt)
            ids = list(prompt)
            for _ in range(5):
                right = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                assert (logits - right).abs().max() < 1e-3*right.std() + 1e-4, kind
                ids.append(int(right.argmax()))
                logits = voice.step(ids[-1])


def told():
    "Family, whether its window is short → packed, tree, together: the table of the guide."
    page, ways, last = (ROOT/'nbs'/'guides'/'models.md').read_text(encoding='utf-8'), {}, []
    for line in page[page.index('| families |'):].split('\n\n')[0].splitlines()[2:]:
        families, *cells = [c.strip() for c in line.strip('|').split('|')]
        last = re.findall('`(.*?)`', families) or last
        for kind in last: ways[kind, 'longer than' in families] = tuple(c != 'one by one' for c in cells)
    return ways


@pytest.mark.parametrize('kind, short', told())
def test_the_guide_tells_the_ways(kind, short):
    "What is right is as near to the plain way as rounding explains, what is wrong is not, in 16 bits as in 32."
    draw = np.random.default_rng(0)
    words = lambda low, high: draw.integers(4, 2000, int(draw.integers(low, high))).tolist()
    items = [Item(words(30, 60), [words(8, 30) for _ in range(5)]) for _ in range(32)]
    for dtype in (torch.float32, torch.bfloat16):
        model = shape(kind, **{} if short or 'sliding_window' not in FAMILIES[kind][0] else dict(sliding_window=4096)).to(dtype)
        with torch.inference_mode(), quiet(): why = unfit(model, items)
        assert (packing_way(model) != 'single', not why, decodes_together(model, 64)) == told()[kind, short], (dtype, why)
        assert not why or any(w in why for w in ('window', 'times as much as rounding', 'more to it')), why


def test_the_guide_tells_of_all(): assert {k for k, _ in told()} == set(FAMILIES)
