"Files as people export them: what each gives, what is refused, and that nothing ends in a traceback."
import io, json, random, zipfile
from pathlib import Path
import openpyxl, pytest
from yothalia.cards import card_of
from yothalia.cleaning import clean_rows
from yothalia.data import DataConfig, labelled, prepare
from yothalia.files import DataError
from yothalia.rows import Reading, read_rows
from yothalia.runner import plan, step_keys

ROOT = Path(__file__).parents[1]
LINES = ['Is the tea haunted?', 'Who dusts the spoons?', 'Do you take coins?', 'May I sit?', 'What is that noise?', 'Are you dead?']
REPLIES = ['Only on Thursdays.', 'The moths do, for a share.', 'Coins, buttons, and good excuses.', 'If the chair agrees.',
           'The cellar, remembering.', 'A little, since Easter.']
PAIRS = list(zip(LINES, REPLIES))


def each(write): return '\n'.join(write(i, q, a) for i, (q, a) in enumerate(PAIRS))
def objects(make): return '\n'.join(json.dumps(make(q, a), ensure_ascii=False) for q, a in PAIRS)
def asked(q, a, **kw): return dict(messages=[dict(role='user', content=q), dict(role='assistant', content=a, **kw)])
def said(q, a): return [dict(role='user', content=q)], [dict(role='assistant', content=a)]
def packed(**files):
    with zipfile.ZipFile(out := io.BytesIO(), 'w') as z:
        for n, t in files.items(): z.writestr(n.replace('__', '/').replace('_json', '.json'), t)
    return out.getvalue()


def days(i): return f'2024-05-0{1+i}'
def workbook(**sheets): # name → rows, as Excel saves them
    book, b = openpyxl.Workbook(), io.BytesIO()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows: sheet.append(row)
    book.save(b)
    return b.getvalue()


def slack():
    users = [dict(id='U1', name='mara'), dict(id='U2', name='g', profile=dict(display_name='Ghost'))]
    talk = {f'tea__{days(i)}_json': json.dumps([dict(type='message', user=u, text=t, ts=f'{1714557660+86400*i+k}.1') for k, (u, t) in enumerate((('U1', q), ('U2', a)))]
                                               + [dict(type='message', subtype='channel_join', user='U1', text='joined', ts='1.0')]) for i, (q, a) in enumerate(PAIRS)}
    return packed(users_json=json.dumps(users), channels_json='[]', **talk)


