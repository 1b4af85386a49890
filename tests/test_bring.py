"Models as their authors shipped them: pickled, under names of their own, with a tokenizer.model and no chat template."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM
from yothalia.convert import ModelError, converted_model, quiet
from yothalia.core import ConfigError, read_jsonl, rooted
from yothalia.models import find_chat, load_model, load_tokenizer, parameters, resolve_model
from yothalia.prompts import PERSONA, encode, encode_chain
from yothalia.rendering import CHAT_TEMPLATES, reply_place, stop_ids, text_ids
from yothalia.rows import lesson_rows

BIN = Path(sys.executable).parent
SIZE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048)
MARKS = {'internlm': ['<eoh>', '<eoa>'], 'baichuan': ['<reserved_106>', '<reserved_107>'], 'llama': []}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A cache of its own, and a sentencepiece model for each of the three, trained on the sample."
    from sentencepiece import SentencePieceTrainer
    place = tmp_path_factory.mktemp('bring')
    rows = lesson_rows(8)
    (place/'text.txt').write_text('\n'.join(f"{r['user']}\n{r['reply']}\n{r['instruction']}" for r in rows), encoding='utf-8')
    for kind, marks in MARKS.items():
        SentencePieceTrainer.train(input=str(place/'text.txt'), model_prefix=str(place/kind), vocab_size=1000, model_type='bpe', byte_fallback=True, pad_id=-1,
                                   add_dummy_prefix=kind == 'llama', normalization_rule_name='identity', remove_extra_whitespaces=False, user_defined_symbols=marks, minloglevel=9)
    before, os.environ['YOTHALIA_CACHE'] = os.environ.get('YOTHALIA_CACHE'), str(place/'cache')
    yield place
    os.environ.pop('YOTHALIA_CACHE')
    if before: os.environ['YOTHALIA_CACHE'] = before


def shipped(home, kind, name):
    "A folder as its authors would have saved it, and the Llama that it is."
    folder = home/name
    torch.manual_seed(0)
    with quiet(): model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, attention_bias=kind == 'internlm', **SIZE)).eval()
    for p in model.parameters(): p.data.normal_(std=.1 if p.dim() > 1 else .3).add_(p.dim() == 1)
    if folder.exists(): return folder, model
    folder.mkdir()
    w = {k: v.clone() for k, v in model.state_dict().items()}
    for i in range(2):
        at = f'model.layers.{i}.self_attn'
        if kind == 'baichuan': w[f'{at}.W_pack.weight'] = torch.cat([w.pop(f'{at}.{c}_proj.weight') for c in 'qkv'])
        else: w[f'{at}.rotary_emb.inv_freq'] = torch.rand(8)
    if kind == 'baichuan': w['lm_head.weight'] = w['lm_head.weight']*torch.rand(1000, 1).add(.5)
    items = list(w.items())
    for i in range(2): torch.save(dict(items[i::2]), folder/f'pytorch_model-0000{i+1}-of-00002.bin')
    config = SIZE | dict(vocab_size=1000, model_type=kind, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, hidden_act='silu', torch_dtype='float32')
    if kind != 'llama': config |= dict(bias=kind == 'internlm', auto_map=dict(AutoModelForCausalLM=f'modeling_{kind}.Model', AutoConfig=f'configuration_{kind}.C'))
    (folder/'config.json').write_text(json.dumps(config))
    (folder/f'modeling_{kind}.py').write_text('raise SystemExit("code that came with a model was run")')
    said = dict(tokenizer_class=f'{kind.title()}Tokenizer', bos_token='<s>', eos_token=dict(content='</s>', __type='AddedToken'), unk_token='<unk>')
    if kind != 'llama': said['auto_map'] = dict(AutoTokenizer=[f'tokenization_{kind}.T', None])
    (folder/'tokenizer_config.json').write_text(json.dumps(said))
    shutil.copy(home/f'{kind}.model', folder/'tokenizer.model')
    return folder, model


KINDS = {'internlm': 'internlm-chat-tiny', 'baichuan': 'Baichuan2-tiny-Chat', 'llama': 'Llama-2-tiny'}


