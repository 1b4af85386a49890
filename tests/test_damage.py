"Whatever is damaged, a reader says so in its own words: nothing else is raised, nothing runs on for ever."
import copy, gzip, io, json, random, struct, zipfile
from pathlib import Path
import pytest
from yothalia import convert, models
from yothalia.cards import CardError, card_from
from yothalia.characters import character_of_card
from yothalia.convert import ModelError
from yothalia.files import DataError
from yothalia.rows import read_rows
from yothalia.session import Session

ODD = [None, 5, -1, 1.5, True, 'x', '', [], {}, [1], [None], ['a'], [['a']], [{}], [{'role': None}], {'a': 1},
       {'list': 5}, {'entries': 5}, [{'text': 5}], [['a', 'b']], 10**400, '\ud800', float('inf'), '\0', 2**70, '/(/']
ROWS = {
    'own.json': [dict(user='a', reply='b', character='A', history=[dict(role='user', text='x'), dict(
        role='assistant', text='y')])],
    'alpaca.json': [dict(instruction='i', input='q', output='r', system='s', history=[['a', 'b']])],
    'telegram.json': dict(chats=dict(list=[dict(name='x', type='personal_chat', messages=[
        dict(id=1, type='message', date='2020-01-01T00:00:00', text=[dict(type='bold', text='hi'), 'x'], **{'from': 'A'}),
        dict(id=2, type='message', date='2020-01-01T00:01:00', text='yo', **{'from': 'B'})])])),
    'tree.json': [dict(current_node='b', mapping=dict(
        a=dict(message=dict(author=dict(role='user'), content=dict(parts=['hi'])), parent=None, children=['b']),
        b=dict(message=dict(author=dict(role='assistant'), content=dict(parts=['ho'])), parent='a', children=[])))],
    'parts.json': [dict(messages=[dict(role='user', content=[dict(type='text', text='x')]),
                                  dict(role='assistant', content='y')])],
    'pairs.json': [dict(prompt=[dict(role='user', content='x')], chosen=[dict(role='assistant', content='y')],
                        rejected=[dict(role='assistant', content='z')])],
    'columns.json': dict(user={'0': 'a', '1': 'c'}, reply={'0': 'b', '1': 'd'})}
ENTRY = dict(keys=['a', 'b'], secondary_keys=['c'], content='@@depth 3\n@@role user\nc {{user}}', insertion_order=1,
             enabled=True, extensions={}, priority=3, selective=True, use_regex=False, position='before_char')
CARD = dict(spec='chara_card_v3', spec_version='3.0', data=dict(
    name='Wick', nickname='W', description='d {{char}} {{random:a,b}}', personality='p', scenario='s', first_mes='h',
    mes_example='<START>\n{{user}}: a\n{{char}}: b', alternate_greetings=['q'], tags=['x'], creator='c',
    system_prompt='sp {{original}}', post_history_instructions='ph', extensions={}, character_book=dict(
        entries=[ENTRY, ENTRY | dict(use_regex=True, keys=['/a+/i'])], scan_depth=3, token_budget=50,
        recursive_scanning=True)))

def odd(o, rng:random.Random):
    "The same object with one to three of its values replaced or gone."
    box = [json.loads(json.dumps(o))]
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = []
        def walk(into, key):
            places.append((into, key))
            v = into[key]
            for k in list(v) if isinstance(v, dict) else range(len(v)) if isinstance(v, list) else (): walk(v, k)
        walk(box, 0)
        into, key = rng.choice(places)
        if isinstance(into, dict) and rng.random() < .2: into.pop(key)
        else: into[key] = copy.deepcopy(rng.choice(ODD))
    return box[0]

def damaged(b:bytes, rng:random.Random) -> bytes:
    "The same bytes, a few of them others, and sometimes cut off."
    b = bytearray(b)
    for _ in range(rng.choice([1, 2, 5])): b[rng.randrange(len(b))] = rng.choice([0, 255, rng.randrange(256)])
    if rng.random() < .3: del b[rng.randrange(len(b)):]
    return bytes(b)

def read(path:Path, b:bytes):
    path.write_bytes(b)
    try: read_rows(path)
    except DataError as e: assert len(str(e)) > 10

