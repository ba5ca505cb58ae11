// What the page shows, and the link that brings it back. A branch is a line of token ids with a step for each.

export const FIELDS = {
  temperature: 1, seed: 0, dynatemp_range: 0, mirostat: 0,
  top_k: 0, top_p: 1, min_p: 0, typical_p: 1, top_n_sigma: 0, epsilon_cutoff: 0, xtc_probability: 0,
  repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0, dry_multiplier: 0, no_repeat_ngram_size: 0,
};

export const view = {
  offline: false, prompt: '', chat: false, count: 40, values: {}, extra: '', order: [],
  promptIds: [], judged: null, growth: null, texts: {}, members: [], active: [], warnings: [],
  branches: [], branch: 0, other: -1, at: -1, colour: 'model', now: null,
};

export const branch = () => view.branches[view.branch];
export const text = id => view.texts[id] ?? `${id} `;

// The sampling parameters as the engine takes them. FIELDS holds what the page starts with, not the engine's defaults.
export function params() {
  const found = { temperature: FIELDS.temperature, seed: FIELDS.seed, ...view.values };
  if (view.order.length) found.order = view.order;
  return view.extra.trim() ? { ...found, ...JSON.parse(view.extra) } : found;
}

export const shape = () => { try { return JSON.stringify(params()); } catch { return ''; } };

export function probability(step, stage = 0) {
  const at = stage < 0 ? step.stages.length + stage : stage;
  return step.stages[at].probabilities[step.candidates.indexOf(step.token)];
}

// Position of the first token in which two branches differ.
export function divergence(one, two) {
  let at = 0;
  while (at < Math.min(one.ids.length, two.ids.length) && one.ids[at] === two.ids[at]) at++;
  return at;
}

export function link() {
  const { prompt, chat, count, values, extra, order, branch: b, other, at, colour, offline } = view;
  const lines = offline ? [] : view.branches.map(({ ids, from, start, shape: s }) => ({ ids, from, start, shape: s }));
  const bytes = new TextEncoder().encode(JSON.stringify({ prompt, chat, count, values, extra, order, b, other, at, colour, lines }));
  return '#' + btoa(Array.from(bytes, x => String.fromCharCode(x)).join('')).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '');
}

export function unlink(hash) {
  try {
    const coded = hash.slice(1).replace(/-/g, '+').replace(/_/g, '/');
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(coded), c => c.charCodeAt(0))));
  } catch { return null; }
}