@pytest.mark.parametrize('kind', KINDS)
def test_the_same_model_under_the_llama_class(home, kind):
    "Logits of the converted folder are those of the weights, with Baichuan2's output rows of length one; nothing that came with it was run."
    folder, model = shipped(home, kind, KINDS[kind])
    if kind == 'baichuan': model.lm_head.weight.data = torch.nn.functional.normalize(model.lm_head.weight.data)
    ids = torch.randint(0, 1000, (2, 50))
    with torch.no_grad(): far = (load_model(str(folder), 'fp32')(ids).logits - model(ids).logits).abs().max()
    assert far < 1e-5
    made = Path(resolve_model(str(folder)))
    assert made != folder and json.loads((made/'config.json').read_text())['model_type'] == 'llama' and not list(made.glob('*.bin')) and not list(made.glob('*.py'))
    assert converted_model(folder, str(folder)) == made


def composed(kind, sp, persona, turns):
    "A prompt's ids as the authors' own code puts them together."
    if kind == 'baichuan':
        ids = sp.encode(persona)
        for role, text in turns: ids += [sp.piece_to_id('<reserved_106>' if role == 'user' else '<reserved_107>'), *sp.encode(text)]
        return [*ids, sp.piece_to_id('<reserved_107>')]
    text = f'<|System|>:{persona}\n' if persona else ''
    for role, said in turns: text += f'<|User|>:{said}<eoh>\n' if role == 'user' else f'<|Bot|>:{said}<eoa>\n'
    return [1, *sp.encode(text + '<|Bot|>:')]


@pytest.mark.parametrize('kind', ['internlm', 'baichuan'])
def test_prompts_are_the_authors(home, kind):
    "For no turn to three before the line, with a persona and without: id for id."
    from sentencepiece import SentencePieceProcessor
    sp, rows = SentencePieceProcessor(str(home/f'{kind}.model')), lesson_rows(8)
    tok = load_tokenizer(str(shipped(home, kind, KINDS[kind])[0]))
    for k in range(4):
        for persona in ('', rows[0]['instruction']):
            turns = [t for r in rows[:k] for t in (('user', r['user']), ('assistant', r['reply']))] + [('user', rows[k]['user'])]
            msgs = [dict(role='system', content=persona)]*bool(persona) + [dict(role=r, content=t) for r, t in turns]
            assert text_ids(tok, reply_place(tok, msgs)[0]) == composed(kind, sp, persona, turns)
    end = '<eoa>' if kind == 'internlm' else '</s>'
    assert encode(rows[0], tok)['labels'][-1] == tok.convert_tokens_to_ids(end) in stop_ids(tok)


@pytest.mark.parametrize('form', CHAT_TEMPLATES)
@pytest.mark.parametrize('kind', MARKS)
def test_every_form_on_every_tokenizer(home, kind, form):
    "A form is refused where its marks are missing; else the prompt begins and ends as it says, and a conversation's context is the prompt."
    folder = str(shipped(home, kind, 'base-' + kind)[0])
    missing = [m for m in CHAT_TEMPLATES[form].marks if m not in MARKS[kind]]
    if missing:
        with pytest.raises(Exception, match='which this tokenizer does not know: choose chat_template among plain'): load_tokenizer(folder, form)
        return
    tok, row = load_tokenizer(folder, form), lesson_rows(1)[0]
    e = encode(row, tok, PERSONA)
    said = [i for i, l in zip(e['input_ids'], e['labels']) if l != -100]
    assert tok.decode(said[:-1]).strip() == row['reply'] and said[-1] in stop_ids(tok)
    prompt = tok.decode([i for i, l in zip(e['input_ids'], e['labels']) if l == -100])
    assert row['instruction'] in prompt and row['user'] in prompt and prompt.count('<s>') == CHAT_TEMPLATES[form].start.count('<s>')
    later = row | dict(history=[dict(role='user', text=row['user']), dict(role='assistant', text=row['reply'])], user='And then?', reply='Nothing.')
    chain = encode_chain([row, later], tok, PERSONA)
    assert chain is None if form == 'baichuan2' else chain['input_ids'][:len(e['input_ids'])] == e['input_ids']


