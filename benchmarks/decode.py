"""Decoding against `model.generate`: cost per step outside the forward, throughput, memory.

Run from the repository root: `python -m benchmarks.decode --help`.
"""

import functools
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import typer

from benchmarks import memory
from benchmarks.common import RESULTS, in_turn, median_ratio, record, show, spread
from benchmarks.counting import operations, python_calls, seconds_outside
from benchmarks.sides import Handloom, HuggingFace, Request, Sampling, Side, load

SAMPLING = Sampling(temperature=0.8, top_k=20, top_p=0.9)


@dataclass(frozen=True)
class Workload:
    """Sizes of everything that is measured; every range is inclusive.

    Args:
        steps: two answer lengths, whole blocks apart; the cost of one step is taken between them.
        single: prompt and answer length of the lone greedy request.
        requests, prompts, answers, slots: the ragged requests and how many of them are decoded together.
        shared, samples: prompt length and samples of the shared prompt.
        served: requests of the growth test.
        context: rows and tokens per row of the memory test.
    """

    steps: tuple[int, int] = (17, 49)
    single: tuple[int, int] = (32, 64)
    requests: int = 32
    prompts: tuple[int, int] = (16, 256)
    answers: tuple[int, int] = (16, 128)
    slots: int = 8
    shared: int = 512
    samples: int = 8
    served: int = 1000
    context: tuple[int, int] = (8, 512)


PRESETS = {
    "standard": Workload(),
    "quick": Workload(
        single=(8, 8),
        requests=6,
        prompts=(4, 16),
        answers=(2, 12),
        slots=3,
        shared=64,
        samples=3,
        served=100,
        context=(3, 96),
    ),
}


def random_prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    """Token ids from 3 up, so none of the usual special tokens."""
    return [rng.randrange(3, vocab) for _ in range(length)]


def counts(work: Workload, repeats: int) -> list[dict]:
    """What one step and one call cost outside the model's forward: four ragged rows, random weights, CPU."""
    rng = random.Random(0)
    model = load("tiny", torch.float32)
    prompts = [random_prompt(rng, n, model.config.vocab_size) for n in (5, 6, 7, 8)]
    sides = [Handloom(model, slots=4, stop_at_eos=True), HuggingFace(model, batch=4, stop_at_eos=True)]
    rows = []
    for case, sampling, limit in (("greedy", None, 10), ("temperature+top-k+top-p", SAMPLING, 20)):
        for side in sides:

            def run(side=side, sampling=sampling, steps=1):
                torch.manual_seed(0)
                side.answer([Request(p, steps) for p in prompts], sampling)

            run()
            row = {"benchmark": "decode/counts", "case": case, "side": side.name, "rows": len(prompts)}
            row |= _step_and_call(model, run, work.steps, repeats)
            rows.append(row | ({"limit": limit} if side.name == "handloom" else {}))
    return rows


def _step_and_call(model, run: Callable, steps: tuple[int, int], repeats: int) -> dict:
    """Cost of a step, from two answer lengths, and what is left of the shorter answer: the cost of a call."""
    short, long = steps
    apart = long - short

    def split(measure: Callable[[int], float]) -> tuple[float, float]:
        few, many = measure(short), measure(long)
        step = (many - few) / apart
        return step, few - short * step

    names = [operations(model, lambda n=n: run(steps=n)) for n in steps]
    each = {name: (count - names[0][name]) / apart for name, count in names[1].items()}
    step, call = split(lambda n: names[steps.index(n)].total())
    calls_step, calls_call = split(lambda n: python_calls(model, lambda: run(steps=n)))
    # Noise only ever adds time, so the smallest of several measurements is the truest.
    rounds = range(3 * repeats)
    us_step, us_call = split(
        lambda n: 1e6 * min(seconds_outside(model, lambda: run(steps=n)) for _ in rounds)
    )
    return {
        "operations_per_step": step,
        "operations_per_call": call,
        "python_calls_per_step": calls_step,
        "python_calls_per_call": calls_call,
        "us_per_step": us_step,
        "us_per_call": us_call,
        "operation_names": {name: n for name, n in sorted(each.items(), key=lambda item: -item[1]) if n},
    }


