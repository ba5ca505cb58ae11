"""Traces: every step's distribution before and after each member of the pipeline, and who removed what."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine import Engine
from ...errors import HandloomError, ParameterError
from ...loop.generation import Generation
from ...strategies.kit.decode import Now, decode

RAW = "model"  # name of the distribution before the first member


@dataclass(frozen=True)
class Stage:
    """The distribution at one place of the pipeline.

    Args:
        name: of the member that left it; "model" before the first. kept: tokens that are possible.
        removed: probability, before this member, of the tokens that it excluded. entropy: in nats.
        probabilities: of the step's `candidates`, in their order.
    """

    name: str
    kept: int
    removed: float
    entropy: float
    probabilities: Sequence[float]


@dataclass(frozen=True)
class Step:
    """One step of a sample.

    Args:
        token: that was drawn. greedy: the model's most probable token. killed_by: the member that excluded it, or None.
        candidates: ids of the model's most probable tokens, and the drawn one. stages: before and after each member.
    """

    token: int
    greedy: int
    killed_by: str | None
    candidates: Sequence[int]
    stages: Sequence[Stage]


@dataclass(frozen=True)
class Trace:
    """The steps of one sample, and texts of the tokens in them.

    Args:
        generation: as `Engine.generate` gives it. steps: one a token. texts: id -> text.
    """

    generation: Generation
    steps: Sequence[Step]
    texts: Mapping[int, str]

    def __str__(self) -> str:
        lines = [f"{'token':>16}  {'kept':>7}  {'entropy':>7}  removed by each member; greedy token"]
        for step in self.steps:
            last = step.stages[-1]
            removed = (
                ", ".join(f"{s.name} {s.removed:.1%}" for s in step.stages if s.removed > 0) or "nothing"
            )
            greedy = "drawn" if step.token == step.greedy else repr(self.text(step.greedy))
            killed = f", killed by {step.killed_by}" if step.killed_by else ""
            shown = repr(self.text(step.token))[-16:]
            lines.append(f"{shown:>16}  {last.kept:>7}  {last.entropy:>7.3f}  {removed}; {greedy}{killed}")
        return "\n".join(lines)

    def text(self, token: int) -> str:
        """Text of a token; its id where there is no tokenizer."""
        return self.texts.get(token, str(token))

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays: `tokens`, `greedy` [T]; `candidates` [T, C]; `kept`, `removed`, `entropy` [T, S];
        `probabilities` [T, S, C]; `stages` [S]. NaN (-1 where whole numbers) where a step did not run a member."""
        names = list(dict.fromkeys(stage.name for step in self.steps for stage in step.stages))
        steps, width = len(self.steps), max((len(step.candidates) for step in self.steps), default=0)
        found = {name: np.full((steps, len(names)), np.nan) for name in ("removed", "entropy")}
        found |= {"kept": np.full((steps, len(names)), -1), "candidates": np.full((steps, width), -1)}
        found |= {"probabilities": np.full((steps, len(names), width), np.nan), "stages": np.array(names)}
        found |= {
            name: np.array([getattr(s, n) for s in self.steps])
            for name, n in (("tokens", "token"), ("greedy", "greedy"))
        }
        for t, step in enumerate(self.steps):
            found["candidates"][t, : len(step.candidates)] = step.candidates
            for stage in step.stages:
                s = names.index(stage.name)
                for name in ("kept", "removed", "entropy"):
                    found[name][t, s] = getattr(stage, name)
                found["probabilities"][t, s, : len(stage.probabilities)] = stage.probabilities
        return found

    def data(self) -> dict[str, Any]:
        """Everything in JSON's types, as the inspector's page reads it."""
        texts = {str(i): text for i, text in self.texts.items()}
        return {
            "prompt": self.generation.prompt_token_ids,
            "finish": self.generation.finish_reason,
            "seed": self.generation.seed,
            "texts": texts,
            "steps": [asdict(step) for step in self.steps],
        }

    def save(self, path: str | Path) -> None:
        """Write .npz (arrays) or .html (a page that opens offline).

        Raises:
            ParameterError: another ending.
        """
        path = Path(path)
        if path.suffix == ".npz":
            np.savez_compressed(path, **self.arrays())
        elif path.suffix == ".html":
            path.write_text(page(self), encoding="utf-8")
        else:
            raise ParameterError(f"{path}: a trace is written as .npz or .html")


def trace(
    engine: Engine, prompt: Any, params: Any = None, *, candidates: int = 12, **overrides: Any
) -> Trace:
    """Draw one sample and keep every step's distribution at every place of the pipeline.

    Costs one forward pass a token, as `Engine.generate`, and per member a softmax over the vocabulary; the tokens are
    those of `Engine.generate`.

    Args:
        prompt, params, overrides: as for `Engine.generate`, one prompt with n=1.
        candidates: most probable tokens of the model that are followed through the pipeline, at least 1.

    Raises:
        HandloomError: the sample ended in error. PromptError, ParameterError: before anything is computed.
    """
    if candidates < 1:
        raise ParameterError(f"candidates={candidates} must be at least 1")
    seen: list[tuple[list[tuple[str, Tensor]], Tensor]] = []

    def watch(now: Now) -> None:
        left = [(RAW, now.raw[0].clone())]
        left += [
            (rule.name, logits[0].clone()) for rule, logits in now.requests.rows.stages(now.raw, now.context)
        ]
        seen.append((left, now.raw[0].topk(min(candidates, now.raw.shape[1])).indices))

    results = decode(engine, [prompt], params, step=watch, **overrides)
    if len(results) != 1:
        raise ParameterError(f"trace follows one sample; these parameters ask for {len(results)}")
    (generation,) = results
    if generation.error is not None:
        raise HandloomError(generation.error)
    steps = [_step(token, *at) for token, at in zip(generation.token_ids, seen, strict=False)]
    ids = {token for step in steps for token in step.candidates}
    texts = {} if engine.tokenizer is None else {i: engine.decode([i]) for i in sorted(ids)}
    return Trace(generation, steps, texts)


