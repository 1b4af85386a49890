// --- asking and listening
const $ = id => document.getElementById(id), make = (tag, cls, text) => Object.assign(document.createElement(tag), {className: cls || '', textContent: text || ''});
let cast = [], turns = [], talk = '', stopper = null, drawn = null; const heardOf = {}; // drawn lines: the one that is said, how many each character has had
const me = () => cast.find(c => c.id === $('who').value);
const headers = () => ({'Content-Type': 'application/json', ...(sessionStorage.key_ ? {Authorization: 'Bearer ' + sessionStorage.key_} : {})});
async function ask(path, body, signal) {
  const r = await fetch(path, body === undefined ? {headers: headers(), signal} : {method: 'POST', headers: headers(), body: JSON.stringify(body), signal});
  if (r.status === 401) { const k = prompt('This server asks for a key:'); if (k) { sessionStorage.key_ = k; return ask(path, body, signal) } }
  if (!r.ok) throw new Error(((await r.json().catch(() => ({}))).error || {}).message || 'The server answers ' + r.status + '.');
  return r;
}
async function stream(model, messages, onText, signal, more) {
  const r = await ask('/v1/chat/completions', {model, messages, stream: true, ...more}, signal);
  const reader = r.body.pipeThrough(new TextDecoderStream()).getReader(); let rest = '', text = '';
  for (;;) {
    const {value, done} = await reader.read(); if (done) return text;
    rest += value; const events = rest.split('\n\n'); rest = events.pop();
    for (const e of events) {
      if (!e.startsWith('data: ') || e === 'data: [DONE]') continue;
      const o = JSON.parse(e.slice(6)); if (o.error) throw new Error(o.error.message);
      const piece = o.choices.length && o.choices[0].delta.content; if (piece) { text += piece; onText(text); $('talk').scrollTop = 1e9 }
    }
  }
}

// --- drawing the talk
const messages = upto => turns.slice(0, upto).map(t => ({role: t.role, content: t.tries[t.at]}));
function button(text, label, act, pressed) {
  const b = make('button', '', text); b.type = 'button'; b.title = label; b.setAttribute('aria-label', label);
  if (pressed !== undefined) b.setAttribute('aria-pressed', pressed); b.onclick = act; return b;
}
function draw() {
  const box = $('talk'), at = document.activeElement, had = box.contains(at) && at.title; box.replaceChildren();
  turns.forEach((t, k) => {
    const d = make('div', 'turn ' + t.role), said = make('div', 'said', t.tries[t.at]); t.box = said;
    d.append(make('span', 'unseen', (t.role === 'user' ? 'You' : me().name) + ':'), said);
    if (t.role === 'assistant' && !stopper) {
      const acts = make('div', 'acts');
      if (t.tries.length > 1) acts.append(button('‹', 'the try before', () => { t.at = (t.at + t.tries.length - 1) % t.tries.length; keep() }), make('span', '', `${t.at + 1}/${t.tries.length}`),
                                          button('›', 'the next try', () => { t.at = (t.at + 1) % t.tries.length; keep() }));
      if (k === turns.length - 1 && k > 0 && turns[k-1].role === 'user') acts.append(button('↻', 'another try', () => again(k)));
      acts.append(button('good', 'good', () => { t.thumb = t.thumb === 1 ? 0 : 1; keep() }, t.thumb === 1), button('bad', 'bad', () => { t.thumb = t.thumb === -1 ? 0 : -1; keep() }, t.thumb === -1));
      d.append(acts);
    }
    box.append(d);
  });
  if (had) ([...box.querySelectorAll('button')].filter(b => b.title === had).pop() || $('line')).focus(); // where one was
  box.scrollTop = 1e9;
}

// --- a try that grows
async function keep() { draw(); if (turns.some(t => t.role === 'user')) await ask('/page/keep', {character: me().id, talk, turns: turns.map(({role, tries, at, thumb}) => ({role, tries, at, thumb: thumb || 0}))}).catch(wrong) }
function wrong(e) { if (e.name !== 'AbortError') $('wrong').textContent = e.message || String(e) }
function busy(on) { stopper = on ? new AbortController() : null; $('send').hidden = on; $('stop').hidden = !on; ['who', 'how', 'blind', 'one', 'two', 'fresh', 'next'].forEach(i => $(i).disabled = on) }
async function again(k) {
  const t = turns[k], before = t.tries.length; t.tries.push(''); t.at = before; t.thumb = 0; $('wrong').textContent = ''; busy(true); draw();
  try { await stream(me().id + '@' + $('how').value, messages(k), x => { t.tries[before] = x; t.box.textContent = x }, stopper.signal) } catch (e) { wrong(e) }
  if (!t.tries[before]) { t.tries.splice(before, 1); t.at = Math.max(0, before - 1); if (!t.tries.length) turns.splice(k, 1) }
  busy(false); keep(); heard(turns.length && turns[turns.length - 1].role === 'assistant' ? `${me().name}: ${turns[turns.length - 1].tries[turns[turns.length - 1].at]}` : '');
}
const heard = text => { $('heard').textContent = text }; // for those who listen: once, when it is whole

