"""What an experiment costs beside its model: a unit of a plan, and a step that is traced.

Run from the repository root: `python -m benchmarks.cpu.experiments [--units 10000]`. Rows of `cpu/plans`: processor
time a unit of a run whose samples cost nothing, fresh and where all are there, and the most memory that Python holds
meanwhile, for a tenth of the units and for all. Rows of `cpu/traces`: processor time a token of `Engine.generate` and
of `Engine.trace` with the same parameters, in turn, and bytes a step of the files.
"""

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.support.common import RESULTS, in_turn, median_ratio, record, show
from handloom import Engine
from handloom.experiments.plan import Plan
from handloom.experiments.run import run
from handloom.experiments.samples import header_of, record_of
from handloom.loading import demo

PLANS = {
    "units": "units",
    "fresh_ms": "ms a unit",
    "there_ms": "where all are there",
    "fresh_peak_kb": "peak kB",
    "there_peak_kb": "where all are there",
    "bytes": "bytes a record",
}
TRACES = {
    "vocabulary": "vocabulary",
    "members": "members",
    "off_ms": "ms a token, off",
    "on_ms": "on",
    "ratio": "ratio",
    "stage_ms": "ms a stage",
    "npz": "bytes a step, .npz",
    "parquet": ".parquet",
    "html": ".html",
}
ASKED = {
    "temperature": 1.2,
    "repetition_penalty": 1.1,
    "top_p": 0.95,
    "min_p": 0.05,
    "seed": 1,
    "ignore_eos": True,
}
TOKENS = 32
PROMPT = list(range(5, 21))


def tiny(vocabulary: int) -> Engine:
    """A model whose passes cost next to nothing."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return Engine(LlamaForCausalLM(config), slots=1)


def plan_of(units: int) -> Plan:
    """Two settings of one prompt in a hundred."""
    prompts = [f"prompt number {i}" for i in range(units // 100)]
    settings = {"top-p": {"top_p": 0.9}, "min-p": {"min_p": 0.1}}
    return Plan.of({"model": "tiny", "prompts": prompts, "settings": settings, "samples": 50})


def plan_row(units: int, repeats: int) -> dict:
    """Processor time and memory of a run in which the model is one answer of 32 tokens, known before."""
    engine = tiny(512)
    answer = engine.generate([PROMPT], max_new_tokens=TOKENS, **ASKED)[0]

    def draw(plan, model, pending):
        yield header_of(plan, engine, model)
        for unit in pending:
            yield record_of(unit, answer)

    def seconds(work: Callable[[], int]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def peak(work: Callable[[], int]) -> float:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1] / 1e3
        finally:
            tracemalloc.stop()

    plan, found = plan_of(units), {"bench": "cpu/plans", "units": units}
    with tempfile.TemporaryDirectory() as folder:
        for name, measure, scale, count in (("ms", seconds, 1e3 / units, repeats), ("peak_kb", peak, 1.0, 1)):
            for turn in range(count):
                path = Path(folder) / f"{name}{turn}.jsonl"
                for kind in ("fresh", "there"):
                    value = measure(lambda at=path: run(plan, at, draw=draw)) * scale
                    found[f"{kind}_{name}"] = min(value, found.get(f"{kind}_{name}", value))
        return found | {"bytes": path.stat().st_size / units}


def trace_row(name: str, engine: Engine, repeats: int) -> dict:
    """Both sides in turn, each with prompts of its own."""

    def timed(side: str, turn: int) -> float:
        prompt = [turn + 1, *PROMPT]
        start = time.process_time()
        if side == "on":
            engine.trace(prompt, max_new_tokens=TOKENS, **ASKED)
        else:
            engine.generate([prompt], max_new_tokens=TOKENS, progress=False, **ASKED)
        return (time.process_time() - start) / TOKENS * 1e3

    sides = {side: lambda turn, side=side: timed(side, turn) for side in ("off", "on")}
    found = in_turn(sides, repeats, 1)
    told = engine.trace(PROMPT, max_new_tokens=TOKENS, **ASKED)
    stages = len(told.steps[0].stages)
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("npz", "parquet", "html"):
            told.save(path := Path(folder) / f"trace.{kind}")
            sizes[kind] = path.stat().st_size / TOKENS
    off, on = (statistics.median(found[side]) for side in ("off", "on"))
    return {
        "bench": "cpu/traces", "model": name, "vocabulary": engine.vocab_size, "members": stages - 1, "off_ms": off,
        "on_ms": on, "ratio": median_ratio(found["on"], found["off"]), "stage_ms": (on - off) / stages, **sizes,
    }  # fmt: skip


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=10_000, help="a multiple of 1000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.jsonl")
    asked = parser.parse_args()
    rows = [plan_row(units, asked.repeats) for units in (asked.units // 10, asked.units)]
    show("plans", PLANS, record(rows, asked.output))
    rows = [trace_row(f"tiny {size}", tiny(size), asked.repeats) for size in (512, 151_936)]
    rows.append(trace_row("demo", Engine.from_pretrained(demo.locate(), slots=1), asked.repeats))
    show("traces", TRACES, record(rows, asked.output))


if __name__ == "__main__":
    main()