# name → (content, who is the character); each gives the six replies
SIX = {
    'semicolon.csv': (each(lambda i, q, a: f'question;answer\n"{q}";"{a}"' if not i else f'"{q}";"{a}"'), ''),
    'sep.csv': ('sep=|\nquestion|answer\n' + each(lambda i, q, a: f'{q}|{a}'), ''),
    'mac.csv': ('question\tanswer\r' + each(lambda i, q, a: f'{q}\t{a}').replace('\n', '\r'), ''),
    'index.csv': (',User,Bot\n' + each(lambda i, q, a: f'{i},"{q}","{a}"'), ''),
    'unicode.txt': (('question\tanswer\n' + each(lambda i, q, a: f'{q}\t{a}')).encode('utf-16'), ''),
    'no mark.csv': (('question,answer\n' + each(lambda i, q, a: f'"{q}","{a}"')).encode('utf-16-le'), ''),
    'a message a row.csv': ('conversation_id,speaker,text\n' + each(lambda i, q, a: f'{i},Mara,"{q}"\n{i},Ghost,"{a}"'), 'Ghost'),
    'play lines.csv': ('Season,Episode,Character,Line\n' + each(lambda i, q, a: f'1,1,Mara,"{q}"\n1,1,Ghost,"{a}"'), 'Ghost'),
    'sentences.csv': ('id,season,speaker,words_on_screen\n' + each(lambda i, q, a: f'{2*i},1,Mara,"{q}"\n{2*i+1},1,Ghost,"{a}"'), 'Ghost'),  # the text under a name of its own
    'sentence.csv': ('Season;Name;Sentence\n' + each(lambda i, q, a: f'1;Mara;"{q}"\n1;Ghost;"{a}"'), 'Ghost'),
    'french.csv': ('personnage;réplique\n' + each(lambda i, q, a: f'Mara;"{q}"\nGhost;"{a}"'), 'Ghost'),
    'spanish.csv': ('personaje,pregunta,respuesta\n' + each(lambda i, q, a: f'Ghost,"{q}","{a}"'), ''),
    'japanese.csv': ('質問,返答\n' + each(lambda i, q, a: f'"{q}","{a}"'), ''),
    'names in pairs.json': (json.dumps([dict(dialog=[['Mara', q], ['Ghost', a]]) for q, a in PAIRS]), 'Ghost'),
    'roles in pairs.jsonl': ('\n'.join(json.dumps([['user', q], ['assistant', a]]) for q, a in PAIRS), ''),
    'meeting.txt': (each(lambda i, q, a: f'10:0{i}:22\t From Mara to Everyone:\n\t{q}\n10:0{i}:40\t From Ghost to Everyone:\n\t{a}'), 'Ghost'),
    'recorded.txt': (each(lambda i, q, a: f'00:0{i}:22\tMara:\t{q}\n00:0{i}:40\tGhost:\t{a}'), 'Ghost'),
    'chatterbot.yml': ('categories:\n- ghosts\nconversations:\n' + each(lambda i, q, a: f'- - "{q}"\n  - "{a}"'), ''),
    'growing.jsonl': ('\n'.join(json.dumps(dict(query=q, response=a, history=[[x.rstrip('?.!'), y] for x, y in PAIRS[:i]])) for i, (q, a) in enumerate(PAIRS)), ''),
    'xtuner.json': (json.dumps([dict(conversation=[dict(system='A ghost.', input=q, output=a)]) for q, a in PAIRS]), ''),
    'parts.json': (json.dumps([dict(messages=[dict(role='user', content=[dict(type='text', value=q)]), dict(role='assistant', content=a)]) for q, a in PAIRS]), ''),
    'lists.jsonl': (objects(lambda q, a: asked(q, a)['messages']), ''),
    'swift.jsonl': (objects(lambda q, a: dict(query=q, response=a, history=[['Hi', 'Boo.']])), ''),
    'trl.jsonl': (objects(lambda q, a: dict(zip(('prompt', 'completion'), said(q, a)))), ''),
    'rendered.jsonl': (objects(lambda q, a: dict(text=f'<s>[INST] {q} [/INST] {a} </s>')), ''),
    'hh.jsonl': (objects(lambda q, a: dict(chosen=f'\n\nHuman: {q}\n\nAssistant: {a}', rejected=f'\n\nHuman: {q}\n\nAssistant: As an AI')), ''),
    'orpo.jsonl': (objects(lambda q, a: dict(prompt=q, chosen=said(q, a)[0] + said(q, a)[1], rejected=said(q, 'As an AI')[1])), ''),
    'kto.jsonl': (objects(lambda q, a: dict(prompt=q, completion=a, label=True)) + '\n' + objects(lambda q, a: dict(prompt=q, completion='As an AI', label=False)), ''),
    'weights.jsonl': (objects(lambda q, a: dict(messages=asked('Hi', 'As an AI', weight=0)['messages'] + asked(q, a, weight=1)['messages'])), ''),
    'train.jsonl': (objects(lambda q, a: dict(conversations=[{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'As an AI', 'train': False},
                                                             {'from': 'human', 'value': q}, {'from': 'gpt', 'value': a}])), ''),
    'segments.jsonl': (objects(lambda q, a: dict(segments=[dict(label=False, text=f'<s>{q}\n'), dict(label=True, text=f'{a}</s>')])), ''),
    'rolebench.jsonl': (objects(lambda q, a: dict(role='Ghost', question=q, generated=[a])), ''),
    'coser.jsonl': (objects(lambda q, a: dict(dialogues=[dict(character='Mara', message=q), dict(character='Ghost', message=a)])), 'Ghost'),
    'pippa.jsonl': (objects(lambda q, a: dict(bot_name='Ghost', conversation=[dict(message=q, is_human=True), dict(message=a, is_human=False)])), ''),
    'one talk.json': (json.dumps([t for q, a in PAIRS for t in asked(q, a)['messages']]), ''),
    'webui.json': (json.dumps(dict(internal=[['<|BEGIN-VISIBLE-CHAT|>', 'Boo.'], *map(list, PAIRS)], visible=[])), ''),
    'discord.csv': ('AuthorID,Author,Date,Content,Attachments,Reactions\n' + each(lambda i, q, a: f'1,mara,{days(i)}T10:01:00+00:00,"{q}",,\n2,ghost,{days(i)}T10:02:00+00:00,"{a}",,'), 'ghost'),
    'discord.txt': (each(lambda i, q, a: f'[{1+i}/5/2024 10:01] mara\n{q}\n\n[{1+i}/5/2024 10:02] ghost\n{a}\n'), 'ghost'),
    'instagram.json': (json.dumps(dict(participants=[], messages=[dict(sender_name=w, timestamp_ms=1714557660000+86400000*i+60000*k, content=t)
                                       for i, (q, a) in enumerate(PAIRS) for k, (w, t) in enumerate((('Mara', q), ('Ghost', a)))][::-1])), 'Ghost'),
    'german whatsapp.txt': (each(lambda i, q, a: f'1{2+i}.05.24, 09:00 - Mara: {q}\n1{2+i}.05.24, 09:01 - Ghost: {a}\n1{2+i}.05.24, 09:02 - Ghost: <Medien ausgeschlossen>'), 'Ghost'),
    'american whatsapp.txt': (each(lambda i, q, a: f'5/{1+i}/24, 9:01 PM - Mara: {q}\n5/{1+i}/24, 9:02 PM - Ghost: {a}'), 'Ghost'),
    'chinese whatsapp.txt': (each(lambda i, q, a: f'2024/5/{1+i} 下午9:01 - 玛拉: {q}\n2024/5/{1+i} 下午9:02 - 幽灵: {a}'), '幽灵'),
    'signal.md': (each(lambda i, q, a: f'[{days(i)} 21:01] Mara: {q}\n\n[{days(i)} 21:02] Ghost: > {q}\n{a}\n'), 'Ghost'),
    'line.txt': (each(lambda i, q, a: f'2024/05/0{1+i}(水)\n10:01\tマラ\t{q}\n10:02\t幽霊\t{a}\n10:03\t幽霊\t[スタンプ]\n'), '幽霊'),
    'kakao.txt': (each(lambda i, q, a: f'--------------- 2024년 5월 {1+i}일 수요일 ---------------\n[마라] [오후 9:01] {q}\n[유령] [오후 9:02] {a}'), '유령'),
    'kakao of a phone.txt': (each(lambda i, q, a: f'2024. 5. {1+i}. 오후 1:05, Mara : {q}\n2024. 5. {1+i}. 오후 1:06, Ghost : {a}'), 'Ghost'),
    'slack.zip': (slack(), 'Ghost'),
    'tavern.jsonl': ('\n'.join(json.dumps(o) for o in [dict(user_name='unused', character_name='unused'), *(dict(name=w, is_user=w == 'Mara', mes=t) for q, a in PAIRS
                               for w, t in (('Mara', q), ('Ghost', a)))]), 'Ghost'),
    'play.txt': ('ACT I\n\n' + each(lambda i, q, a: f'MARA. {q}\n\nGHOST. [Rising.] {a}\n'), 'Ghost'),
    'names above.txt': (each(lambda i, q, a: f'Mara:\n{q}\n\nGhost:\n{a}\n'), 'Ghost'),
    'angles.log': (each(lambda i, q, a: f'[12:0{i}] <Mara> {q}\n[12:1{i}] <Ghost> {a}'), 'Ghost'),
    'lamp.fountain': ('Title: Tea\n\nINT. SHOP - NIGHT\n\nMoths.\n\n' + each(lambda i, q, a: f'MARA\n(low)\n{q}\n\nGHOST (V.O.)\n{a}\n'), 'Ghost'),
    'named.srt': (each(lambda i, q, a: f'{i}\n00:00:0{i},000 --> 00:00:0{i},400\nMARA: {q}\n\n{i}\n00:00:0{i},500 --> 00:00:0{i},900\nGHOST: <i>{a}</i>\n'), 'Ghost'),
    'tagged.vtt': ('WEBVTT\n\n' + each(lambda i, q, a: f'00:0{i}.000 --> 00:0{i}.400\n<v Mara>{q}</v>\n\n00:0{i}.500 --> 00:0{i}.900\n<v Ghost>{a}</v>\n'), 'Ghost'),
    'column.ass': ('[Events]\nFormat: Start, End, Name, Text\n' + each(lambda i, q, a: f'Dialogue: 0:00:0{i}.00,0:00:0{i}.40,Mara,{q}\nDialogue: 0:00:0{i}.50,0:00:0{i}.90,Ghost,{a}'), 'Ghost'),
    'examples.txt': (each(lambda i, q, a: f'<START>\n{{{{user}}}}: {q}\n{{{{char}}}}: {a}'), ''),
    'definition.txt': (each(lambda i, q, a: f'{{{{user}}}}: {q}\n{{{{char}}}}: {a}\nEND_OF_DIALOG'), ''),
    'stream.json': (json.dumps(dict(streamer=dict(name='ghost'), comments=[dict(content_offset_seconds=i, commenter=dict(display_name=w), message=dict(body=t, fragments=[]))
                                    for i, pair in enumerate(PAIRS) for w, t in zip(('Mara', 'Ghost'), pair)])), 'Ghost'),
    'matrix.json': (json.dumps(dict(room_name='Tea', messages=[dict(type='m.room.message', sender=f'@{w}:tea.org', content=dict(msgtype='m.text', body=t))
                                    for pair in PAIRS for w, t in zip(('mara', 'ghost'), pair)])), 'ghost'),
    'season.json': (json.dumps(dict(episodes=[dict(scenes=[dict(utterances=[dict(speakers=[w], transcript=t) for w, t in zip(('Mara', 'Ghost'), pair)]) for pair in PAIRS])])), 'Ghost'),
    'sessions.json': (json.dumps({f'Session-{i}': dict(scene=['A shop.'], dialogue=[f'Mara: {q}', f'Ghost: {a}']) for i, (q, a) in enumerate(PAIRS)}), 'Ghost'),
    'chunks.json': (json.dumps([dict(CHUNK='Tea.', TURNS=[dict(NAMES=[w], UTTERANCES=[t]) for w, t in zip(('MARA', 'GHOST'), pair)]) for pair in PAIRS]), 'GHOST'),
    'services.json': (json.dumps([dict(turns=[dict(speaker='USER', utterance=q), dict(speaker='SYSTEM', utterance=a)] + [dict(speaker='USER', utterance='Bye'), dict(speaker='SYSTEM', utterance=' ')])
                                  for q, a in PAIRS]), ''),
    'live.json': (json.dumps([dict(author=dict(id='x', name=w), message=t) for pair in PAIRS for w, t in zip(('Mara', 'Ghost'), pair)]), 'Ghost'),
    'told.json': (json.dumps([dict(bot_name='Ghost', bot_info='Keeps tea.', history=said(q, a)[0] + said(q, a)[1]) for q, a in PAIRS]), ''),
    'daily.txt': (each(lambda i, q, a: f'{q} __eou__ {a} __eou__'), ''),
    'qq.txt': ('消息记录（此消息记录为文本格式）\n\n' + '='*20 + '\n消息对象:幽灵\n' + '='*20 + '\n\n' + each(lambda i, q, a: f'{days(i)} 10:01:00 玛拉(123)\n{q}\n\n{days(i)} 10:02:00 幽灵(456)\n{a}\n'), '幽灵'),
    'imessage.txt': (each(lambda i, q, a: f'May 1{i}, 2024  5:29:42 PM (Read by them after 1 minute)\nMe\n{q}\n\nMay 1{i}, 2024  5:30:42 PM\nGhost\n{a}\n'), 'Ghost'),
    'signal blocks.txt': (each(lambda i, q, a: '\n\n'.join(f'From: {w} (+4912345)\nType: incoming\nSent: {days(i)} 10:0{k}:00\nReceived: {days(i)} 10:0{k}:01\n\n{t}'
                                                           for k, (w, t) in enumerate((('Mara', q), ('Ghost', a)))) + '\n'), 'Ghost'),
    'titles.txt': (each(lambda i, q, a: f'Mrs. Mara: {q}\nDr. Ghost: {a}\n'), 'Dr. Ghost'),
    'game.csv': ('Key,Speaker,English,Chinese\n' + each(lambda i, q, a: f'a{i},Mara,"{q}",\nb{i},Ghost,"{a}",'), 'Ghost'),
    'topics.csv': ('QUEST,TOPIC,PROMPT,RESPONSE TEXT\n' + each(lambda i, q, a: f'Q{i},T,"{q}","{a}"'), ''),
    'empathetic.csv': ('conv_id,utterance_idx,context,prompt,speaker_idx,utterance\n' + each(lambda i, q, a: f'c{i},1,calm,I had tea,7,{q}\nc{i},2,calm,I had tea,9,{a.replace(",", "_comma_")}'), '9'),
    'a talk in a cell.csv': ('user 1 personas,user 2 personas,Best Generated Conversation\n' + each(lambda i, q, a: f'Dusts.,Haunts.,"User 1: {q}\nUser 2: {a}"'), 'User 2'),
    'kaggle lines.csv': ('Speaker,Dialogue\n' + each(lambda i, q, a: f'MARA,"{q}"\nGHOST,"{a}"'), 'GHOST'),
    'counsel.csv': ('Context,Response\n' + each(lambda i, q, a: f'"{q}","{a}"'), ''),
    'player.csv': ('Player,NPC\n' + each(lambda i, q, a: f'"{q}","{a}"'), ''),
    'columns in Chinese.csv': ('角色,问题,回答\n' + each(lambda i, q, a: f'幽灵,"{q}","{a}"'), ''),
    'lines in Chinese.csv': ('角色,台词\n' + each(lambda i, q, a: f'玛拉,"{q}"\n幽灵,"{a}"'), '幽灵'),
    'pairs.json': (json.dumps(PAIRS), ''),
    'arrays.jsonl': ('\n'.join(map(json.dumps, PAIRS)), ''),
    'by turns.json': (json.dumps([t for pair in PAIRS for t in pair]), ''),
    'behind each other.json': ('\n'.join(json.dumps(dict(user=q, reply=a), indent=2) for q, a in PAIRS), ''),
    'intents.json': (json.dumps(dict(intents=[dict(tag=str(i), patterns=[q], responses=[a]) for i, (q, a) in enumerate(PAIRS)])), ''),
    'drawn.md': ('| User | Bot |\n| --- | :-: |\n' + each(lambda i, q, a: f'| {q} | {a} |'), ''),
    'you.json': (json.dumps(dict(char_name='Ghost', char_persona='Keeps tea.', char_greeting='Boo.', example_dialogue=each(lambda i, q, a: f'You: {q}\nGhost: {a}'))), ''),
    'says.txt': (each(lambda i, q, a: f'Mara asks: {q}\nGhost says: {a}'), 'Ghost'),
    'arrows.txt': (each(lambda i, q, a: f'Mara -> Ghost: {q}\nGhost -> Mara: {a}'), 'Ghost'),
    'round.txt': (each(lambda i, q, a: f'(Mara) {q}\n(Ghost) {a}'), 'Ghost'),
    'bars.txt': (each(lambda i, q, a: f'Mara | {q}\nGhost | {a}'), 'Ghost'),
    'acted.jsonl': (objects(lambda q, a: dict(prompt='I want you to act like Ghost.\n\nThe interactions are as follows:\n\n',
                                              output=f'Mara (speaking): {q}<|eot|>\nGhost (thinking): Hm.<|eot|>\nGhost (speaking): {a}<|eot|>\n')), ''),
    'talk.yarn': ('title: Tea\ntags:\n---\n<<fade 1>>\n' + each(lambda i, q, a: f'Mara: {q} #line:0{i}\nGhost: {a}') + '\n-> Leave\n    <<jump End>>\n===\n', 'Ghost'),
    'talk.ink': ('VAR cold = true\n=== tea ===\n' + each(lambda i, q, a: f'MARA: {q}\nGHOST: {a}') + '\n* [Leave] -> END\n', 'Ghost'),
    'numbered.txt': ('1 your persona: i keep tea.\n' + each(lambda i, q, a: f'{i+2} {q}\t{a}\t\tno .|{a}'), ''),
    'metharme.jsonl': (objects(lambda q, a: dict(prompt=f'<|system|>You keep tea.<|user|>{q}<|model|>', generation=a)), ''),
    'utterances.json': (json.dumps([dict(conversation_id=str(i), utterances=[dict(speaker='USER', text=q), dict(speaker='ASSISTANT', text=a)]) for i, (q, a) in enumerate(PAIRS)]), ''),
    'movie_lines.txt': ('\n'.join(reversed([f'L{10*i+k} +++$+++ u{k} +++$+++ m0 +++$+++ {w} +++$+++ {t}' for i, pair in enumerate(PAIRS) for k, (w, t) in enumerate(zip(('MARA', 'GHOST'), pair))])), 'GHOST'),
    'rows.xlsx': (workbook(notes=[['made in May']], rows=[[], ['User', 'Reply', 'Mood', None], *([q, a, 3] for q, a in PAIRS)]), ''),
    'messages.xlsx': (workbook(chat=[['Speaker', 'Text'], *([w, t] for pair in PAIRS for w, t in zip(('Mara', 'Ghost'), pair))]), 'Ghost'),
    'old.rpy': ('init:\n    $ m = Character("Mara")\n    $ g = Character("Ghost")\nlabel start:\n' + each(lambda i, q, a: f'    m "{q}"\n    g "{a}"'), 'Ghost'),
}


