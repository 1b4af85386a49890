"""Character cards: what comes out is what went in, another reader agrees, and what strangers send is refused in a sentence."""
import base64, io, json, os, string, struct, subprocess, sys, time, zipfile, zlib
from pathlib import Path

import pytest

pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings, strategies as st

from yothalia.cards import (MAX_JSON, SIGNATURE, Card, CardError, card_of, fill, from_charx, from_png, parse_json, portrait, read_card,
                            to_json, _chunk)
from yothalia.data import read_source
from yothalia.rows import RowsConfig
from yothalia.files import DataError

ROOT = Path(__file__).parent.parent
words = st.text(st.characters(codec='utf-8'), max_size=60)
anything = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | words, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3), max_leaves=6)
entries = st.fixed_dictionaries(dict(keys=st.lists(words, max_size=3), content=words, enabled=st.booleans(), insertion_order=st.integers(0, 999),
                                     extensions=st.dictionaries(words, anything, max_size=2), use_regex=st.booleans()),
                                optional=dict(constant=st.booleans(), selective=st.booleans(), secondary_keys=st.lists(words, max_size=2), priority=st.integers(0, 9),
                                              position=st.sampled_from(['before_char', 'after_char']), case_sensitive=st.booleans()))
books = st.fixed_dictionaries(dict(entries=st.lists(entries, max_size=4), extensions=st.dictionaries(words, anything, max_size=1)),
                              optional=dict(scan_depth=st.integers(0, 20), token_budget=st.integers(0, 500), recursive_scanning=st.booleans(), name=words))
fields = st.fixed_dictionaries(dict(name=words.filter(str.strip), **{k: words for k in ('description', 'personality', 'scenario', 'first_mes', 'mes_example', 'creator_notes',
                                    'system_prompt', 'post_history_instructions', 'creator', 'character_version')},
                                    alternate_greetings=st.lists(words, max_size=3), tags=st.lists(words, max_size=3), group_only_greetings=st.lists(words, max_size=2),
                                    extensions=st.dictionaries(words, anything, max_size=3)),
                               optional=dict(character_book=books, nickname=words, creation_date=st.integers(0, 2**40), x_of_the_future=anything))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields)
def test_survives(data):
    "Object, PNG, JSON and archive: two hundred cards with every field, unknown ones among them, come back as they were; and the card can be used."
    o = dict(spec='chara_card_v3', spec_version='3.0', data=data)
    card = card_of(o)
    assert card.as_object() == o
    png = from_png(card.to_png())
    assert png.as_object() == o
    assert card_of(parse_json(to_json(png.as_object()).encode())).as_object() == o
    assert from_charx(png.to_charx()).as_object() == o
    assert from_png(png.to_png()).to_png() == png.to_png()
    card.persona('Alice'); card.greetings('Alice'); card.dialogues('Alice')
    card.found_lore([data['description'], data['first_mes']], budget=100)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields)
def test_another_reader_agrees(data):
    "tavern-card reads from our pictures what we wrote into them, and we read from its."
    tavern = pytest.importorskip('tavern_card')
    card = card_of(dict(spec='chara_card_v3', spec_version='3.0', data=data))
    theirs = tavern.parse_png_card(card.to_png())['data']
    for k in ('description', 'personality', 'scenario', 'first_mes', 'mes_example', 'creator_notes', 'system_prompt', 'alternate_greetings', 'tags', 'extensions'):
        assert theirs[k] == data[k], k
    assert theirs['name'] == data['name'].strip() and theirs['character_book'] == data.get('character_book')
    v2 = dict(spec='chara_card_v2', spec_version='2.0', data={k: v for k, v in data.items() if k != 'group_only_greetings'})
    back = from_png(tavern.write_png_card(v2, portrait('x')))
    assert back.version == 2 and back.data == v2['data']


@settings(max_examples=100, deadline=None)
@given(words, words, words)
def test_macros_take_any_text(text, char, user):
    "Whatever a card says and whatever people are called, a text comes out, and a name is never read as a macro."
    assert isinstance(fill(text, char, user), str)
    assert fill('{{user}}', char, user) == user or any(c in user for c in '\ue000\ue001\ue002')


