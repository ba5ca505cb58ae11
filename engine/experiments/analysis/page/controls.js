// Parameters, the order of the pipeline, and what can be taken away: code, a command, a plan.
import { FIELDS, params, view } from './model.js';
import { element } from './tokens.js';

const FIRST = { temperature: 'draw', top_k: 'truncation', repetition_penalty: 'repetition' };

export function showFields(onChange) {
  const place = document.getElementById('fields');
  for (const [name, start] of Object.entries(FIELDS)) {
    if (name in FIRST) place.append(element('h3', '', FIRST[name]));
    const label = element('label', '', name), input = element('input');
    label.htmlFor = input.id = `field-${name}`;
    Object.assign(input, { type: 'number', step: 'any', placeholder: start });
    input.oninput = () => {
      if (input.value === '') delete view.values[name]; else view.values[name] = Number(input.value);
      input.classList.toggle('set', input.value !== '');
      onChange();
    };
    place.append(label, input);
  }
  const extra = document.getElementById('extra');
  extra.oninput = () => { view.extra = extra.value; onChange(); };
}

export function fillFields() {
  for (const name of Object.keys(FIELDS)) {
    const input = document.getElementById(`field-${name}`);
    input.value = view.values[name] ?? '';
    input.classList.toggle('set', input.value !== '');
  }
  document.getElementById('extra').value = view.extra;
}

// The members that act, in their order; a drag, or the buttons, put one elsewhere.
export function showOrder(onMove) {
  const list = document.getElementById('order');
  const move = (from, to) => {
    const names = [...view.active], [name] = names.splice(from, 1);
    names.splice(to, 0, name);
    view.order = names;
    view.active = names;
    onMove();
    showOrder(onMove);
    list.children[to]?.querySelector('button')?.focus();
  };
  list.replaceChildren(...view.active.map((name, at) => {
    const item = element('li'), buttons = [['↑', -1, 'earlier'], ['↓', 1, 'later']];
    item.draggable = true;
    item.append(element('span', '', name));
    for (const [sign, by, word] of buttons) {
      const button = element('button', '', sign);
      button.type = 'button';
      button.ariaLabel = `${name} ${word}`;
      button.disabled = at + by < 0 || at + by >= view.active.length;
      button.onclick = () => move(at, at + by);
      item.append(button);
    }
    item.ondragstart = event => event.dataTransfer.setData('text/plain', at);
    item.ondragover = event => { event.preventDefault(); item.classList.add('over'); };
    item.ondragleave = () => item.classList.remove('over');
    item.ondrop = event => { event.preventDefault(); move(Number(event.dataTransfer.getData('text/plain')), at); };
    return item;
  }));
  document.getElementById('reset').hidden = !view.order.length;
  document.getElementById('warnings').replaceChildren(...view.warnings.map(text => element('li', '', text)));
}

const python = value => JSON.stringify(value).replace(/\btrue\b/g, 'True').replace(/\bfalse\b/g, 'False').replace(/\bnull\b/g, 'None');
const quoted = text => `'${text.replace(/'/g, `'\\''`)}'`;

export const COPIES = {
  python() {
    const settings = Object.entries({ ...params(), max_new_tokens: view.count }).map(([n, v]) => `${n}=${python(v)}`).join(', ');
    const asked = view.chat ? 'engine.chat' : 'engine.generate';
    return `${asked}(${JSON.stringify(view.prompt)}, SamplingParams(${settings}))\n`;
  },
  shell() {
    const options = Object.entries({ ...params(), max_new_tokens: view.count }).map(([name, value]) =>
      `--${name.replace(/_/g, '-')} ${typeof value === 'object' ? quoted(JSON.stringify(value)) : value}`);
    return `handloom ${quoted(view.prompt)}${view.chat ? '' : ' --raw'} ${options.join(' ')}\n`;
  },
  plan() {
    const { seed, ...settings } = params();
    return `model: demo\nchat: ${view.chat}\nprompts: [${JSON.stringify(view.prompt)}]\nsettings:\n  inspected: ${JSON.stringify(settings)}\n`
      + `params: {max_new_tokens: ${view.count}}\nsamples: 4\nseed: ${seed}\n`;
  },
  link: () => location.href,
};
