// What happens when: generating, changing a parameter, branching, comparing, restoring a link.
import { branch, FIELDS, link, params, shape, text, unlink, view } from './model.js';
import { ask, follow, prompted } from './server.js';
import { element, select, showBranches, showText, visible } from './tokens.js';
import { showStep, showTip } from './step.js';
import { showGrowth, showTree } from './tree.js';
import { COPIES, fillFields, showFields, showOrder } from './controls.js';

const by = id => document.getElementById(id);
let turn = 0, timer = 0;

function say(message, wrong = false) {
  by('status').textContent = message;
  by('status').classList.toggle('wrong', wrong);
}

// One request at a time changes the view; an answer that another request has overtaken is dropped.
async function working(what, action) {
  const mine = ++turn;
  say(what);
  try {
    await action(() => mine === turn);
    if (mine === turn) say('');
  } catch (error) {
    if (mine !== turn) return;
    say(error.message, true);
    by('key-field').hidden = error.status !== 401 && by('key-field').hidden;
  }
}

function learn(found) {
  if (found.prompt_logprobs) view.judged = found.prompt_logprobs;
  Object.assign(view, { promptIds: found.prompt_ids, members: found.members, active: found.active, warnings: found.warnings });
}

const lineOf = (found, name, from, start, before = []) =>
  ({ ids: found.output_ids, steps: [...before, ...found.steps], finish: found.finish, name, from, start, shape: shape() });

function show() {
  showBranches();
  showText();
  showTree(visit);
  showOrder(changed);
  showStep(pick, apply);
  keep();
}

function keep() {
  history.replaceState(null, '', link());
}

function generate() {
  view.prompt = by('prompt').value;
  return working('generating …', async current => {
    const found = await ask({ ...prompted(), params: params(), steps: view.count, prompt_logprobs: true });
    if (!current()) return;
    learn(found);
    Object.assign(view, { branches: [lineOf(found, 'text', null, 0)], branch: 0, other: -1, at: 0, now: null, growth: null });
    show();
  });
}

// More tokens behind a prefix of the current branch: in it, or as a branch of its own.
function grow(prefix, count, what, further = {}) {
  const line = branch(), fresh = what !== null;
  return working('generating …', async current => {
    const first = Math.min(prefix.length, fresh ? view.at : line.ids.length);
    const asked = { prompt_ids: view.promptIds, output_ids: prefix, first, steps: count, params: params(), ...further };
    view.growth = further.strategy ? { name: `${what.replace(/^\d+: /, '')}, pass by pass`, passes: [], results: [], shown: null } : null;
    const found = await (further.strategy ? follow(asked, pass => current() && watched(pass)) : ask(asked));
    if (!current() || !found) return;
    if (view.growth) {
      view.growth.results = found.results;
      for (const result of found.results) Object.assign(view.texts, result.texts);
    }
    learn(found);
    view.now = null;
    const grown = lineOf(found, fresh ? what : line.name, fresh ? view.branch : line.from, fresh ? first : line.start, line.steps.slice(0, first));
    if (fresh) {
      view.other = view.branch;
      view.branch = view.branches.push(grown) - 1;
    } else {
      view.branches[view.branch] = grown;
      view.at = grown.ids.length - 1;
    }
    show();
  });
}

// One pass more of a strategy; several that come in one frame are drawn once.
let drawing = false;
function watched(pass) {
  view.growth.passes.push(pass);
  by('tree').hidden = false;
  if (!drawing) {
    drawing = true;
    requestAnimationFrame(() => { drawing = false; if (view.growth) showTree(visit); });
  }
  return true;
}

// A token of the tree of branches.
function visit({ number, at }) {
  Object.assign(view, { branch: number, at, now: null });
  show();
}

const more = count => branch() ? grow(branch().ids, count, null) : generate();
const pick = id => view.offline || grow([...branch().ids.slice(0, view.at), id], view.count, `${view.at}: ${visible(text(id))}`);
const apply = () => grow(branch().ids.slice(0, view.at), view.count, `${view.at}: other settings`);

// What a strategy would say from the selected token on, beside what is there.
async function decode() {
  const given = by('strategy').value.trim();
  if (!given) { say('name a strategy, such as beam_search', true); return; }
  if (!branch()) await generate();
  if (!branch()) return;
  try {
    const strategy = given.startsWith('{') ? JSON.parse(given) : given;
    grow(branch().ids.slice(0, view.at), view.count, `${view.at}: ${strategy.name ?? strategy}`, { strategy });
  } catch (error) { say(error.message, true); }
}

// A parameter or the order has changed: the same step, with the same noise, as it would be now.
function changed() {
  keep();
  clearTimeout(timer);
  timer = setTimeout(() => {
    if (!branch()?.ids.length) return;
    working('', async current => {
      const found = await ask({ prompt_ids: view.promptIds, output_ids: branch().ids.slice(0, view.at), steps: 1, params: params() });
      if (!current()) return;
      learn(found);
      view.now = shape() === branch().shape ? null : found.steps[0];
      showOrder(changed);
      showStep(pick, apply);
    });
  }, 120);
}

