"""DeepConf (arXiv 2508.15260): votes count by their trace's confidence; unsure traces end early or do not vote."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode
from .self_consistency import elected

MEASURES = ("mean", "lowest", "bottom", "tail")


def deep_confidence(
    engine, prompts, params=None, *, answer: Callable[[Generation], Hashable], n=32, keep=0.1, measure="lowest",
    window=2048, k=20, warmup=None, **options,
) -> list[Generation]:  # fmt: skip
    """The majority's answer among the `keep` most confident of n traces, each vote weighed by its confidence.

    A token's confidence is -1/k sum of the log-probabilities of the model's k best tokens; a trace's is taken over
    sliding windows of tokens. A token costs one pass of as many rows as run.

    Args:
        prompts, params, options: as for `decode`, with temperature > 0.
        answer: of a finished trace; None abstains.
        n: traces a prompt. keep: share that votes, above 0 to 1; the paper's are 0.1 and 0.9.
        measure: "mean" of all tokens, "lowest" window, mean of the lowest tenth of windows ("bottom"), or the last
            window ("tail").
        window: tokens of a window. k: tokens that confidence looks at.
        warmup: of n, traces that run to their end first; then those that fall below the confidence which `keep` of
            them have are cancelled (the paper's online mode, 16). None: all run to their end.

    Returns:
        The most probable trace of the winning answer; `extra`: "answer", "votes", "confidence" of the trace.
    """
    if not 0 < keep <= 1 or measure not in MEASURES or window < 1 or k < 1:
        raise ParameterError(
            f"DeepConf takes keep in (0, 1], window, k >= 1 and a measure of {', '.join(MEASURES)}; got {keep}, "
            f"{window}, {k}, {measure!r}"
        )
    tokens: dict = {}

    def step(now):
        best = -now.logits.log_softmax(-1).topk(min(k, now.logits.shape[1])).values.mean(-1)
        for request, value in zip(now.live, best.tolist(), strict=True):
            tokens.setdefault((request.index, request.sample), []).append(value)
        return now.draw()

    running = decode(engine, prompts, params, step=step, n=n, stream=True, **options)
    traces: dict[int, list[Generation]] = {request.index: [] for request in running.asked}
    bars: dict[int, float] = {}
    for event in running:
        key, index = (event.request, event.sample), event.request
        if event.generation is not None:
            if event.finish != "cancelled":
                event.generation.extra["confidence"] = confidence(tokens[key], measure, window)
                traces[index].append(event.generation)
            if warmup and len(traces[index]) == warmup and index not in bars:
                ranked = sorted((t.extra["confidence"] for t in traces[index]), reverse=True)
                bars[index] = ranked[max(1, round(keep * warmup)) - 1]
        elif (
            index in bars and len(tokens[key]) >= window and sum(tokens[key][-window:]) / window < bars[index]
        ):
            running.cancel(*key)
    return [voted(group, answer, keep) for _, group in sorted(traces.items())]


def voted(traces: list[Generation], answer, keep: float) -> Generation:
    """The elected trace among the most confident ones."""
    ranked = sorted(traces, key=lambda trace: -trace.extra["confidence"])
    kept = ranked[: max(1, round(keep * len(ranked)))]
    return elected(kept, answer, weight=lambda trace: trace.extra["confidence"])


def confidence(values: list[float], measure: str, window: int) -> float:
    """A trace's confidence from that of its tokens."""
    if measure == "mean":
        return sum(values) / len(values)
    size = min(window, len(values))
    if measure == "tail":
        return sum(values[-size:]) / size
    windows = sorted(sum(values[i : i + size]) / size for i in range(len(values) - size + 1))
    count = max(1, len(windows) // 10) if measure == "bottom" else 1
    return sum(windows[:count]) / count
