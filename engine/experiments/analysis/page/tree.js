// A tree of tokens: the branches of the text, or what a strategy keeps, tries and gives up, pass by pass.
import { branch, text, view } from './model.js';
import { element, percent, visible } from './tokens.js';

const part = id => document.getElementById(id);

// Nodes {id, parent, token, p, kind, note, title}; node 0 is the prefix. A run without forks stands in one line.
function twigs(nodes, onPick) {
  const below = new Map();
  for (const node of nodes) below.set(node.parent, [...(below.get(node.parent) ?? []), node]);
  const list = parent => {
    const made = element('ul');
    for (const first of below.get(parent) ?? []) {
      const item = element('li'), run = element('span', 'run');
      let node = first;
      for (;;) {
        const mark = element(onPick ? 'button' : 'b', node.kind, visible(text(node.token)));
        mark.title = [node.p == null ? '' : percent(node.p), node.title ?? node.kind].filter(Boolean).join(', ');
        const here = node;
        if (onPick) { mark.type = 'button'; mark.onclick = () => onPick(here); }
        run.append(mark);
        if (node.note) run.append(element('small', '', node.note));
        const next = below.get(node.id) ?? [];
        if (next.length !== 1) break;
        node = next[0];
      }
      item.append(run);
      if (below.has(node.id)) item.append(list(node.id));
      made.append(item);
    }
    return made;
  };
  return list(0);
}

// The branches: one is shown, the others stand dimmed; a click goes there.
export function showTree(onGo) {
  part('tree').hidden = !(view.growth || view.branches.length > 1);
  part('pass-field').hidden = part('tree-close').hidden = !view.growth;
  if (part('tree').hidden) return;
  if (view.growth) { showGrowth(); return; }
  const nodes = [], known = new Map(), mine = branch();
  view.branches.forEach((line, number) => {
    let parent = 0;
    line.ids.forEach((token, at) => {
      const key = `${parent} ${token}`;
      if (!known.has(key)) {
        known.set(key, nodes.length + 1);
        nodes.push({ id: nodes.length + 1, parent, token, number, at, kind: 'dropped', title: line.name });
      }
      parent = known.get(key);
      if (line === mine) Object.assign(nodes[parent - 1], { kind: at === view.at ? 'final at' : 'final', number });
    });
  });
  part('tree-title').textContent = 'Branches';
  part('tree-note').textContent = '';
  part('twigs').replaceChildren(twigs(nodes, onGo));
}

const up = (nodes, id) => { const found = []; while (id) { found.push(id); id = nodes.get(id).parent; } return found; };

// The passes of a strategy up to one of them: what is alive, what is tried, what was given up.
export function grown(growth, upto) {
  const nodes = new Map(), kept = new Set(), proposed = new Set(), passes = growth.passes.slice(0, upto);
  const add = fresh => fresh.forEach(([id, parent, token, p]) => nodes.set(id, { id, parent, token, p, kind: 'rejected' }));
  let alive = new Set(), tried = new Set(), tips = new Map();
  for (const { kind, nodes: fresh, rows } of passes) {
    add(fresh);
    [alive, tried, tips] = [new Set(), new Set(), new Map()];
    for (const [base, tip] of rows) {
      const before = up(nodes, base);
      const fed = up(nodes, tip).slice(0, -before.length || undefined).reverse();
      const sure = kind === 'step' ? fed : fed.slice(0, 1); // the first token that is fed was drawn, what follows is a draft
      [...before, ...sure].forEach(id => { alive.add(id); kept.add(id); });
      fed.filter(id => !sure.includes(id)).forEach(id => { tried.add(id); proposed.add(id); });
      tips.set(tip, (tips.get(tip) ?? 0) + 1);
    }
  }
  const done = upto >= growth.passes.length ? growth.results : [];
  done.forEach(result => add(result.nodes));
  const results = done.map(result => up(nodes, result.last));
  results.flat().forEach(id => kept.add(id));
  for (const node of nodes.values()) {
    node.kind = results[0]?.includes(node.id) ? 'final' : results.some(r => r.includes(node.id)) ? 'kept'
      : done.length ? (kept.has(node.id) ? 'dropped' : 'rejected')
      : alive.has(node.id) ? 'kept' : tried.has(node.id) ? 'tried' : kept.has(node.id) ? 'dropped' : 'rejected';
    if (proposed.has(node.id) && (node.kind === 'final' || node.kind === 'kept')) node.kind += ' accepted';
    if (!done.length && tips.get(node.id) > 1) node.note = `×${tips.get(node.id)}`;
  }
  done.forEach(({ last, extra }) => {
    const told = ['weight', 'score'].filter(name => name in extra).map(name => `${name} ${extra[name].toPrecision(3)}`);
    if (last && told.length) nodes.get(last).note = [nodes.get(last).note, ...told].filter(Boolean).join(', ');
  });
  const judged = [...proposed].filter(id => done.length || !tried.has(id)), accepted = judged.filter(id => kept.has(id));
  return { nodes: [...nodes.values()], proposed: judged.length, accepted: accepted.length, rows: passes.at(-1)?.rows.length ?? 0 };
}

export function showGrowth() {
  const { growth } = view, slider = part('pass'), most = growth.passes.length;
  slider.max = most;
  slider.value = growth.shown ?? most;
  part('pass-number').textContent = `${slider.value} of ${most}`;
  const found = grown(growth, Number(slider.value));
  part('tree-title').textContent = growth.name;
  part('tree-note').textContent = found.proposed
    ? `${found.accepted} of ${found.proposed} drafted tokens accepted, ${found.proposed - found.accepted} rejected`
    : found.rows ? `${found.rows} rows in this pass; what is struck out was given up` : '';
  part('twigs').replaceChildren(twigs(found.nodes, null));
}
