const DATA = JSON.parse(document.getElementById('data').textContent)
const el = (tag, text = '', kind = '') => { const e = document.createElement(tag); e.textContent = text; e.className = kind; return e }
const ORDER = ['base', 'prompt', 'lora', 'both', 'stranger', 'author, cut', 'another hand', 'author']
const SHOWN = { stranger: "told somebody else's persona", 'author, cut': 'the author, as briefly' }

function replyCard(o) { // a line, and what was said to it
  const card = el('article', '', 'card'), sides = el('div', '', 'sides')
  const head = el('h3', o.line + ' '); head.append(el('small', `${o.who}, ${o.lang}`))
  for (const c of ORDER.filter(c => o.said[c])) {
    const side = el('div'); side.append(el('b', SHOWN[c] || c))
    for (const [text, taken, ended, drawn] of o.said[c]) {
      const p = el('p', (text || '(nothing)') + (ended ? '' : ' …'))
      if (taken) p.append(el('span', ' ✓', 'yes'))
      if (o.said[c].length > 1 && !c.startsWith('author')) p.append(el('small', drawn ? '  (sampled)' : '  (greedy)'))
      side.append(p)
    }
    sides.append(side)
  }
  card.append(head, sides); return card
}

function questionCard(q) { // a question, and who took which choice
  const card = el('article', '', 'card'), list = el('ol')
  const head = el('h3', q.line + ' '); head.append(el('small', `${q.track}, ${q.who}, ${q.lang}`)); card.append(head)
  if (q.reply) card.append(el('p', q.reply))
  q.choices.forEach((n, i) => {
    const li = el('li', '', i === q.answer ? 'right' : '')
    for (const [c, took] of Object.entries(q.took)) if (took === i) li.append(el('span', c))
    li.append(DATA.texts[n]); list.append(li)
  })
  card.append(list); return card
}

const differ = q => new Set(Object.values(q.took)).size > 1
const WHICH = { all: () => true, 'they differ': differ, 'told is wrong': q => 'prompt' in q.took && q.took.prompt !== q.answer,
  'fine-tuning mends': q => q.took.prompt !== q.answer && q.took.both === q.answer,
  'fine-tuning spoils': q => q.took.prompt === q.answer && 'both' in q.took && q.took.both !== q.answer,
  'the rule is right, the model wrong': q => q.took.rule === q.answer && q.took.prompt !== q.answer }

function browse(id, items, card, each = 3) { // choose, look, go on
  const box = document.getElementById(id); if (!box) return
  const form = box.querySelector('form'), found = box.querySelector('.found'), [back, on] = box.querySelectorAll('.turn button')
  let at = 0, some = items
  for (const s of form.elements) {
    const values = s.name === 'which' ? Object.keys(WHICH) : ['all', ...new Set(items.map(o => o[s.name]))]
    for (const v of values) s.append(new Option(v, v))
  }
  const show = () => {
    found.replaceChildren(...some.slice(at, at + each).map(card))
    box.querySelector('.turn span').textContent = some.length ? `${at + 1} to ${Math.min(at + each, some.length)} of ${some.length}` : 'none'
    back.disabled = at === 0; on.disabled = at + each >= some.length
  }
  form.onchange = () => {
    at = 0
    some = items.filter(o => [...form.elements].every(s => s.name === 'which' ? WHICH[s.value](o) : s.value === 'all' || o[s.name] === s.value))
    show()
  }
  form.onsubmit = e => e.preventDefault()
  for (const b of [back, on]) b.onclick = () => { at = Math.max(0, at + each * b.dataset.by); show() }
  show()
}

browse('heard', DATA.heard, replyCard)
browse('asked', DATA.asked, questionCard)