// --- two versions, blind
async function duel() {
  const box = make('div', 'duel'), sides = ['a', 'b'], shown = sides.map(() => make('div', 'turn', '')), said = ['', '']; busy(true); draw(); box.append(...shown); $('talk').append(box);
  try {
    const {id, replies} = await (await ask('/page/duel', {pair: [$('one').value, $('two').value], line: drawn ? drawn.id : ''}, stopper.signal)).json();
    const show = k => x => { said[k] = x; shown[k].textContent = x };
    await Promise.all(sides.map((s, k) => replies[k] ? show(k)(replies[k]) : stream(`${me().id}@${id}.${s}`, messages(turns.length), show(k), stopper.signal, drawn ? {seed: drawn.seed} : {})));
    busy(false); const acts = make('div', 'acts'); box.append(acts); heard(`The first: ${said[0]} The second: ${said[1]}`);
    const choose = async choice => {
      try {
        const told = await (await ask('/page/pick', {id, choice, character: me().id, replies: said, messages: messages(turns.length), listener: $('listener').value.trim(), line: drawn ? drawn.id : ''})).json(); drawn = null;
        $('tally').textContent = `That was ${told.chosen}. ${told.tally}`; turns.push({role: 'assistant', tries: [said[choice === 'b' ? 1 : 0]], at: 0}); keep();
      } catch (e) { wrong(e) }
    };
    acts.append(button('The first', 'the first is better', () => choose('a')), button('No difference', 'no difference', () => choose('tie')), button('The second', 'the second is better', () => choose('b')));
    $('talk').scrollTop = 1e9;
  } catch (e) { busy(false); draw(); wrong(e) }
}

// --- how it begins
function versions(c) {
  for (const i of ['how', 'one', 'two']) {
    const had = $(i).value; $(i).replaceChildren(...c.conditions.map(([v, t]) => new Option(t, v)));
    if (c.conditions.some(([v]) => v === had)) $(i).value = had; else if (i === 'two') $(i).selectedIndex = c.conditions.length - 1;
  }
  $('blind').disabled = c.conditions.length < 2;
}
function fresh() {
  const c = me(); drawn = null; versions(c); turns = c.greeting ? [{role: 'assistant', tries: [c.greeting], at: 0}] : []; talk = Array.from(crypto.getRandomValues(new Uint8Array(6)), x => x.toString(16).padStart(2, '0')).join('');
  $('picture').hidden = true; if (c.picture) ask(c.picture).then(r => r.blob()).then(b => { if (me() !== c) return; URL.revokeObjectURL($('picture').src); $('picture').src = URL.createObjectURL(b); $('picture').alt = c.name; $('picture').hidden = false }).catch(() => {});
  $('wrong').textContent = ''; draw(); heard(c.greeting ? `${c.name}: ${c.greeting}` : '');
}
async function nextLine() { // a talk of its own, so that everybody hears the same two replies
  if (stopper || document.querySelector('.duel')) return;
  try {
    const id = me().id, o = await (await ask('/page/line', {character: id, number: heardOf[id] || 0})).json();
    if (!o.text) { $('tally').textContent = heardOf[id] ? 'You have heard all the lines.' : 'There are no lines for this character.'; return }
    heardOf[id] = (heardOf[id] || 0) + 1; fresh(); turns = []; drawn = o; $('line').value = o.text; $('say').requestSubmit();
  } catch (e) { wrong(e) }
}
$('say').onsubmit = e => {
  e.preventDefault(); const text = $('line').value.trim(); if (!text || stopper || document.querySelector('.duel')) return;
  if (drawn && text !== drawn.text) drawn = null;
  $('line').value = ''; $('wrong').textContent = ''; turns.push({role: 'user', tries: [text], at: 0});
  if ($('blind').checked) return duel();
  turns.push({role: 'assistant', tries: [], at: 0}); again(turns.length - 1);
};
$('line').onkeydown = e => { if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) { e.preventDefault(); $('say').requestSubmit() } };
document.onkeydown = e => { if (e.key === 'Escape' && stopper) stopper.abort() };
$('stop').onclick = () => stopper && stopper.abort(); $('who').onchange = fresh; $('fresh').onclick = fresh; $('next').onclick = nextLine; $('blind').onchange = () => $('pair').hidden = !$('blind').checked;
ask('/page/who').then(r => r.json()).then(o => {
  cast = o.characters; cast.forEach(c => $('who').append(new Option(c.name, c.id)));
  fresh(); $('line').focus();
}).catch(wrong);
