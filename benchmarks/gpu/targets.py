"""What the GPU check aims at, beside what its rows say."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

SMALL, LARGE = "Llama-3.2-1B", "Llama-3.1-8B"


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


def step(side: str, name: str = "tpot_p50_ms", **more):
    """The large model's greedy step at batch 1."""
    about = {"section": "large_steps", "model": LARGE, "mode": "greedy", "batch": 1, "side": side}
    return lambda rows: field(rows, name, **(about | more))


def faster(ours: str, theirs: str):
    """How much faster one side's step is than another's."""

    def measure(rows):
        mine, other = step(ours)(rows), step(theirs)(rows)
        return None if not mine or other is None else other / mine

    return measure


def best(rows, name: str, /, **wanted) -> float | None:
    """The largest value among all rows that agree."""
    found = [
        row[name]
        for row in rows
        if row.get(name) is not None and all(row.get(k) == v for k, v in wanted.items())
    ]
    return max(found, default=None)


def of_one_read(rows) -> float | None:
    """Sampling of 64 and 256 rows with all filters, over one read of the logits at full bandwidth: the worse."""
    about = {
        "benchmark": "kernels/sampling",
        "mode": "k+p+min-p",
        "side": "handloom",
        "cache": "cold",
        "rows": "typical",
    }
    shares = [field(rows, "bandwidth_share", batch=batch, **about) for batch in (64, 256)]
    return None if None in shares or not all(shares) else max(1 / share for share in shares)


def ragged(rows) -> float | None:
    """Ragged requests against `generate_batch`, tokens a second."""
    about = {"benchmark": "decode/ragged", "section": "many_rows"}
    return over(rows, "tokens_per_s", {"side": "handloom", **about}, {"side": "generate_batch", **about})


def flashinfer(rows, batches: tuple[int, ...]) -> float | None:
    """The smallest lead over FlashInfer."""
    about = {"benchmark": "kernels/sampling", "side": "flashinfer", "cache": "warm", "mode": "k+p+min-p"}
    found = [field(rows, "ratio", batch=batch, **about) for batch in batches]
    return None if None in found else min(found)


def quantised(rows, batch: int) -> float | None:
    """How much faster the step is with our product of 4-bit weights than with bitsandbytes'."""
    about = {"section": "four_bits", "batch": batch}
    return over(rows, "value", {"weights": "nf4", **about}, {"weights": "nf4-triton", **about})


FEW_ROWS = {"benchmark": "kernels/sampling", "mode": "k+p+min-p", "side": "handloom", "cache": "warm"}
TARGETS = [
    Target("8B, batch 1, compiled: share of the bandwidth", 0.85, step("handloom compile", "mbu")),
    Target("8B, batch 1: share of the bandwidth", 0.65, step("handloom", "mbu")),
    Target("8B, batch 1: x generate", 5.0, faster("handloom", "generate")),
    Target("8B, batch 1, compiled: x static + compile", 1.3, faster("handloom compile", "generate static+compile")),
    Target(
        "8B: everything switched on, share of the step", 0.02,
        lambda rows: field(rows, "value", figure=f"everything on, {LARGE}, batch 1"), at_least=False,
    ),
    Target(
        "1B: everything switched on, share of the step", 0.08,
        lambda rows: field(rows, "value", figure=f"everything on, {SMALL}, batch 1"), at_least=False,
    ),
    Target("64 ragged rows with replacement: x generate_batch", 1.5, ragged),
    Target("sampling, at most 8 rows, all filters: us", 12.0,
           lambda rows: best([r for r in rows if r.get("batch", 99) <= 8], "p50", **FEW_ROWS), at_least=False),
    Target("sampling, 64 and 256 rows, all filters: x one read", 2.5, of_one_read, at_least=False),
    Target("sampling, at most 8 rows: x FlashInfer", 3.0, lambda rows: flashinfer(rows, (1, 8))),
    Target("sampling, 256 rows: x FlashInfer", 1.0, lambda rows: flashinfer(rows, (256,))),
    Target("a seed for every row: x one seed for all", 0.98, lambda rows: field(
        rows, "ratio", benchmark="kernels/seeds", side="one seed")),
    *(
        Target(f"nf4, batch {batch}: our product x bitsandbytes'", 1.0, lambda rows, b=batch: quantised(rows, b))
        for batch in (1, 4, 16, 64)
    ),
]  # fmt: skip


def verdicts(rows: list[dict]) -> list[dict]:
    """One row a target."""
    return [target.verdict(rows) for target in TARGETS]
