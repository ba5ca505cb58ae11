// The one question that the page asks: see handloom.serve.inspector.
import { view } from './model.js';

async function post(body) {
  const headers = { 'Content-Type': 'application/json' }, key = sessionStorage.getItem('key');
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch('inspect', { method: 'POST', headers, body: JSON.stringify(body) });
}

function taken(found, status) {
  if (found.error) throw Object.assign(new Error(found.error.message), { status });
  Object.assign(view.texts, found.texts);
  return found;
}

export async function ask(body) {
  const answer = await post(body);
  return taken(await answer.json(), answer.status);
}

// The same question of a strategy, whose passes are told as they come; the answer is the last line.
export async function follow(body, onPass) {
  const answer = await post({ ...body, stream: true }), reader = answer.body.getReader(), decoder = new TextDecoder();
  let rest = '', found = null;
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (done ? decoder.decode() : decoder.decode(value, { stream: true }))).split('\n');
    rest = done ? '' : lines.pop();
    for (const line of lines.filter(Boolean)) {
      found = taken(JSON.parse(line), answer.status);
      if (found.pass && onPass(found) === false) { await reader.cancel(); return null; }
    }
    if (done) return found;
  }
}

export const prompted = () => view.chat ? { messages: [{ role: 'user', content: view.prompt }] } : { prompt: view.prompt };
