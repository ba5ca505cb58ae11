"""What the GPU check aims at, beside what its rows say."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

SMALL, LARGE, PROMPT = "Llama-3.2-1B", "Llama-3.1-8B", 128


@dataclass(frozen=True)
class Target:
    """One aim.

    Args:
        text: what is measured. wanted: the figure. measure: rows -> figure, None where rows are missing.
        at_least: whether more is better.
    """

    text: str
    wanted: float
    measure: Callable[[list[dict]], float | None]
    at_least: bool = True

    def verdict(self, rows: list[dict]) -> dict:
        """A row: `met` is yes, no, or not measured."""
        measured = self.measure(rows)
        met = "not measured"
        if measured is not None:
            met = "yes" if (measured >= self.wanted if self.at_least else measured <= self.wanted) else "no"
        sign = ">=" if self.at_least else "<="
        return {"target": self.text, "wanted": f"{sign} {self.wanted:g}", "measured": measured, "met": met}


def field(rows: Iterable[dict], name: str, /, **wanted) -> float | None:
    """The field of the newest row that has it and agrees with all of `wanted`."""
    found = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    values = [row[name] for row in found if row.get(name) is not None]
    return values[-1] if values else None


def over(rows, name: str, above: dict, below: dict) -> float | None:
    """Ratio of a field of two rows."""
    one, other = field(rows, name, **above), field(rows, name, **below)
    return None if one is None or not other else one / other


def step(side: str, model: str, name: str = "mbu", **more):
    """A field of a model's greedy step at one row after a short prompt, whichever section measured it."""
    about = {
        "benchmark": "decode/speed",
        "model": model,
        "mode": "greedy",
        "batch": 1,
        "context": PROMPT,
        "side": side,
    }
    return lambda rows: field([r for r in rows if r.get("section") != "first_tokens"], name, **(about | more))


def faster(ours: str, theirs: str, model: str):
    """How much faster one side's step is than another's."""

    def measure(rows):
        mine, other = (step(side, model, "tpot_p50_ms")(rows) for side in (ours, theirs))
        return None if not mine or other is None else other / mine

    return measure


def figure(name: str):
    """The value of a figure."""
    return lambda rows: field(rows, "value", figure=name)


def ragged(name: str, side: str = "handloom"):
    """A field of the ragged requests."""
    return lambda rows: field(rows, name, benchmark="decode/ragged", model=SMALL, side=side)


def of_generate_batch(rows) -> float | None:
    """Ragged requests against `generate_batch`, tokens a second."""
    ours, theirs = (ragged("tokens_per_s", side)(rows) for side in ("handloom", "generate_batch"))
    return None if ours is None or not theirs else ours / theirs


def sampling(mode: str, kind: str, batch: int):
    """Microseconds of a sampling call."""
    about = {"benchmark": "kernels/sampling", "mode": mode, "rows": kind, "batch": batch, "side": "handloom"}
    return lambda rows: field(rows, "p50", cache="warm", **about)


def lead(side: str, batch: int, mode: str):
    """How much faster a sampling call is than another library's."""
    about = {"benchmark": "kernels/sampling", "side": side, "cache": "warm", "mode": mode, "batch": batch}
    return lambda rows: field(rows, "ratio", **about)


def few_bits(batch: int, side: str = "handloom"):
    """How much faster a product with our weights of few bits is than the dense one: the worse of the layers."""

    def measure(rows):
        layers: dict = {}  # ratios are to the side that was measured first
        for row in rows:
            if row.get("benchmark") == "kernels/nf4" and row.get("batch") == batch and "skipped" not in row:
                layers.setdefault(row.get("layer"), {"handloom": 1.0})[row.get("side")] = (
                    row.get("ratio") or 1.0
                )
        found = [of["dense"] / of[side] for of in layers.values() if "dense" in of and side in of]
        return min(found, default=None)

    return measure


def at_most(text: str, wanted: float, measure) -> Target:
    """An aim of which less is better."""
    return Target(text, wanted, measure, at_least=False)


SAMPLING = {  # microseconds of a call at 1, 8, 64 and 256 rows
    ("k+p+min-p", "typical"): (15, 15, 25, 60),
    ("k+p+min-p", "flat"): (15, 15, 25, 60),
    ("p", "typical"): (25, 30, 45, 110),
    ("p", "flat"): (40, 45, 80, 200),
    ("temperature", "typical"): (10, 12, 25, 60),
    ("everything", "typical"): (22, 25, 40, 95),
}
BATCHES = (1, 8, 64, 256)
TARGETS = [
    Target("8B, one row: share of the bandwidth", 0.68, step("handloom", LARGE)),
    Target("8B, one row, compiled: share of the bandwidth", 0.80, step("handloom compile", LARGE)),
    Target("1B, one row: share of the bandwidth", 0.45, step("handloom", SMALL)),
    Target("1B, one row, compiled: share of the bandwidth", 0.60, step("handloom compile", SMALL)),
    Target("8B, one row: x generate", 5.0, faster("handloom", "generate", LARGE)),
    Target(
        "8B, one row, compiled: x static + compile", 1.3, faster("handloom compile", "generate static+compile", LARGE)
    ),
    Target("8B, one row, compiled: x gpt-fast", 1.0, faster("handloom compile", "gpt-fast", LARGE)),
    Target("ragged requests, 1B: tokens/s", 8000, ragged("tokens_per_s")),
    Target("ragged requests, 1B: x generate_batch", 16, of_generate_batch),
    at_most("ragged requests, 1B: ms between tokens, p99", 30, ragged("tpot_p99_ms")),
    at_most(
        "8B, 128-token prompt: ms to the first token", 12,
        lambda rows: field(rows, "ttft_ms", section="first_tokens", model=LARGE, side="handloom"),
    ),
    at_most("8B: step of a State over the loop's", 1.15, figure(f"step of a State over the loop's, {LARGE}")),
    at_most(
        "8B, 32,768-token context: ms a token", 6.5,
        lambda rows: field(rows, "tpot_p50_ms", section="contexts", model=LARGE, context=32768, side="handloom"),
    ),
    at_most("8B: everything switched on, share of the step", 0.02, figure(f"everything on, {LARGE}, batch 1")),
    at_most("1B: everything switched on, share of the step", 0.06, figure(f"everything on, {SMALL}, batch 1")),
    *(
        at_most(f"sampling {mode}, {kind}, {batch} rows: us", wanted, sampling(mode, kind, batch))
        for (mode, kind), row in SAMPLING.items()
        for batch, wanted in zip(BATCHES, row, strict=True)
    ),
    *(
        Target(f"sampling {mode}, {batch} rows: x {side}", 1.0, lead(side, batch, mode))
        for side in ("flashinfer", "vllm")
        for mode in ("k+p+min-p", "p")
        for batch in BATCHES
    ),
    Target(
        "a seed for every row: x one seed for all", 0.98,
        lambda rows: field(rows, "ratio", benchmark="kernels/seeds", side="one seed"),
    ),
    *(
        Target(f"{name}, {batch} rows: x dense", wanted, few_bits(batch, side))
        for name, side in (("nf4", "handloom"), ("int8", "handloom int8"))
        for batch, wanted in ((1, 1.8), (4, 1.0), (16, 1.0))
    ),
]  # fmt: skip


def verdicts(rows: list[dict]) -> list[dict]:
    """One row a target."""
    return [target.verdict(rows) for target in TARGETS]