def throughput(work: Workload, repeats: int, model: str, dtype: torch.dtype) -> list[dict]:
    """Tokens per second and time to first tokens, both sides with the same model, dtype and threads.

    Every round has prompts of its own, so that no side finds a prompt that it has seen before.
    """
    ours, theirs = load(model, dtype), load(model, dtype)
    vocab = ours.config.vocab_size
    sides = [Handloom(ours, work.slots), HuggingFace(theirs, work.slots)]

    def lone(side: Side, turn: int) -> float:
        prompt, answer = work.single
        return rate(side, [Request(random_prompt(random.Random(turn), prompt, vocab), answer)])

    def ragged(side: Side, turn: int) -> float:
        lengths, rng = random.Random(0), random.Random(turn)
        sizes = [
            (lengths.randint(*work.prompts), lengths.randint(*work.answers)) for _ in range(work.requests)
        ]
        return rate(side, [Request(random_prompt(rng, n, vocab), answer) for n, answer in sizes])

    def first(side: Side, turn: int) -> float:
        return side.first_tokens(
            random_prompt(random.Random(turn), work.shared, vocab), work.samples, SAMPLING
        )

    cases = (
        ("one prompt, greedy", lone, {"limit": 1.0}),
        (f"{work.requests} ragged requests, {work.slots} slots", ragged, {"limit": 1.5, "warmup": 0}),
        (
            f"first tokens of {work.samples} samples, prompt of {work.shared}",
            first,
            {"limit": 3.0, "lower_is_better": True},
        ),
    )
    about = {"model": model, "dtype": str(dtype).removeprefix("torch.")}
    return [
        row | about
        for case, measure, options in cases
        for row in compare(case, sides, measure, repeats, **options)
    ]


def rate(side: Side, requests: list[Request]) -> float:
    """Useful tokens per second of one run over all requests, prefill included."""
    start = time.perf_counter()
    tokens = side.answer(requests)
    return tokens / (time.perf_counter() - start)


def compare(
    case: str,
    sides: list[Side],
    measure: Callable[[Side, int], float],
    repeats: int,
    limit: float,
    lower_is_better: bool = False,
    warmup: int = 1,
) -> list[dict]:
    """One row per side; the first side's row has the median ratio by which it beats the second.

    Args:
        measure: one side's measurement in one round: tokens per second, or seconds where lower is better.
        limit: the ratio that is wanted.
        warmup: rounds that do not count.
    """
    measured = in_turn({side.name: functools.partial(measure, side) for side in sides}, repeats, warmup)
    first, second = (measured[side.name] for side in sides)
    ratio = median_ratio(second, first) if lower_is_better else median_ratio(first, second)
    unit = "s" if lower_is_better else "tokens/s"
    rows = [
        {"benchmark": "decode/throughput", "case": case, "side": side.name, "unit": unit, "repeats": repeats}
        | spread(measured[side.name])
        for side in sides
    ]
    rows[0] |= {"ratio": ratio, "limit": limit}
    return rows


COLUMNS = {
    "counts": {
        "case": "case",
        "side": "side",
        "operations_per_step": "ops/step",
        "limit": "limit",
        "python_calls_per_step": "calls/step",
        "us_per_step": "CPU us/step",
        "operations_per_call": "ops/call",
        "python_calls_per_call": "calls/call",
        "us_per_call": "CPU us/call",
    },
    "throughput": {
        "case": "case",
        "side": "side",
        "median": "median",
        "min": "min",
        "max": "max",
        "unit": "unit",
        "ratio": "ratio",
        "limit": "wanted",
    },
    "memory": memory.COLUMNS,
}


def main(
    sections: Annotated[
        list[str] | None, typer.Argument(help="counts, throughput, memory; default: all three")
    ] = None,
    model: Annotated[str, typer.Option(help="for throughput: demo, tiny, a folder, or a hub name")] = "demo",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "float32",
    threads: Annotated[int, typer.Option(help="threads of torch; 0 leaves its own choice")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="rounds in which both sides run in turn")] = 5,
    preset: Annotated[Literal["standard", "quick"], typer.Option(help="sizes of the workloads")] = "standard",
    output: Annotated[Path, typer.Option(help="rows are appended here")] = RESULTS / "decode.jsonl",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines in place of tables")] = False,
) -> None:
    """Measure handloom's decoding next to Hugging Face's model.generate, in one run."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    work = PRESETS[preset]
    measure = {
        "counts": lambda: counts(work, repeats),
        "throughput": lambda: throughput(work, repeats, model, getattr(torch, dtype)),
        "memory": lambda: memory.measure(work.served, *work.context),
    }
    unknown = set(sections or ()) - set(measure)
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)}: sections are {', '.join(measure)}")
    for section in sections or measure:
        rows = record([row | {"preset": preset} for row in measure[section]()], output)
        if as_json:
            for row in rows:
                print(json.dumps(row))
        else:
            show(section, COLUMNS[section], rows)


if __name__ == "__main__":
    typer.run(main)
