"""Decoding against `model.generate` and others: speed, cost per step outside the forward, throughput, memory.

Run from the repository root: `python -m benchmarks.decode --help`.
"""

import functools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import typer

from benchmarks.decode import llm_perf, memory, speed
from benchmarks.decode.counting import step_and_call
from benchmarks.decode.rivals import COMPILED, SIDES, caches
from benchmarks.decode.sides import Handloom, HuggingFace, Request, Sampling, Side, loaded, twin
from benchmarks.support.common import RESULTS, Progress, in_turn, median_ratio, record, show, spread
from benchmarks.support.shapes import SHAPES, available_bytes, build, config_of, refusal, sizes

SAMPLING = Sampling(temperature=0.8, top_k=20, top_p=0.9)
SECTIONS = ("counts", "throughput", "memory", "speed", "ragged")
PLAIN = tuple(name for name in SIDES if name not in COMPILED)
# Device -> batches, contexts and new tokens of the grid.
GRIDS = {"cpu": ((1, 8), (256,), 32), "cuda": ((1, 8, 64), (256, 4096, 32768), 128)}


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
        grid: batches, contexts and new tokens of `speed` and `ragged`; None takes those of the device.
        sides: of `speed` and `ragged`.
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
    grid: tuple[tuple[int, ...], tuple[int, ...], int] | None = None
    sides: tuple[str, ...] = tuple(SIDES)


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
        grid=((1, 3), (24,), 6),
        sides=PLAIN,
    ),
}


def random_prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    """Token ids from 3 up, so none of the usual special tokens."""
    return [rng.randrange(3, vocab) for _ in range(length)]


def counts(work: Workload, repeats: int) -> Iterator[list[dict]]:
    """What one step and one call cost outside the model's forward: four ragged rows, random weights, CPU."""
    rng = random.Random(0)
    model = build("tiny", torch.float32)
    prompts = [random_prompt(rng, n, model.config.vocab_size) for n in (5, 6, 7, 8)]
    sides = [Handloom(model, slots=4, stop_at_eos=True), HuggingFace(model, batch=4, stop_at_eos=True)]
    for case, sampling, limit in (("greedy", None, 10), ("temperature+top-k+top-p", SAMPLING, 20)):
        for side in sides:

            def run(side=side, sampling=sampling, steps=1):
                torch.manual_seed(0)
                side.answer([Request(p, steps) for p in prompts], sampling)

            run()
            row = {"benchmark": "decode/counts", "case": case, "side": side.name, "rows": len(prompts)}
            row |= step_and_call(model, run, work.steps, repeats)
            yield [row | ({"limit": limit} if side.name == "handloom" else {})]


def throughput(work: Workload, repeats: int, subject: speed.Subject) -> Iterator[list[dict]]:
    """Tokens per second and time to first tokens, both sides with the same weights and threads.

    Every round has prompts of its own, so that no side finds a prompt that it has seen before.
    """
    ours, theirs = loaded(subject.model), twin(subject.model)
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
    about = subject.about()
    del about["mode"]  # the case says it
    for case, measure, options in cases:
        yield [row | about for row in compare(case, sides, measure, repeats, **options)]


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
    "speed": speed.COLUMNS,
    "ragged": speed.COLUMNS,
    "llm-perf": speed.COLUMNS,
}


@dataclass(frozen=True)
class Options:
    """What the command line asks for, checked.

    Args:
        device, dtype: where the model is and what it computes in.
        cases: the grid, uniform and ragged. sides: who runs in it.
        repeats, duration: rounds, and seconds of the LLM-Perf protocol; None leaves both to the preset.
        reports: folder of the LLM-Perf reports.
    """

    work: Workload
    model: str
    device: torch.device
    dtype: torch.dtype
    sampling: Sampling | None
    grid: tuple[tuple[int, ...], tuple[int, ...], int]
    sides: tuple[str, ...]
    repeats: int | None
    duration: float | None
    reports: Path

    def cases(self, ragged: bool) -> list[speed.Case]:
        """The cells of the grid."""
        return speed.grid(*self.grid, ragged=ragged)

    @functools.cached_property
    def protocol(self) -> llm_perf.Protocol:
        """LLM-Perf's, but for what was given."""
        given = {"iterations": self.repeats, "duration": self.duration}
        return replace(llm_perf.Protocol(), **{name: v for name, v in given.items() if v is not None})

    @functools.cached_property
    def sized(self):
        """Sizes of the model, which is not built for it."""
        return sizes(config_of(self.model), self.dtype)

    def check(self, cases: list[speed.Case]) -> None:
        """Refuse before anything is built, if none of the cases fits into memory."""
        free = available_bytes(self.device)
        reasons = [
            refusal(self.model, self.sized, c.batch, c.context + c.new, caches(self.sides), free)
            for c in cases
        ]
        if reasons and all(reasons):
            raise typer.BadParameter(reasons[0])

    @functools.cached_property
    def loaded(self):
        """The model, the seconds that it took, and its memory."""
        return llm_perf.load(self.model, self.dtype, self.device)

    @functools.cached_property
    def subject(self) -> speed.Subject:
        """The model with what belongs to it."""
        name = Path(self.model).name if Path(self.model).is_dir() else self.model
        return speed.Subject(name, self.loaded[0], self.sized, self.sampling, self.model in SHAPES)


