// The one question that the page asks: see handloom.serve.inspector.
import { view } from './model.js';

export async function ask(body) {
  const headers = { 'Content-Type': 'application/json' }, key = sessionStorage.getItem('key');
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch('inspect', { method: 'POST', headers, body: JSON.stringify(body) });
  const found = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(found.error.message), { status: answer.status });
  Object.assign(view.texts, found.texts);
  return found;
}

export const prompted = () => view.chat ? { messages: [{ role: 'user', content: view.prompt }] } : { prompt: view.prompt };