function go(at) {
  if (!branch() || at < 0 || at >= branch().ids.length) return;
  view.at = at;
  view.now = null;
  select(at);
  if (!view.growth) showTree(visit);
  showStep(pick, apply);
  keep();
  if (!view.offline && shape() !== branch().shape) changed();
}

async function restore(saved) {
  for (const name of ['prompt', 'chat', 'count', 'values', 'extra', 'order', 'colour']) view[name] = saved[name] ?? view[name];
  fill();
  if (!saved.lines?.length) return;
  await working('restoring …', async () => {
    const lines = [];
    for (const { ids, from, start, shape: s } of saved.lines) {
      const asked = lines.length ? { prompt_ids: view.promptIds } : prompted();
      const found = await ask({ ...asked, output_ids: ids, first: 0, steps: 0, params: JSON.parse(s), prompt_logprobs: !lines.length });
      learn(found);
      const name = from === null ? 'text' : `${start}: ${visible(text(ids[start]))}`;
      lines.push({ ...lineOf(found, name, from, start), shape: s });
    }
    Object.assign(view, { branches: lines, branch: saved.b, other: saved.other, at: saved.at, now: null });
    show();
    if (shape() !== branch().shape) changed();
  });
}

function fill() {
  by('prompt').value = view.prompt;
  by('chat').checked = view.chat;
  by('count').value = view.count;
  by('colour').value = view.colour;
  fillFields();
}

function listen() {
  by('generate').onclick = generate;
  by('step').onclick = () => more(1);
  by('decode').onclick = decode;
  by('more').onclick = () => more(view.count);
  by('prompt').onkeydown = event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) generate(); };
  by('chat').onchange = () => { view.chat = by('chat').checked; };
  by('count').onchange = () => { view.count = Math.max(1, Number(by('count').value) || 1); };
  by('key').onchange = () => sessionStorage.setItem('key', by('key').value);
  by('reset').onclick = () => { view.order = []; changed(); };
  by('branch').onchange = () => { view.branch = Number(by('branch').value); view.now = null; view.at = Math.min(view.at, branch().ids.length - 1); show(); };
  by('other').onchange = () => { view.other = Number(by('other').value); show(); };
  by('colour').onchange = () => { view.colour = by('colour').value; show(); };
  by('line').onclick = event => {
    const box = by('line').getBoundingClientRect();
    go(Math.round((event.clientX - box.left) / box.width * (branch().ids.length - 1)));
  };
  by('text').onclick = event => { const mark = event.target.closest('b'); if (mark) go(Number(mark.dataset.at)); };
  by('pass').oninput = () => { view.growth.shown = Number(by('pass').value); showGrowth(); };
  by('tree-close').onclick = () => { view.growth = null; showTree(visit); };
  for (const place of [by('text'), by('beside')]) {
    place.onpointerover = event => { const mark = event.target.closest('b, i'); if (mark) showTip(mark); else by('tip').hidden = true; };
    place.onpointerleave = () => { by('tip').hidden = true; };
  }
  by('copies').onclick = async event => {
    const kind = event.target.dataset.copy;
    if (!kind) return;
    try { await navigator.clipboard.writeText(COPIES[kind]()); say('copied'); } catch (error) { say(`not copied: ${error.message}`, true); }
  };
  by('theme').onclick = () => paint(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark');
  document.addEventListener('keydown', event => {
    if (event.key === 'Escape') by('tip').hidden = true;
    if (event.target.matches('input, textarea, select') || event.ctrlKey || event.metaKey || event.altKey) return;
    const by1 = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by1) { go(view.at + by1); event.preventDefault(); }
    if (event.key === 'g' && !view.offline) generate();
    if (event.key === 's' && !view.offline) more(1);
  });
}

function paint(theme) {
  document.documentElement.dataset.theme = theme;
}

function open(data) {
  view.offline = true;
  for (const name of ['ask', 'settings']) by(name).hidden = true;
  document.querySelector('main').classList.add('offline');
  Object.assign(view, { promptIds: data.prompt, judged: data.prompt_logprobs, texts: data.texts, at: data.steps.length ? 0 : -1 });
  view.branches = [{ ids: data.steps.map(s => s.token), steps: data.steps, finish: data.finish, name: 'text', from: null, start: 0, shape: shape() }];
  const saved = unlink(location.hash);
  if (saved) Object.assign(view, { at: Math.min(saved.at, data.steps.length - 1), colour: saved.colour ?? 'model' });
  by('colour').value = view.colour;
  show();
}

paint(matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
showFields(changed);
listen();
const data = JSON.parse(by('data').textContent);
if (data) open(data);
else {
  const saved = unlink(location.hash);
  if (saved) await restore(saved); else fill();
  if (!branch()) show();
}