def measurements(options: Options, progress: Progress) -> dict[str, Callable[[], Iterator[list[dict]]]]:
    """Section -> its rows, as they come."""
    rounds = 5 if options.repeats is None else options.repeats
    free = available_bytes(options.device)

    def grid(ragged: bool) -> Iterator[list[dict]]:
        cases = options.cases(ragged)
        yield from speed.measure(options.subject, cases, list(options.sides), rounds, free, progress)

    def protocol() -> Iterator[list[dict]]:
        subject, loaded = options.subject, options.loaded[1:]
        sides, folder = list(options.sides), options.reports
        yield from llm_perf.measure(options.protocol, subject, sides, loaded, folder, progress)

    work = options.work
    return {
        "counts": lambda: counts(work, rounds),
        "throughput": lambda: throughput(work, rounds, options.subject),
        "memory": lambda: iter([memory.measure(work.served, *work.context)]),
        "speed": lambda: grid(ragged=False),
        "ragged": lambda: grid(ragged=True),
        "llm-perf": protocol,
    }


def run(section: str, batches: Iterator[list[dict]], output: Path, as_json: bool, about: dict) -> bool:
    """Append rows to a file as soon as they are there, and print them.

    Returns:
        Whether it came to its end; False after Ctrl-C, which costs nothing that was finished.
    """
    finished, complete = [], True
    try:
        for batch in batches:
            rows = record([row | about for row in batch], output)
            finished += rows
            for row in rows if as_json else ():
                print(json.dumps(row), flush=True)
    except KeyboardInterrupt:
        complete = False
        print(f"interrupted: {len(finished)} rows of {section} are in {output}", file=sys.stderr)
    if not as_json and finished:
        show(section, COLUMNS[section], finished)
    return complete