@pytest.mark.parametrize('name', ROWS)
def test_rows_of_odd_objects(name, tmp_path):
    rng = random.Random(name)
    for _ in range(60): read(tmp_path/name, json.dumps(odd(ROWS[name], rng)).encode())

@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives(method, tmp_path):
    with zipfile.ZipFile(out := io.BytesIO(), 'w', method) as z:
        z.writestr('a.jsonl', '{"user": "a", "reply": "b"}\n'*50)
        z.writestr('card.json', json.dumps(CARD))
    rng = random.Random(method)
    for _ in range(150):
        read(tmp_path/'a.zip', b := damaged(out.getvalue(), rng))
        try: card_from(b, 'a.charx')
        except CardError: pass

def test_packed_rows(tmp_path):
    whole, rng = gzip.compress(b'{"user": "a", "reply": "b"}\n'*50), random.Random(0)
    for _ in range(150): read(tmp_path/'a.jsonl.gz', damaged(whole, rng))

def test_cards_and_their_books():
    rng = random.Random(1)
    for _ in range(150):
        try: card = card_from(json.dumps(odd(CARD, rng)).encode(), 'wick.json')
        except CardError: continue
        card.summary(), card.to_png(), card.to_charx(), [card.as_object(v) for v in (1, 2, 3)]
        card.found_lore(['a x', 'b', 'aaa c'], 'U'), character_of_card(card)

class Nobody: tok = None

def test_logs(tmp_path):
    who, rng = character_of_card(card_from(json.dumps(CARD).encode(), 'wick.json')), random.Random(2)
    s = Session(Nobody(), who)
    s.greet(), s.add('user', 'hi'), s.add('assistant', 'ho'), s.add('user', 'more')
    lines = [json.loads(l) for l in s.save(tmp_path/'a.jsonl').read_text().splitlines()]
    taken = 0
    for _ in range(300):
        made = odd(lines, rng)
        b = '\n'.join(map(json.dumps, made if isinstance(made, list) else [made])).encode()
        (tmp_path/'b.jsonl').write_bytes(damaged(b, rng) if b and rng.random() < .2 else b)
        new = Session(Nobody(), who)
        try: new.load(tmp_path/'b.jsonl')
        except ValueError as e: assert 'no chat log' in str(e)
        else:
            taken += 1
            for t in new.turns: new.path(t.id)
            new.save(tmp_path/'c.jsonl'), new.recalled(new.path())
            if new.at: new.row(new.path())
    assert 30 < taken < 290

def test_a_turn_is_not_its_own_parent(tmp_path):
    turns = [dict(id=1, parent=1, role='user', text='hi')]
    (tmp_path/'a.jsonl').write_text(json.dumps(dict(chat_metadata=dict(yothalia=dict(turns=turns, at=1)))))
    with pytest.raises(ValueError, match='do not hang together'):
        Session(Nobody(), character_of_card(card_from(json.dumps(CARD).encode(), 'a'))).load(tmp_path/'a.jsonl')

def test_headers_of_weights(tmp_path):
    gguf = struct.pack('<4sIQQQ20sIQ5s', b'GGUF', 3, 0, 1, 20, b'general.architecture', 8, 5, b'llama')
    head = json.dumps({'a.weight': dict(dtype='F32', shape=[2, 2], data_offsets=[0, 16])}).encode()
    tensors, rng = struct.pack('<Q', len(head)) + head + bytes(16), random.Random(3)
    for _ in range(300):
        (tmp_path/'m.gguf').write_bytes(damaged(gguf, rng))
        (tmp_path/'model.safetensors').write_bytes(damaged(tensors, rng))
        for f, place in ((convert.check_gguf, tmp_path/'m.gguf'), (models.parameters, tmp_path),
                         (convert.read_weights, tmp_path/'model.safetensors')):
            try: f(place)
            except ModelError as e: assert str(e)
    (tmp_path/'m.gguf').write_bytes(gguf[:32] + b'general.architecture' + struct.pack('<IQ', 8, 2**62) + b'llama')
    assert convert.gguf_architecture(tmp_path/'m.gguf') == 'llama' # no more is read than a name can be