def test_a_base_model_is_asked_for_a_form(home):
    "Before anything is done, by name; a wrong name gets the nearest."
    folder = str(shipped(home, 'llama', 'base-llama')[0])
    with pytest.raises(ModelError, match='as base models have none: choose one by chat_template: plain'): find_chat(folder)
    find_chat(folder, 'plain')
    find_chat(str(shipped(home, 'internlm', KINDS['internlm'])[0]))
    with pytest.raises(ModelError, match='no chat template'): load_tokenizer(folder)
    assert abs(parameters(folder)[0] - 2*sum(parameters(resolve_model(folder)))) < 20_000 # these have four bytes each
    run = [str(BIN/'yothalia'), 'run', '-p', 'data=lesson', '-p', f'model={folder}', '--steps', '01_data,02_lora', '--name', 'test-base']
    got = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert got.returncode and 'choose one by chat_template' in got.stdout + got.stderr and not rooted('_runs/test-base/data').exists()
    got = subprocess.run([*run, '-p', 'chat_template=plian'], capture_output=True, text=True, timeout=120)
    assert got.returncode and "did you mean 'plain'" in got.stdout + got.stderr


@pytest.mark.parametrize('kind,form', [('internlm', 'auto'), ('baichuan', 'auto'), ('llama', 'plain'), ('llama', 'own')])
def test_from_their_files_to_a_talk(home, kind, form):
    "Rows in, trained, asked, talked to and merged; the form is remembered by the adapter and written into the merged folder."
    from yothalia.all import Run, load
    from yothalia.tuned import merge
    name = f'test-bring-{kind}-{form}'
    shutil.rmtree(rooted(f'_runs/{name}'), ignore_errors=True)
    if form == 'own':
        (home/'own.jinja').write_text("{% for m in messages %}{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant>{% endif %}")
    run = load('lesson', name)
    try:
        run.model, run.chat_template, run.precision = str(shipped(home, kind, KINDS[kind])[0]), str(home/'own.jinja') if form == 'own' else form, 'fp32'
        run.train(epochs=1, valid_rows=2)
        again = Run.open(name)
        assert again.tok.chat_template == run.tok.chat_template and (again.chats == '') == (form == 'auto')
        assert run.records('lora')[0]['what'].get('chat_template', '').startswith({'auto': '', 'plain': 'plain', 'own': 'own'}[form])
        s, _ = again.session()
        said = ''.join(s.say('Who are you?'))
        assert said and s.path()[-1].text
        merged = merge(run.model, run.worn, rooted(run.out)/'merged', again.chats)
        alone = load_tokenizer(str(merged))
        assert alone.chat_template == run.tok.chat_template and stop_ids(alone) == stop_ids(run.tok)
    finally: shutil.rmtree(rooted(run.out), ignore_errors=True)


def test_a_model_of_the_hub_that_must_be_converted(home):
    "All its files are taken, from the hub or its local cache, and converted like a folder; another model's place stays its id."
    folder, model = shipped(home, 'internlm', KINDS['internlm'])
    hub = home/'hub'/'models--internlm--internlm-chat-7b'
    shutil.copytree(folder, hub/'snapshots'/'abc')
    (hub/'refs').mkdir()
    (hub/'refs'/'main').write_text('abc')
    code = """
import torch
from yothalia.models import *
print(resolve_model('qwen3-8b'), load_tokenizer('internlm-chat-7b').chat_template[:40])
print(float(load_model('internlm-chat-7b', 'fp32')(torch.arange(50)[None]).logits.detach().abs().sum()))
"""
    got = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=200,
                         env=os.environ | dict(HF_HUB_CACHE=str(home/'hub'), HF_HUB_OFFLINE='1'))
    with torch.no_grad(): right = float(model(torch.arange(50)[None]).logits.abs().sum())
    assert got.stdout.split()[0] == 'Qwen/Qwen3-8B' and '{{ bos_token }}' in got.stdout, got.stdout + got.stderr[-2000:]
    assert abs(float(got.stdout.split()[-1]) - right) < 1e-3*right
