"""Speed of decoding: every side over a grid of batch and context, and over ragged requests.

Rows of `decode/speed` and `decode/ragged`: times in milliseconds, memory in bytes, shares of one. What cannot be
measured for a side or on a device is None.
"""

import functools
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.decode.counting import device_calls, operations, per_step
from benchmarks.decode.rivals import COMPILED, UNIFORM, BareLoop, caches, copies, side
from benchmarks.decode.sides import Request, Sampling, Side, Timeline
from benchmarks.support.bandwidth import read_bandwidth
from benchmarks.support.common import Progress, in_turn, median_ratio
from benchmarks.support.peak import Peak
from benchmarks.support.shapes import Sizes, refusal

STEPS = (9, 25)  # answer lengths between which calls are counted: one block of the pool apart
FAILURES = (
    RuntimeError,
    ValueError,
    NotImplementedError,
    ImportError,
    AttributeError,
    TypeError,
    AssertionError,
)

COLUMNS = {
    "case": "case",
    "side": "side",
    "ttft_ms": "first ms",
    "tpot_p50_ms": "token ms p50",
    "tpot_p99_ms": "p99",
    "tokens_per_s": "tokens/s",
    "ratio": "handloom x",
    "mbu": "of bandwidth",
    "peak_gib": "peak GiB",
    "launches_per_token": "launches",
    "syncs_per_token": "syncs",
    "operations_per_token": "ops outside",
    "skipped": "",
}


@dataclass(frozen=True)
class Subject:
    """What all sides of a run share.

    Args:
        name: of the model, for the rows.
        model: whose weights every side takes. sized: its sizes.
        sampling: how to draw; None is greedy.
        random_weights: whether nothing was trained.
    """

    name: str
    model: PreTrainedModel
    sized: Sizes
    sampling: Sampling | None = None
    random_weights: bool = True

    def about(self) -> dict:
        """What every row says."""
        return {
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "mode": "greedy" if self.sampling is None else "sampling",
        }

    def prompt(self, rng: random.Random, length: int) -> list[int]:
        """Token ids from 3 up, so none of the usual special tokens."""
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        return [rng.randrange(3, vocab) for _ in range(length)]