def _step(token: int, left: list[tuple[str, Tensor]], best: Tensor) -> Step:
    """A step from logits [V] at every place and the ids of the model's best tokens."""
    ids = [*best.tolist(), *([token] if token not in best else [])]
    stages, killed, before = [], None, None
    for name, logits in left:
        logp = logits.log_softmax(-1)
        possible, p = logits > -torch.inf, logp.exp()
        removed = 0.0 if before is None else float(before[~possible].sum())
        entropy = -float(torch.where(p > 0, p * logp, 0.0).sum())
        stages.append(Stage(name, int(possible.sum()), removed, entropy, p[ids].tolist()))
        if killed is None and not possible[best[0]]:
            killed = name
        before = p
    return Step(token, int(best[0]), killed, ids, stages)


def page(found: Trace) -> str:
    """A page of a trace: tokens coloured by probability; a click shows the candidates at every place."""
    steps = [
        {
            "text": found.text(s.token), "p": s.stages[-1].probabilities[s.candidates.index(s.token)],
            "raw": s.stages[0].probabilities[s.candidates.index(s.token)], "killed": s.killed_by,
            "names": [found.text(i) for i in s.candidates], "drawn": s.candidates.index(s.token),
            "stages": [[g.name, g.kept, g.removed, g.entropy, list(g.probabilities)] for g in s.stages],
        }
        for s in found.steps
    ]  # fmt: skip
    data = json.dumps(steps).replace("</", "<\\/")
    title = html.escape(found.generation._summary())
    return PAGE.replace("@TITLE@", title).replace("@DATA@", data)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>handloom trace</title>
<style>
body{font:15px system-ui;max-width:70em;margin:1.5em auto;padding:0 1em;background:#fff;color:#111}
#text{white-space:pre-wrap;font:16px/1.7 ui-monospace,monospace}
#text button{font:inherit;color:inherit;border:0;padding:0;cursor:pointer;white-space:pre-wrap;border-radius:2px}
#text button[aria-pressed=true]{outline:2px solid #06c}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .6em;border-bottom:1px solid #8884;text-align:right}
th:first-child,td:first-child{text-align:left;white-space:pre}.gone{opacity:.35}.drawn{font-weight:700}
svg{width:100%;height:70px}#steps{overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#161616;color:#eee}}
</style>
<h1>Trace</h1><p>@TITLE@</p>
<svg id="line" role="img" aria-label="entropy of the model over the text" preserveAspectRatio="none"></svg>
<div id="text"></div><div id="steps" aria-live="polite"></div>
<script>
const steps=@DATA@,text=document.getElementById('text'),out=document.getElementById('steps');
const percent=p=>p==null?'':p===0?'-':(100*p).toPrecision(3)+'%';
function cell(row,kind,value,name){
  const c=document.createElement(kind);c.textContent=value;if(name)c.className=name;row.append(c)}
function show(i){
  text.querySelectorAll('button').forEach((b,j)=>b.setAttribute('aria-pressed',i===j));
  const s=steps[i],table=document.createElement('table'),head=table.insertRow();
  cell(head,'th','candidate');s.stages.forEach(g=>cell(head,'th',g[0]));
  s.names.forEach((name,c)=>{const row=table.insertRow();cell(row,'td',JSON.stringify(name),c===s.drawn?'drawn':'');
    s.stages.forEach(g=>cell(row,'td',percent(g[4][c]),g[4][c]===0?'gone':''))});
  [['kept',g=>g[1]],['removed',g=>percent(g[2])],['entropy',g=>g[3].toFixed(3)]].forEach(([name,f])=>{
    const row=table.insertRow();cell(row,'th',name);s.stages.forEach(g=>cell(row,'td',f(g)))});
  out.replaceChildren(table);
  if(s.killed){const p=document.createElement('p');out.append(p);
    p.textContent='the most probable token was excluded by '+s.killed}
}
steps.forEach((s,i)=>{const b=document.createElement('button');b.textContent=s.text;b.type='button';
  b.style.background=`hsl(${Math.round(120*s.raw)} 80% 50% / .35)`;
  b.title=percent(s.raw)+' (model), '+percent(s.p)+' (as drawn)';
  b.onclick=()=>show(i);text.append(b)});
document.onkeydown=e=>{
  const all=[...text.children],at=all.findIndex(b=>b.getAttribute('aria-pressed')==='true');
  const to=at+(e.key==='ArrowRight')-(e.key==='ArrowLeft');if(to!==at&&all[to]){show(to);all[to].focus()}};
const line=document.getElementById('line'),n=Math.max(steps.length-1,1);
const most=Math.max(...steps.map(s=>s.stages[0][3]),1e-9);
line.setAttribute('viewBox',`0 0 ${n} 1`);
line.innerHTML='<polyline fill="none" stroke="#06c" vector-effect="non-scaling-stroke" points="'+
  steps.map((s,i)=>i+','+(1-.95*s.stages[0][3]/most)).join(' ')+'"/>';
if(steps.length)show(0);
</script></html>
"""
