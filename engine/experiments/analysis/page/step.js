// One step: its candidates before and after every member of the pipeline.
import { branch, text, view } from './model.js';
import { element, percent, visible } from './tokens.js';

// Who excluded a candidate: the first stage that leaves it nothing.
const remover = (step, c) => step.stages.find(stage => stage.probabilities[c] === 0);

export function table(step, most, stages, onPick) {
  const made = element('table'), head = made.createTHead().insertRow(), body = made.createTBody();
  head.append(element('th', '', 'candidate'), ...stages.map(s => element('th', '', s.name)));
  if (most > 6) head.append(element('th', '', 'removed by'));
  for (const cell of head.cells) cell.scope = 'col';
  step.candidates.slice(0, most).forEach((id, c) => {
    const row = body.insertRow(), name = element('th'), word = visible(text(id)), killer = remover(step, c);
    name.scope = 'row';
    if (id === (step.drawn ?? step.token)) row.className = 'drawn';
    if (onPick) {
      const pick = element('button', '', word);
      pick.type = 'button';
      pick.title = `id ${id}: branch from here`;
      pick.dataset.pick = id;
      pick.onclick = () => onPick(id);
      name.append(pick);
    } else {
      name.textContent = word;
      name.title = `id ${id}`;
    }
    row.append(name);
    for (const stage of stages) {
      const p = stage.probabilities[c], cell = element('td', p === 0 ? 'gone' : ''), shown = p === 0 ? '✕' : percent(p);
      if (p > 0) cell.style.backgroundSize = `${(100 * p).toFixed(1)}% 100%`;
      cell.append(shown);
      row.append(cell);
    }
    if (most > 6) row.append(element('td', 'gone', killer ? killer.name : ''));
  });
  return made;
}

function facts(made, step) {
  const foot = made.createTFoot();
  let left = 1;
  const mass = step.stages.map(stage => (left *= 1 - stage.removed));
  for (const [name, value] of [
    ['tokens kept', s => s.kept], ['removed here', s => s.removed ? percent(s.removed) : '0'],
    ['mass left', (s, i) => percent(mass[i])], ['entropy, nats', s => s.entropy.toFixed(3)],
  ]) {
    const row = foot.insertRow(), title = element('th', '', name);
    title.scope = 'row';
    row.append(title, ...step.stages.map((stage, i) => element('td', '', String(value(stage, i)))), element('td'));
  }
}

export function showStep(onPick, onApply) {
  const here = document.getElementById('here'), recorded = branch()?.steps[view.at], step = view.now ?? recorded;
  here.replaceChildren();
  here.hidden = !step;
  if (!step) return;
  const title = element('h2', '', `Token ${view.at}: ${visible(text(recorded.token))}`);
  here.append(title);
  if (view.now) {
    const drawn = view.now.drawn ?? view.now.token, same = drawn === recorded.token;
    const note = element('p', 'changed', same
      ? 'With these settings the same noise draws the same token.'
      : `With these settings the same noise draws ${visible(text(drawn))} instead of ${visible(text(recorded.token))}.`);
    const apply = element('button', '', 'Go on from here with these settings');
    apply.type = 'button';
    apply.id = 'apply';
    apply.onclick = onApply;
    here.append(note, apply);
  } else if (step.drawn !== null && step.drawn !== undefined) {
    here.append(element('p', '', `Chosen by hand; the noise draws ${visible(text(step.drawn))}.`));
  }
  if (step.killed_by) here.append(element('p', '', `The model's first choice, ${visible(text(step.greedy))}, was excluded by ${step.killed_by}.`));
  const made = table(step, step.candidates.length, step.stages, view.offline ? null : onPick);
  facts(made, step);
  const frame = element('div', 'frame');
  frame.tabIndex = 0;
  frame.role = 'group';
  frame.ariaLabel = 'Candidates before and after each member';
  frame.append(made);
  here.append(frame);
}

export function showTip(mark) {
  const tip = document.getElementById('tip');
  if (mark.dataset.prompt) {
    const at = Number(mark.dataset.prompt), p = view.judged?.[at];
    const said = p == null ? 'nothing before it' : `${percent(Math.exp(p))} by the model, ${(-p).toFixed(2)} nats`;
    tip.replaceChildren(element('div', '', `prompt token ${at}: ${visible(text(view.promptIds[at]))}`), element('div', '', said));
  } else judge(mark, tip);
  tip.hidden = false;
  const box = mark.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - size.width - 4))}px`;
  tip.style.top = `${box.bottom + size.height + 8 < innerHeight ? box.bottom + 4 : Math.max(4, box.top - size.height - 4)}px`;
}

// The best candidates before and after every member, and what each removed.
function judge(mark, tip) {
  const line = mark.closest('#beside') ? view.branches[view.other] : branch();
  const step = line.steps[mark.dataset.at], gone = step.stages.filter(s => s.removed > 0).map(s => `${s.name} removed ${percent(s.removed)}`);
  tip.replaceChildren(table(step, 5, step.stages, null));
  if (gone.length) tip.append(element('div', '', gone.join(', ')));
}