def chosen_sides(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Names between commas."""
    if text is None:
        return default
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = sorted(set(names) - set(SIDES))
    if unknown or not names:
        raise typer.BadParameter(f"sides {text!r}: expected some of {', '.join(SIDES)}")
    return names


def chosen_device(name: str | None) -> torch.device:
    """The device of a name, or the best there is."""
    there = torch.cuda.is_available()
    name = name or ("cuda" if there else "cpu")
    kind = name.partition(":")[0]
    if kind not in GRIDS or (kind == "cuda" and not there):
        raise typer.BadParameter(
            f"device {name!r}: expected {' or '.join(GRIDS) if there else 'cpu, no GPU is found'}"
        )
    return torch.device(name)


Sections = Annotated[list[str] | None, typer.Argument(help=f"{', '.join(SECTIONS)}; default: all of them")]
Model = Annotated[
    str, typer.Option(help=f"demo, a folder, a hub name, or random weights of {', '.join(SHAPES)}")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="default: float32 on a CPU, else bfloat16"),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")]
Sides = Annotated[
    str | None, typer.Option(help=f"of speed, ragged and llm-perf, by commas: {', '.join(SIDES)}")
]
Batch = Annotated[list[int] | None, typer.Option(min=1, help="rows together; repeatable")]
Context = Annotated[list[int] | None, typer.Option(min=1, help="tokens of a prompt; repeatable")]
NewTokens = Annotated[int | None, typer.Option(min=2, help="tokens of an answer")]
Drawn = Annotated[
    bool, typer.Option(help="speed and ragged: draw with temperature, top-k and top-p, else greedy")
]
Threads = Annotated[int, typer.Option(help="threads of torch; 0 leaves its own choice")]
Repeats = Annotated[
    int | None, typer.Option(min=1, help="rounds in which all sides run in turn; default 5, llm-perf 10")
]
Duration = Annotated[
    float | None, typer.Option(min=0, help="llm-perf: seconds that each side runs at least; default 10")
]
Preset = Annotated[
    Literal["standard", "quick", "llm-perf"],
    typer.Option(help="sizes of the workloads; llm-perf is that protocol alone, without sections"),
]
Reports = Annotated[Path, typer.Option(help="folder of the llm-perf reports")]
Output = Annotated[Path, typer.Option(help="rows are appended here")]
Json = Annotated[bool, typer.Option("--json", help="print JSON lines in place of tables")]


def wanted_sections(sections: list[str] | None, perf: bool, *fixed) -> list[str]:
    """What to measure: the sections, or with `perf` that protocol alone, which leaves none of `fixed` to choose.

    Raises:
        typer.BadParameter: an unknown section, or a choice that the protocol makes.
    """
    unknown = set(sections or ()) - set(SECTIONS)
    if unknown or (perf and sections):
        known = "none with --preset llm-perf" if perf else ", ".join(SECTIONS)
        raise typer.BadParameter(f"{', '.join(sections)}: sections are {known}")
    if perf and any(fixed):
        raise typer.BadParameter("--preset llm-perf fixes batch, context, new tokens and greedy choice")
    return ["llm-perf"] if perf else list(sections or SECTIONS)


def check(options: Options, wanted: list[str]) -> None:
    """Refuse before anything is built what does not fit into memory."""
    if "llm-perf" in wanted:
        protocol = options.protocol
        options.check([speed.Case(protocol.batch, protocol.prompt, protocol.new)])
    for section in {"speed", "ragged"} & set(wanted):
        options.check(options.cases(ragged=section == "ragged"))


def main(
    sections: Sections = None,
    model: Model = "demo",
    dtype: Dtype = None,
    device: Device = None,
    sides: Sides = None,
    batch: Batch = None,
    context: Context = None,
    new_tokens: NewTokens = None,
    sampling: Drawn = False,
    threads: Threads = 0,
    repeats: Repeats = None,
    duration: Duration = None,
    preset: Preset = "standard",
    reports: Reports = RESULTS / "llm-perf",
    output: Output = RESULTS / "decode.jsonl",
    as_json: Json = False,
) -> None:
    """Measure handloom's decoding next to other ways to decode the same model, in one run.

    counts: operations, calls and time of a step and of a call, outside the model's forward.

    throughput: tokens per second of a lone prompt and of ragged requests, first tokens of a shared prompt.

    memory: what the block pool holds, and that serving does not grow it.

    speed: every side over batches and contexts: time to first token and per token, tokens per second, share of
    the read bandwidth measured in the same run, peak memory, launches and syncs per token.

    ragged: the same for requests of different length that take over each other's slots.
    """
    if threads:
        torch.set_num_threads(threads)
    perf = preset == "llm-perf"
    wanted = wanted_sections(sections, perf, batch, context, new_tokens, sampling)
    work, place = PRESETS["standard" if perf else preset], chosen_device(device)
    batches, contexts, new = work.grid or GRIDS[place.type]
    options = Options(
        work, model, place, getattr(torch, dtype or ("float32" if place.type == "cpu" else "bfloat16")),
        SAMPLING if sampling else None, (tuple(batch or batches), tuple(context or contexts), new_tokens or new),
        chosen_sides(sides, ("handloom", "generate") if perf else work.sides), repeats, duration, reports,
    )  # fmt: skip
    check(options, wanted)
    measure_all(options, wanted, output, as_json, {"preset": preset})


def measure_all(options: Options, wanted: list[str], output: Path, as_json: bool, about: dict) -> None:
    """Measure section after section; Ctrl-C ends the command with status 130."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    progress = Progress()
    measure = measurements(options, progress)
    for section in wanted:
        if section not in ("speed", "ragged", "llm-perf"):  # those tell of every case
            progress(section)
        complete = run(section, measure[section](), output, as_json, about)
        progress.clear()
        if not complete:
            raise typer.Exit(130)


if __name__ == "__main__":
    typer.run(main)
