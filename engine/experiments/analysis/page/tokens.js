// The text, a mark for each token, and the line of entropy over it.
import { branch, divergence, probability, text, view } from './model.js';

const SVG = document.getElementById('line').namespaceURI;
export const percent = p => p === 0 ? '0' : p >= .9995 ? '100%' : p < 1e-4 ? p.toExponential(1) : (100 * p).toPrecision(3) + '%';
export const visible = token => token.replace(/\n/g, '⏎').replace(/\t/g, '⇥').replace(/^ /, '␣') || '∅';

export function element(kind, name = '', content = '') {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (content) made.textContent = content;
  return made;
}

// Nothing where it was sure, amber to red the more it was surprised; entropy in blue.
function shade(mark, amount, hot, most = .5) {
  const s = Math.max(0, Math.min(1, amount));
  mark.style.background = s < .02 ? '' : hot ? `hsl(${Math.round(46 - 40 * s)} 90% 52% / ${(.08 + most * s).toFixed(2)})` : `hsl(214 90% 55% / ${(most * s).toFixed(2)})`;
}

const surprise = p => p > 0 ? -Math.log(p) / 7 : 1;
const amount = step => view.colour === 'entropy' ? step.stages[0].entropy / 6 : surprise(probability(step, view.colour === 'drawn' ? -1 : 0));

function write(place, line, from) {
  const parts = document.createDocumentFragment();
  view.promptIds.forEach((id, at) => {
    const mark = element('i', 'given', text(id)), p = view.judged?.[at];
    if (p != null && view.colour !== 'entropy') shade(mark, -p / 7, true, .2);
    mark.dataset.prompt = at;
    parts.append(mark);
  });
  line.ids.forEach((id, at) => {
    const mark = element('b', '', text(id) || '∅'), step = line.steps[at];
    mark.dataset.at = at;
    shade(mark, amount(step), view.colour !== 'entropy');
    if (from !== null && at >= from) mark.classList.add('apart');
    if (step.drawn !== null && step.drawn !== undefined) mark.classList.add('chosen');
    parts.append(mark);
  });
  place.replaceChildren(parts);
}

export function showText() {
  const mine = branch(), other = view.branches[view.other], places = [document.getElementById('text'), document.getElementById('beside')];
  const from = other && mine && other !== mine ? divergence(mine, other) : null;
  places[1].hidden = from === null;
  document.getElementById('view').hidden = !mine;
  if (!mine) return;
  document.getElementById('legend').className = view.colour;
  write(places[0], mine, from);
  if (from !== null) write(places[1], other, from);
  document.getElementById('apart').textContent = from === null ? (mine.finish ? `ended: ${mine.finish}` : '') : `the two are one text up to token ${from}`;
  showLine();
  select(view.at);
}

function showLine() {
  const line = document.getElementById('line'), steps = branch().steps, most = Math.max(1e-9, ...steps.map(s => s.stages[0].entropy));
  line.replaceChildren();
  document.getElementById('chart').hidden = steps.length < 2;
  if (steps.length < 2) return;
  document.getElementById('most').textContent = `top ${most.toFixed(2)}`;
  line.setAttribute('viewBox', `0 0 ${steps.length - 1} 1`);
  for (const [stage, name] of [[0, 'model'], [-1, 'left']]) {
    const path = document.createElementNS(SVG, 'polyline');
    path.setAttribute('class', name);
    path.setAttribute('points', steps.map((s, at) => `${at},${(1 - .95 * s.stages.at(stage).entropy / most).toFixed(4)}`).join(' '));
    line.append(path);
  }
}

// Mark one token in the text and on the line.
export function select(at) {
  for (const old of document.querySelectorAll('.tokens b.at')) old.classList.remove('at');
  const mark = document.querySelector(`#text b[data-at="${at}"]`), line = document.getElementById('line');
  mark?.classList.add('at');
  mark?.scrollIntoView({ block: 'nearest' });
  line.querySelector('line')?.remove();
  if (mark && line.firstChild) {
    const here = document.createElementNS(SVG, 'line');
    for (const [name, value] of [['x1', at], ['x2', at], ['y1', 0], ['y2', 1]]) here.setAttribute(name, value);
    line.append(here);
  }
}

export function showBranches() {
  for (const name of ['branch', 'other']) {
    const list = document.getElementById(name), none = name === 'other' ? [new Option('none', -1)] : [];
    const depth = line => line.from === null ? 0 : 1 + depth(view.branches[line.from]);
    list.replaceChildren(...none, ...view.branches.map((line, number) => new Option('\u00a0\u00a0'.repeat(depth(line)) + line.name, number)));
    list.value = name === 'other' ? view.other : view.branch;
  }
}