@dataclass(frozen=True)
class Case:
    """One cell of the grid: `batch` rows together, each with a prompt of `context` tokens and an answer of `new`.

    `requests`, if not 0, is the number of ragged requests that share the `batch` slots: prompts of a sixteenth of
    `context` to all of it, answers of an eighth of `new` to all of it.
    """

    batch: int
    context: int
    new: int
    requests: int = 0

    @property
    def name(self) -> str:
        """For people."""
        if self.requests:
            return f"{self.requests} ragged requests, {self.batch} slots, up to {self.context}+{self.new}"
        return f"batch {self.batch}, context {self.context}+{self.new}"

    def workload(self, subject: Subject, turn: int) -> list[Request]:
        """Its requests: the same lengths every round, other tokens, so that no side finds a prompt again."""
        lengths, rng = random.Random(0), random.Random(turn)
        sizes = [(self.context, self.new)] * self.batch
        if self.requests:
            low = max(1, self.context // 16), max(1, self.new // 8)
            sizes = [
                (lengths.randint(low[0], self.context), lengths.randint(low[1], self.new))
                for _ in range(self.requests)
            ]
        return [Request(subject.prompt(rng, prompt), answer) for prompt, answer in sizes]


def grid(batches: list[int], contexts: list[int], new: int, ragged: bool) -> list[Case]:
    """Every batch with every context; ragged cases have four requests for each slot and need two slots."""
    if ragged:
        return [Case(b, c, new, requests=4 * b) for c in contexts for b in batches if b > 1]
    return [Case(b, c, new) for c in contexts for b in batches]


def measure(
    subject: Subject, cases: list[Case], names: list[str], repeats: int, available: int, progress: Progress
) -> Iterator[list[dict]]:
    """The rows of each case, as soon as it is done.

    Args:
        names: sides, see `rivals.SIDES`. available: bytes for all of them, weights included.
    """
    prompt = subject.prompt(random.Random(0), 8)
    BareLoop(subject.model).timeline([Request(prompt, 2)])  # what libraries keep from their first call on
    for number, case in enumerate(cases, 1):
        where = f"[{number}/{len(cases)}] {subject.name}, {case.name}"
        about = {"benchmark": "decode/ragged" if case.requests else "decode/speed", "case": case.name}
        about |= subject.about() | {"batch": case.batch, "context": case.context, "new_tokens": case.new}
        sides = [name for name in names if not case.requests or name not in UNIFORM]
        left = available - copies(sides, subject.model.device) * subject.sized.weights
        reason = refusal(
            subject.name, subject.sized, case.batch, case.context + case.new, caches(sides), left
        )
        if reason:
            progress(where, f"skipped, {reason}")
            yield [about | {"side": name, "skipped": reason} for name in sides]
            continue
        yield [
            about | row for row in contest(subject, case, sides, repeats, functools.partial(progress, where))
        ]


def contest(
    subject: Subject, case: Case, names: list[str], repeats: int, say: Callable[[str], None]
) -> list[dict]:
    """One row for each side of one case."""
    bandwidth = read_bandwidth(subject.model.device)
    sides, rows = {}, {}
    for name in names:
        say(f"{name}, first run")
        rows[name] = {"side": name}
        try:
            sides[name], added = enter(subject, case, name)
        except FAILURES as error:
            rows[name]["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        rows[name]["peak_bytes"] = subject.sized.weights + added
        rows[name]["peak_gib"] = rows[name]["peak_bytes"] / 2**30

    def once(name: str, turn: int) -> Timeline:
        say(f"{name}, round {turn} of {repeats}" if turn else f"{name}, warm-up")
        return sides[name].timeline(case.workload(subject, turn), subject.sampling)

    found = in_turn({n: lambda turn, n=n: once(n, turn) for n in sides}, repeats)
    bandwidth = max(bandwidth, read_bandwidth(subject.model.device))
    for name, lines in found.items():
        say(f"{name}, calls")
        rows[name] |= {"repeats": repeats} | summary(lines)
        rows[name] |= share(rows[name]["tpot_p50_ms"], subject.sized, case, bandwidth)
        rows[name] |= calls(subject, case, sides[name])
        if name != "handloom" and "handloom" in found:
            rows[name]["ratio"] = median_ratio(rates(found["handloom"]), rates(lines))
    for each in sides.values():
        each.close()
    if set(sides) & set(COMPILED):
        torch.compiler.reset()  # or the next case is refused as one recompilation too many of the same code
    return list(rows.values())


def enter(subject: Subject, case: Case, name: str) -> tuple[Side, int]:
    """A side that has run once, and the bytes that it took on top of the weights."""
    with Peak(subject.model.device) as peak:
        made = side(name, subject.model, case.batch, case.context + case.new)
        made.timeline(case.workload(subject, -1), subject.sampling)
    return made, peak.added


def rates(lines: list[Timeline]) -> list[float]:
    """Tokens per second of each run, prompts included."""
    return [sum(map(len, line.tokens)) / line.total for line in lines]


def summary(lines: list[Timeline]) -> dict[str, float | None]:
    """What people ask of timelines.

    Returns:
        `ttft_ms` median time to a request's first token, `tpot_p50_ms` and `tpot_p99_ms` of the times between a
        request's tokens, over all requests and runs (None where every answer is one token), `tokens_per_s` median
        over the runs, prompts included, with `min` and `max`.
    """
    requests = [moments for line in lines for moments in line.tokens]
    gaps = np.concatenate([np.diff(moments) for moments in requests])
    middle, late = np.percentile(gaps, (50, 99)) if len(gaps) else (None, None)
    speeds = rates(lines)
    return {
        "ttft_ms": 1e3 * statistics.median(moments[0] for moments in requests),
        "tpot_p50_ms": None if middle is None else 1e3 * float(middle),
        "tpot_p99_ms": None if late is None else 1e3 * float(late),
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
    }


def share(tpot_ms: float | None, sized: Sizes, case: Case, bandwidth: float) -> dict[str, float | None]:
    """Which share of the read bandwidth a step uses: the bytes it has to read, over its time and the bandwidth.

    The context is that of the middle of the answer. Ragged rows have no single one, so no share.
    """
    read = None if case.requests else sized.read(case.batch, case.context + case.new / 2)
    known = read is not None and tpot_ms
    return {
        "read_bytes": read,
        "bandwidth_bytes_per_s": bandwidth,
        "mbu": read / (tpot_ms / 1e3) / bandwidth if known else None,
    }


def calls(subject: Subject, case: Case, made: Side) -> dict[str, float | None]:
    """What one more step costs: launches, syncs and waits on CUDA; tensor operations outside the forward on a CPU."""

    def run(steps: int) -> None:
        rng = random.Random(steps)
        made.answer([Request(subject.prompt(rng, 8), steps) for _ in range(case.batch)], subject.sampling)

    names = ("launches_per_token", "syncs_per_token", "waits_per_token", "operations_per_token")
    found = dict.fromkeys(names)
    if on_cuda(subject.model):
        for steps in STEPS:
            run(steps)
        counted = per_step(lambda n: device_calls(lambda: run(n)), *STEPS)
        return found | {
            f"{kind}_per_token": counted.get(kind, 0.0) for kind in ("launches", "syncs", "waits")
        }
    if made.counts_operations:
        counted = per_step(lambda n: operations(made.model, lambda: run(n)), *STEPS)
        found["operations_per_token"] = sum(counted.values())
    return found


def on_cuda(model: PreTrainedModel) -> bool:
    """Whether there are launches to count."""
    return model.device.type == "cuda"
