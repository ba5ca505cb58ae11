"""Traces: every step's distribution before and after each member of the pipeline, and who removed what."""

from __future__ import annotations

import json
import re
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
from ...strategies.kit.decode import Now, decode, prompt_logprobs

RAW = "model"  # name of the distribution before the first member
PAGE = Path(__file__).parent / "page"  # the inspector's, which a server shows as it is
MODULES = (
    "model.js",
    "server.js",
    "tokens.js",
    "step.js",
    "tree.js",
    "controls.js",
    "main.js",
)  # each after those it imports
CLOSED = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"  # no request leaves
DIGITS = 5  # significant ones of a number on a page


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
        token: of the text. greedy: the model's most probable token. killed_by: the member that excluded it, or None.
        candidates: ids of the model's most probable tokens, and the drawn one. stages: before and after each member.
        drawn: what the noise takes here, where a token was chosen by hand; None where that is `token`.
    """

    token: int
    greedy: int
    killed_by: str | None
    candidates: Sequence[int]
    stages: Sequence[Stage]
    drawn: int | None = None


@dataclass(frozen=True)
class Trace:
    """The steps of one sample, and texts of the tokens in them.

    Args:
        generation: as `Engine.generate` gives it. steps: one a token. texts: id -> text.
        prompt_logprobs: of each prompt token after those before it.
    """

    generation: Generation
    steps: Sequence[Step]
    texts: Mapping[int, str]
    prompt_logprobs: Sequence[float | None] = ()

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

    def rows(self) -> list[dict[str, Any]]:
        """Everything as a table: for each step and stage a row with the stage's fields beside the step's."""
        steps = [(t, step, stage) for t, step in enumerate(self.steps) for stage in step.stages]
        return [
            {
                "step": t, "token": step.token, "text": self.text(step.token), "greedy": step.greedy,
                "killed_by": step.killed_by, "candidates": list(step.candidates), "stage": stage.name,
                "kept": stage.kept, "removed": stage.removed, "entropy": stage.entropy,
                "probabilities": list(stage.probabilities),
            }
            for t, step, stage in steps
        ]  # fmt: skip

    def data(self) -> dict[str, Any]:
        """Everything in JSON's types, as the inspector's page reads it."""
        texts = {str(i): text for i, text in self.texts.items()}
        return {
            "prompt": self.generation.prompt_token_ids,
            "finish": self.generation.finish_reason,
            "seed": self.generation.seed,
            "prompt_logprobs": rounded([*self.prompt_logprobs]),
            "texts": texts,
            "steps": [rounded(asdict(step)) for step in self.steps],
        }

    def save(self, path: str | Path) -> None:
        """Write .npz (`arrays`), .parquet (`rows`, by pyarrow) or .html (a page that opens offline).

        Raises:
            ParameterError: another ending.
        """
        path = Path(path)
        if path.suffix == ".npz":
            arrays: dict[str, Any] = self.arrays()
            np.savez_compressed(path, **arrays)
        elif path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.rows()), path)
        elif path.suffix == ".html":
            path.write_text(page(self), encoding="utf-8")
        else:
            raise ParameterError(f"{path}: a trace is written as .npz or .html, or as a table in .parquet")


def trace(
    engine: Engine, prompt: Any, params: Any = None, *, candidates: int = 12, **overrides: Any
) -> Trace:
    """Draw one sample and keep every step's distribution at every place of the pipeline.

    The tokens are those of `Engine.generate`, which runs no operation more where there is no trace. A trace takes two
    passes more (behind the last token, and the prompt's own log-probabilities), a second run of the pipeline, and a
    softmax over the vocabulary for each of its places. With 4 members on one CPU core that is 26 ms a token at 49,152
    tokens and 63 at 151,936 (`python -m benchmarks.cpu.experiments`). Memory holds one step's distributions.

    Args:
        prompt, params, overrides: as for `Engine.generate`, one prompt with n=1.
        candidates: most probable tokens of the model that are followed through the pipeline, at least 1.

    Raises:
        HandloomError: the sample ended in error. PromptError, ParameterError: before anything is computed.
    """
    if candidates < 1:
        raise ParameterError(f"candidates={candidates} must be at least 1")
    asked = engine.requests([prompt], params, **overrides)
    if len(asked) != 1:
        raise ParameterError(f"trace follows one sample; these parameters ask for {len(asked)}")
    steps: list[Step] = []

    def watch(now: Now) -> Tensor:
        stages = now.requests.rows.stages(now.raw, now.context)
        left = [(RAW, now.raw[0]), *((rule.name, logits[0]) for rule, logits in stages)]
        tokens = now.draw(left[-1][1][None])
        steps.append(followed(int(tokens[0]), left, candidates))
        return tokens

    (generation,) = decode(engine, [prompt], params, step=watch, **overrides)
    if generation.error is not None:
        raise HandloomError(generation.error)
    del steps[len(generation.token_ids) :]
    ids = {token for step in steps for token in step.candidates} | {
        i for i in generation.prompt_token_ids if i >= 0
    }
    texts = (
        {}
        if engine.tokenizer is None
        else {i: engine.decode([i], skip_special_tokens=False) for i in sorted(ids)}
    )
    return Trace(generation, steps, texts, prompt_logprobs(engine, asked[0].prompt))


def followed(
    token: int, left: Sequence[tuple[str, Tensor]], candidates: int, drawn: int | None = None
) -> Step:
    """A step from logits [V] at every place of the pipeline, the model's first."""
    best = left[0][1].topk(min(candidates, len(left[0][1]))).indices
    ids = list(dict.fromkeys([*best.tolist(), token, *([] if drawn is None else [drawn])]))
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
    return Step(token, int(best[0]), killed, ids, stages, None if drawn == token else drawn)


def page(found: Trace) -> str:
    """A page of a trace that needs no server: the inspector's, with its parts and the trace inside."""
    parts = {
        name: (PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "style.css", *MODULES)
    }
    script = "".join(re.sub(r"^import .*\n|^export (?=\w)", "", parts[name], flags=re.M) for name in MODULES)
    data = json.dumps(found.data(), ensure_ascii=False).replace("<", "\\u003c")
    whole = parts["index.html"]
    for mark, content in (
        ("<title>", f'<meta http-equiv="Content-Security-Policy" content="{CLOSED}">\n<title>'),
        ('<link rel="stylesheet" href="page/style.css">', f"<style>\n{parts['style.css']}</style>"),
        ('type="application/json" id="data">null<', f'type="application/json" id="data">{data}<'),
        (' src="page/main.js"></script>', f">\n{script}</script>"),
    ):
        before, found_mark, after = whole.partition(mark)
        assert found_mark, mark
        whole = before + content + after
    return whole


def rounded(value: Any) -> Any:
    """Floats with few digits, in nested containers."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
