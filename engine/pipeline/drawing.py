"""Drawing: one token a row from raw logits, through the pipeline of every row."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.sampling.draw import NONE_KEPT, draw
from ..kernels.sampling.sample import sample
from .edits import Edits
from .forms import Context
from .members import Plan

if TYPE_CHECKING:
    from .rows import Rows


@dataclasses.dataclass
class Drawn:
    """One drawn token a row.

    tokens: [B] int64. raw_logprobs: [B] float32, log_softmax of the logits as the model gave them, at the
    token.
    logprobs: [B] float32, the same after all processors (greedy rows: without temperature and truncation).
    processed: [B, V] float32, or None where it was never written. A row whose logits are NaN, or which has no
    token left, has NaN in a log-probability (and an arbitrary valid token).
    top: ids int64 and raw log-probabilities float32 [B, n] of the most probable tokens, or None.
    """

    tokens: Tensor
    raw_logprobs: Tensor
    logprobs: Tensor
    processed: Tensor | None
    top: tuple[Tensor, Tensor] | None = None


def draw_rows(rows: Rows, logits: Tensor, context: Context, n_top: int = 0) -> Drawn:
    """Process raw `logits` [B, V] float32 and draw one token a row; n_top: how many alternatives to tell.

    Edits, temperature and truncation rules at the end of the pipeline run inside `kernels.sample` together
    with the draw, with the tokens that `apply` and `kernels.draw` would give. On a CPU the edits are made in one
    copy of the logits instead, which is cheaper there, and where all rows are greedy nothing is drawn. Where a rule
    raises in there, the members run one by one, so that the rows of that rule fail alone.
    """
    try:
        return _fused(rows, logits, context, n_top)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        known = len(context.cache.get("failures", ()))
        if not context.forgiving:
            raise
        drawn = _apart(rows, logits, context, n_top)
        if len(context.cache.get("failures", ())) == known:
            raise  # no member's fault
        return drawn


def _apart(rows: Rows, logits: Tensor, context: Context, n_top: int) -> Drawn:
    """Every member by its own `apply`, the draw behind them."""
    rows.forget_plan()
    processed = rows.apply(logits, context)
    tokens = draw(processed, context.seeds, context.positions, context.streams, rows.greedy_rows()).clamp(
        min=0
    )
    raw, top = told(logits, tokens, n_top)
    return Drawn(tokens, raw, told(processed, tokens)[0], processed, top)


def _fused(rows: Rows, logits: Tensor, context: Context, n_top: int) -> Drawn:
    """What runs in the sampler in the sampler, the rest before it."""
    plan, kernels = rows.plan(), implementation(logits.device)
    if kernels == "torch":
        processed, edits = rows.run([*plan.unfused, *plan.edits], logits, context), None
        if all(rows.greedy):
            return _best(rows, plan, logits, processed, context, n_top)
    else:
        processed = rows.run(plan.unfused, logits, context)
        edits = rows.edits(processed, context)
    rules = [rows.rule(rule, context) if isinstance(rule, int) else rule for rule in plan.rules]
    seen = kernels != "torch" and processed is logits  # whether the sampler sees what the model gave
    drawn = sample(
        processed,
        seeds=context.seeds,
        positions=context.positions,
        streams=context.streams,
        temperature=plan.temperature,
        adaptive=plan.adaptive,
        rules=tuple(rules),
        logprobs="chosen",
        n_top=n_top if seen else 0,
        kernels=kernels,
        **({} if edits is None else edits.arguments()),
    )
    _suspect(rows, plan, context, drawn.tokens)
    # what is below 0 marks a row without a drawable token; its log-probabilities are NaN
    tokens = drawn.tokens.clamp(min=0)
    _note(rows, plan, context, tokens, drawn.logprob, processed if edits is None else edits)
    raw, final, top = drawn.raw_logprob, drawn.logprob, (drawn.top_ids, drawn.top_logprobs)
    if raw is None or not seen:
        raw, top = told(logits, tokens, n_top)
    if kernels == "torch" and any(rows.greedy):
        # by the formula of a batch without sampling rows, to the last bit
        final = torch.where(rows.greedy_rows(), told(processed, tokens)[0], final)
    elif plan.plain and all(rows.greedy):
        final = raw
    elif plan.untouched is not None:
        final = torch.where(plan.untouched, raw, final)
    return Drawn(tokens, raw, final, None, top if n_top else None)


def _best(rows: Rows, plan: Plan, logits: Tensor, processed: Tensor, context: Context, n_top: int) -> Drawn:
    """The highest token of every row."""
    tokens = processed.argmax(-1)
    raw, top = told(logits, tokens, n_top)
    final = raw if processed is logits else told(processed, tokens)[0]
    _note(rows, plan, context, tokens, final, processed)
    return Drawn(tokens, raw, final, processed, top)


def _suspect(rows: Rows, plan: Plan, context: Context, tokens: Tensor) -> None:
    """Where the rules keep nothing of a row, say whose level or mass is no number."""
    suspects = [rows.members[i].processor for i in plan.foreign]
    names = " or ".join(f"{rule.name!r} gave NaN as its {rule.limit}" for rule in suspects)
    for i in plan.foreign:
        on = rows.view(rows.members[i], context).values.rows_on
        lost = tokens == NONE_KEPT
        lost = lost if on is None else lost & on[:, 0]
        context.cache.setdefault("suspects", []).append((f"processor {names}", lost))


def _note(
    rows: Rows, plan: Plan, context: Context, tokens: Tensor, logprobs: Tensor, edited: Tensor | Edits
) -> None:
    """Leave for `accept` of a fused rule with memory what probability any token had in what the rules left."""
    if not plan.remembering:
        return
    temperature = (
        plan.temperature if plan.temperature is None else plan.temperature.where(plan.temperature > 0, 1)
    )

    def at(ids: Tensor) -> Tensor:
        values = edited.at(ids) if isinstance(edited, Edits) else edited.gather(1, ids[:, None])[:, 0]
        return values if temperature is None else values / temperature

    def logprob(ids: Tensor) -> Tensor:
        return logprobs if ids is tokens else logprobs + (at(ids) - at(tokens))

    for i in plan.remembering:
        rows.view(rows.members[i], context).note(logprob)


def implementation(device: torch.device) -> str | None:
    """Which kernels `sample` is asked for: "torch" where Triton's cannot run, or only in its interpreter and nobody
    names it.
    """
    return "torch" if dispatch.select("sample", device) == "torch" else None


def logprob_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log_softmax(logits [B, V]) at tokens [B], [B] float32; NaN for rows of NaN or of -inf alone."""
    return told(logits, tokens)[0]


def told(logits: Tensor, tokens: Tensor, n_top: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Log-probabilities [B] of tokens [B] under logits [B, V], and ids and log-probabilities [B, n] of the highest."""
    shares = logits.log_softmax(-1)
    best = shares.topk(n_top) if n_top else None
    return shares.gather(-1, tokens[:, None])[:, 0], best and (best.indices, best.values)