def broken():
    "Files that strangers send, each with a part of the sentence that it gets."
    good = card_of(dict(name='A', description='b')).to_png()
    at = good.index(b'IDAT')
    yield 'truncated.png', good[:len(good)//2], 'cut off'
    yield 'flipped.png', good[:at+20] + bytes([good[at+20] ^ 1]) + good[at+21:], 'damaged'
    yield 'long.png', SIGNATURE + struct.pack('>I', 100_000_000) + b'tEXtchara\0' + b'a'*1000, 'cut off'
    yield 'really-long.png', SIGNATURE + _chunk(b'tEXt', b'chara\0' + b'a'*100_000_000) + _chunk(b'IEND', b''), 'MB'
    yield 'bomb.png', SIGNATURE + _chunk(b'zTXt', b'chara\0\0' + zlib.compress(b'a'*200_000_000)) + _chunk(b'IEND', b''), 'unpacks to more'
    yield 'plain.png', portrait('A'), 'without a character'
    yield 'photo.jpg', b'\xff\xd8\xff\xe0' + b'0'*100, 'but no PNG'
    z = io.BytesIO()
    with zipfile.ZipFile(z, 'w', zipfile.ZIP_DEFLATED) as f:
        f.writestr('card.json', '{"name": "A", "description": "b"}')
        for k in range(4): f.writestr(f'{k}', bytes(2**27))
    yield 'bomb.charx', z.getvalue(), '256 MB'
    z = io.BytesIO()
    with zipfile.ZipFile(z, 'w') as f: f.writestr('picture.png', b'')
    yield 'empty.charx', z.getvalue(), 'without card.json'
    yield 'cut.charx', z.getvalue()[:-10], 'not a whole archive'
    yield 'deep.json', b'{"spec": "chara_card_v2", "data": ' + b'['*100_000 + b']'*100_000 + b'}', 'nested'
    yield 'wide.json', b' '*(MAX_JSON+1), 'MB of JSON'
    yield 'nan.json', b'{"name": "A", "description": "b", "x": NaN}', 'no JSON number'
    yield 'latin.json', '{"name": "Ä", "description": "b"}'.encode('latin-1'), 'not UTF-8'
    yield 'other.json', b'{"a": 1}', 'no character card'
    yield 'nameless.json', b'{"spec": "chara_card_v2", "data": {"description": "b"}}', 'no name'


@pytest.mark.parametrize('name,content,says', list(broken()), ids=lambda v: v if isinstance(v, str) and '.' in v else '')
def test_refused(tmp_path, name, content, says):
    "Quickly, with the file's name and the reason."
    (tmp_path/name).write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(CardError, match=says) as e: read_card(tmp_path/name)
    assert time.perf_counter()-start < 5 and name in str(e.value)


def test_expressions_of_strangers_end(tmp_path):
    "A book of catastrophic expressions costs seconds, not years, and the other entries still work."
    bad = [dict(keys=[f'(a|a)*{k}$'], use_regex=True, content='x', enabled=True) for k in range(500)]
    card = Card(dict(name='A', character_book=dict(recursive_scanning=True, entries=bad + [dict(keys=['tart'], content='yes', enabled=True)])))
    start = time.perf_counter()
    assert card.found_lore(['a'*60 + ' tart'])['after_char'] == ['yes']
    assert time.perf_counter()-start < 5


def test_examples_are_rows(tmp_path):
    "A card's dialogues come in through the door of all rows, as JSON, picture and archive alike; without any there is a sentence."
    said = '\n'.join(f'<START>\n{{{{user}}}}: What about {w}?\n{{{{char}}}}: {w.title()}! Off with it!\n{{{{user}}}}: Why?\n{{{{char}}}}: {w.upper()}!'
                     for w in ('roses', 'tarts', 'hoops'))
    card = card_of(dict(spec='chara_card_v2', spec_version='2.0', data=dict(name='Queen', description='{{char}} shouts at {{user}}.', mes_example=said)))
    for end in ('json', 'png', 'charx'):
        rows, rejects = read_source(RowsConfig(data=str(card.save(tmp_path/f'queen.{end}'))))
        assert len(rows) == 6 and not rejects
        assert {r['character'] for r in rows} == {'Queen'} and rows[0]['instruction'] == 'Queen shouts at User.'
        assert rows[1]['history'] == [dict(role='user', text='What about roses?'), dict(role='assistant', text='Roses! Off with it!')]
        assert len({r['scene'] for r in rows}) == 3
    silent = card_of(dict(name='Mute', description='says nothing')).save(tmp_path/'mute.png')
    with pytest.raises(DataError, match='mes_example'): read_source(RowsConfig(data=str(silent)))
    (tmp_path/'photo.png').write_bytes(portrait('A'))
    with pytest.raises(DataError, match='without a character'): read_source(RowsConfig(data=str(tmp_path/'photo.png')))