def write(folder, name, content):
    path = folder/name
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))
    return path


@pytest.mark.parametrize('name', SIX)
def test_six_replies(tmp_path, name):
    content, who = SIX[name]
    got = read_rows(write(tmp_path, name, content), character=who)
    assert [r['reply'] for r in got.rows] == REPLIES, (got, got.rejects[:3])
    assert [r['user'] for r in got.rows] == LINES
    assert not any('As an AI' in r['reply'] for r in got.rows)


REFUSED = {
    'novel.txt': ('“Is it lit?” asked the visitor.\n\nThe keeper turned. “Lit,” he said.\n\n“Do you sleep?” she asked.\n', 'looks like a novel'),
    'roman.txt': ('„Ist er verhext?“, fragte sie.\n\nDer Geist nickte. „Nur donnerstags“, sagte er.\n\n„Und die Löffel?“\n', 'looks like a novel'),
    '小说.txt': ('　　客人道：“灯亮了吗？”\n　　老人笑道：“亮了。”\n　　客人又问：“你睡觉吗？”\n　　老人答道：“不。”\n', 'looks like a novel'),
    'nobody.srt': ('1\n00:00:01,000 --> 00:00:02,000\n- Is it lit?\n- It is.\n', 'not who says them'),
    'lore.json': ('{"entries": {"0": {"key": ["lamp"], "content": "Oil."}}}', 'lorebook'),
    'headless.csv': (each(lambda i, q, a: f'"{q}","{a}"'), 'columns={user: 1, reply: 2}'),
    'western.csv': ('question,answer\nLit?,"It’s lit – how naïve"\n'.encode('cp1252'), 'naïve'),
    'shift.csv': ('question,answer\n霧は,北東が一番濃いのです。\n'.encode('cp932'), 'encoding=cp932'),
    'header.csv': ('question,answer\n', 'a header only'),
    'instructions alone.json': (json.dumps([dict(messages=[dict(role='system', content='A ghost.'), dict(role='system', content='Be kind.'), dict(role='user', content='Lit?')])]), 'not answered'),
    'no responses.json': (json.dumps(dict(intents=[dict(patterns=['Lit?'], responses=[])])), 'damaged'),
    'who.txt': ('Mara: Hi\nGhost: Boo\nMara: Oh\nGhost: Boo', 'Say character=NAME. Speakers: Mara (2), Ghost (2)'),
    'play.xml': ('<PLAY><SPEECH><SPEAKER>GHOST</SPEAKER></SPEECH></PLAY>', 'in a .txt file'),
    'odd.jsonl': ('{"prompt": "Hi", "mood": 3}\n', 'it lacks completion'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_with_a_remedy(tmp_path, name):
    content, says = REFUSED[name]
    with pytest.raises(DataError) as e: read_rows(write(tmp_path, name, content))
    assert says in str(e.value), str(e.value)


def test_a_folder_is_read_as_its_zip(tmp_path):
    "A character's folder of chats, as front ends keep it, whatever else lies there; the run begins anew where a chat is added."
    chats = tmp_path/'Ghost'; (chats/'old').mkdir(parents=True)
    for k, (q, a) in enumerate(PAIRS): write(chats/'old' if k < 2 else chats, f'{k}.jsonl', '\n'.join(json.dumps(dict(name=w, is_user=w == 'Mara', mes=t)) for w, t in (('Mara', q), ('Ghost', a))))
    write(chats, 'face.jpg', 'x'); write(chats, '.notes.txt', 'x')
    got = read_rows(chats, character='Ghost')
    assert sorted(r['reply'] for r in got.rows) == sorted(REPLIES) and sorted(r['user'] for r in got.rows) == sorted(LINES)
    before = step_keys(plan({}, [f'data={chats}'], ['01_data'])); write(chats, '_chat.txt', 'Mara: Hm?\nGhost: Boo.')
    assert step_keys(plan({}, [f'data={chats}'], ['01_data'])) != before and len(read_rows(chats, character='Ghost').rows) == 7 # as WhatsApp calls it


def test_headless_by_numbers(tmp_path):
    path = write(tmp_path, 'headless.csv', REFUSED['headless.csv'][0])
    assert [r['reply'] for r in read_rows(path, columns={'user': 1, 'reply': 2}).rows] == REPLIES


def test_what_was_rejected_is_kept_beside_and_never_learned(tmp_path):
    pairs = [dict(prompt=f'{q} {i}', chosen=f'{a} Number {i} of all that I have to say.', rejected=f'As an AI, {i}') for i in range(9) for q, a in PAIRS]
    path = write(tmp_path, 'dpo.json', json.dumps(pairs))
    done = prepare(DataConfig(data=str(path), out=str(tmp_path/'run'), character='Ghost'))
    kept = [json.loads(l) for l in (tmp_path/'run/data/pairs.jsonl').read_text().splitlines()]
    assert len(kept) == len(done['train']) and all(r['rejected'].startswith('As an AI') for r in kept)
    assert not any('As an AI' in r['reply'] for p in ('train', 'valid', 'test') for r in done[p])


def test_leftovers(tmp_path):
    rows = [('Lit?', '<think>\nShe is cold.\n</think>\n\nIt is.'), ('And?', '{{char}} nods at {{user}}.'), ('Look', 'There: ![lamp](l.png)'), ('So?', 'Rum &amp; soup'), ('Who?', 'I am {{nobody}}.')]
    path = write(tmp_path, 'left.jsonl', '\n'.join(json.dumps(dict(character='Keeper', user=q, reply=a)) for q, a in rows))
    done = labelled(read_rows(path), DataConfig(data=str(path)))
    assert [r['reply'] for r in done['rows']] == ['It is.', 'Keeper nods at User.', 'There:', 'Rum & soup']
    assert 'a placeholder that nothing fills' in done['rejects'][0].reason
    assert done['report']['changed']['thoughts of a model'] == done['report']['changed']['placeholders'] == 1


def test_masked(tmp_path):
    path = write(tmp_path, 'p.csv', 'user,reply,lang\n"Number?","+44 7700 900123, or mara@example.com",en\n"Again?","+44 7700 900123. Ask Mara Lind.",en\n')
    names = write(tmp_path, 'names.txt', 'Mara Lind = Anna\n')
    rows = labelled(read_rows(path), DataConfig(data=str(path), mask=True, names=str(names)))['rows']
    assert [r['reply'] for r in rows] == ['555-0101, or mail1@example.org', '555-0101. Ask Anna.']


def changed(o, rng):
    "JSON with something taken out, put in, or of another type."
    def walk(o, path=()):
        yield path
        for k, v in (o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()): yield from walk(v, path + (k,))
    values = [None, True, 0, -1, 3.5, '', 'x', [], {}, ['a'], [[1]], {'a': 1}, '\ud83d', '\0', [None], 10**30]
    for _ in range(rng.randint(1, 3)):
        at, *path = rng.choice([*walk(o)][1:] or [()])[::-1] or (None,)
        if at is None: return o
        inner = o
        for k in path[::-1]: inner = inner[k]
        if rng.random() < .5: inner[at] = rng.choice(values)
        else: del inner[at]
    return o


def mutated(name, content, rng):
    b = content if isinstance(content, bytes) else content.encode('utf-8')
    how = rng.randrange(5)
    if how == 0 and name.endswith(('.json', '.jsonl')) and 'behind' not in name:
        lines = [b.decode()] if name.endswith('.json') else b.decode().split('\n')
        k = rng.choice([i for i, l in enumerate(lines) if l])
        lines[k] = json.dumps(changed(json.loads(lines[k]), rng))
        return '\n'.join(lines).encode()
    a = rng.randrange(len(b))
    if how == 1: return b[:a] + b[a+rng.randint(1, 40):]
    if how == 2: return b[:a]
    if how == 3: return bytes(c if rng.random() > .01 else rng.randrange(256) for c in b)
    try: return b.decode().encode(rng.choice(['utf-16', 'utf-16-le', 'cp1252', 'gb18030', 'shift_jis', 'utf-32', 'utf-7']), 'replace')
    except UnicodeDecodeError: return b[::-1]


@pytest.mark.parametrize('part', range(10))
def test_no_traceback_of_a_thousand_damaged_files(tmp_path, part):
    "Keys dropped, types changed, bytes cut, encodings swapped: rows, or a sentence."
    every, outcomes = {**SIX, **{n: (c, '') for n, (c, _) in REFUSED.items()}}, set()
    for k in range(100):
        rng = random.Random(1000*part + k)
        name = rng.choice(list(every))
        path = write(tmp_path, name, mutated(name, every[name][0], rng))
        try:
            got = read_rows(path, character=rng.choice([every[name][1], '', 'Ghost']), columns=rng.choice([{}, {}, {}, {'user': 1, 'reply': 2}]))
            clean_rows(got.rows)
            outcomes.add('rows')
        except DataError as e:
            assert len(str(e)) < 3000, (name, k)
            outcomes.add('refused')
    assert outcomes == {'rows', 'refused'}


def test_cards_that_are_odd_but_readable():
    card = card_of(dict(spec='chara_card_v2', data=dict(name=7, description=['Keeps', 'tea.'], alternate_greetings='Boo.', tags='tea, dust', extensions='x',
                                                        character_book=dict(entries={'0': dict(key='lamp', content='Oil.', order='10')}))))
    assert (card.data['name'], card.greetings(), card.data['tags'], len(card.odd)) == ('7', ['Boo.'], ['tea', 'dust'], 6)
    assert [e.text for e in card.woken(['The lamp?'])] == ['Oil.']


def test_the_field_where_it_is():
    "Files written by somebody else, where a developer has them beside the project."
    field = ROOT.parent/'shared'/'field'
    if not field.is_dir(): pytest.skip('those files are not here')
    who = dict.fromkeys(('discord_dce.json', 'tavern_group.jsonl', 'messenger.json', 'turns.csv', 'sub_named.srt', 'sub_named_renamed.txt', 'sub.ass', 'sub.vtt',
                         'scene.fountain', 'play_shakespeare.txt', 'play_gutenberg.txt'), 'Keeper') | {'wechat_weclone.csv': 'me_wxid', 'kakaotalk_pc.txt': '등대지기'}
    fewer = {'openai_weight0.jsonl': 2, 'kakaotalk_pc.txt': 4, 'wechat_weclone.csv': 6, 'characterglm.json': 6}
    refused = 'header_only.csv novel.txt novel_zh.txt lightnovel_ja.txt worldinfo.json README.md clients.md whatsapp_late_reply.txt'.split()
    wrong = {}
    for f in (f for f in field.iterdir() if f.is_file() and f.name not in refused):
        got = read_rows(f, 'cp1252' if f.name == 'cp1252.csv' else 'utf-8', who.get(f.name, ''), columns={'user': 1, 'reply': 2} if f.name == 'no_header.csv' else {})
        if len(got.rows) != fewer.get(f.name, 8): wrong[f.name] = got
    assert not wrong
    for f in (field/'cards').iterdir(): assert isinstance(read_rows(f), Reading), f
    for n in refused[:5]:
        with pytest.raises(DataError): read_rows(field/n)
