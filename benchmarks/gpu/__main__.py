"""Everything that needs a GPU, in one command of under 9 minutes that may be interrupted at any time.

    python -m benchmarks.gpu               # checks, then a short version of every benchmark
    python -m benchmarks.gpu --checks-only
    python -m benchmarks.gpu --only large_steps --only many_rows

First the checks: kernel values against their references on CUDA, bit equality of noise and tokens with the CPU, steps
recorded in a CUDA graph against eager ones, no waits in the decode loop. Then timings, and last what was aimed at, what
was measured and whether it was met. Every row is appended to benchmarks/results/gpu_check.jsonl as soon as it is there,
with commit, GPU and versions. Each section has its share of the time; what one leaves over the next may use. Exit
status: 0 all well, 1 a check failed, was interrupted or found no time, 2 no GPU. An aim that was missed is no failure.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # before Triton is imported; tests import this file, and have an interpreter
    os.environ["TRITON_INTERPRET"] = "0"
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "support"))

import torch

from benchmarks.decode import speed
from benchmarks.gpu import decode as gpu_decode
from benchmarks.gpu.decode import DRY, FULL, Scale
from benchmarks.gpu.targets import verdicts
from benchmarks.kernels import (
    attention as kernels_attention,
)
from benchmarks.kernels import (
    nf4 as kernels_nf4,
)
from benchmarks.kernels import (
    sampling as kernels_sampling,
)
from benchmarks.kernels import (
    timing as kernels_timing,
)
from benchmarks.support.common import RESULTS, record, show

BUDGET = 9 * 60 - 30  # seconds for all sections
LAST_CALL = 9 * 60 - 15  # when a section that does not come back is broken off
OUTPUT = RESULTS / "gpu_check.jsonl"


def kernel_values(device):
    """The interpreter's checks, unchanged, on CUDA."""
    import interpreted_kernels

    for name, found in interpreted_kernels.checks(device):
        yield from (f"{name}: {text}" for text in found)


def full_size_tokens(device):
    """Tokens at full vocabularies equal those of the CPU path, whatever the batch around a row."""
    from sampling_rows import key, rows

    from handloom.kernels.sampling import rules
    from handloom.kernels.sampling.sample import sample

    for vocab in (32001, 128256, 151936, 262144):
        for name, x in rows(4, vocab):
            settings = {**key(4), "temperature": torch.tensor([0.8, 1.0, 0.0, 1.3])}
            chosen = (
                torch.tensor([50, 0, 0, 0]),
                torch.tensor([0.95, 0.9, 1.0, 1.0]),
                torch.tensor([0.05, 0, 0, 0]),
            )
            for dtype in (torch.float32, torch.bfloat16):
                make = (rules.top_k, rules.top_p, rules.min_p)
                on_cpu = tuple(rule(values) for rule, values in zip(make, chosen, strict=True))
                on_gpu = tuple(rule(values.to(device)) for rule, values in zip(make, chosen, strict=True))
                expected = sample(x.to(dtype), rules=on_cpu, **settings).tokens
                moved = {part: values.to(device) for part, values in settings.items()}
                got = sample(x.to(device, dtype), rules=on_gpu, kernels="triton", **moved).tokens.cpu()
                if not torch.equal(expected, got):
                    yield f"{name} V={vocab} {dtype}: {expected.tolist()} != {got.tolist()}"


def many_rows(device):
    """300 rows at once, and in shuffled order, give each row the token it gets alone: races would show here."""
    from sampling_rows import generator, key

    from handloom.kernels.sampling.sample import sample

    x = (torch.randn(300, 151936, generator=generator(0)) * 3).to(device, torch.bfloat16)
    settings = {name: value.to(device) for name, value in key(300).items()}
    settings |= {
        "top_k": torch.full((300,), 50, device=device),
        "top_p": torch.full((300,), 0.9, device=device),
    }
    together = sample(x, kernels="triton", **settings).tokens
    for turn in range(20):
        if not torch.equal(sample(x, kernels="triton", **settings).tokens, together):
            yield f"repeat {turn} differs"
    order = torch.randperm(300, generator=generator(1)).to(device)
    shuffled = {name: value[order] for name, value in settings.items()}
    if not torch.equal(sample(x[order], kernels="triton", **shuffled).tokens, together[order]):
        yield "shuffled rows differ"
    for row in range(0, 300, 37):
        alone = {name: value[row : row + 1] for name, value in settings.items()}
        if sample(x[row : row + 1], kernels="triton", **alone).tokens[0] != together[row]:
            yield f"row {row} alone differs"


def graph_replay(device):
    """Replays advance the position in device memory, follow parameters changed in place, and allocate nothing."""
    from sampling_rows import generator, key

    from handloom.kernels.sampling import rules
    from handloom.kernels.sampling.fused import Plan, sample_fused

    x = torch.randn(4, 32000, generator=generator(3)).to(device)
    settings = {name: value.to(device) for name, value in key(4).items()}
    settings |= {"temperature": torch.ones(4, device=device)}
    settings["rules"] = (
        rules.top_k(torch.full((4,), 50.0, device=device)),
        rules.top_p(torch.ones(4, device=device)),
    )
    plan = Plan(x, rules=settings["rules"])
    first = settings["positions"].clone()
    sample_fused(x, plan=plan, **settings)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample_fused(x, plan=plan, **settings)
        settings["positions"] += 1
    settings["positions"].copy_(first)
    held = torch.cuda.memory_allocated()
    for step in range(6):
        if step == 3:
            settings["rules"][0].parameter.fill_(3.0)
            settings["temperature"].fill_(0.5)
        graph.replay()
        eager = sample_fused(x, **{**settings, "positions": first + step}).tokens
        if not torch.equal(captured.tokens, eager):
            yield f"replay {step}: {captured.tokens.tolist()} != {eager.tolist()}"
        del eager
    if torch.cuda.memory_allocated() != held:
        yield "replays allocated memory"


def attention_values(device):
    """The attention kernel against an oracle over the rules of attention, as the tests do in the interpreter."""
    from test_attention import DECODE, RAGGED, RULES, VERIFY, Case

    shapes = [{**DECODE, **rule} for rule in RULES.values()] + [{**RAGGED, **RULES["all"]}]
    shapes += [{**VERIFY, **RULES[rule], "tree": True} for rule in ("plain", "all")]
    shapes += [{"dims": (128, 128), "heads": (8, 2), "lengths": (5, 900)}, {"dims": (256, 256), "block": 32}]
    for change in shapes:
        for dtype, splits in ((torch.bfloat16, 4), (torch.float32, 1)):
            case = Case(**change, dtype=dtype)
            try:
                case.check(case.triton(splits=splits))
            except AssertionError as error:
                yield f"{change} {dtype}, {splits} splits: {str(error).splitlines()[0]}"
            yield None


def nf4_values(device):
    """Products with 4-bit weights against the dense product, in bitsandbytes' own layout."""
    from test_nf4 import activations, check, quantized

    for kind, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
        weight, _ = quantized(512, 4096, kind=kind, nested=nested)
        for rows in (1, 2, 16, 40):
            try:
                check(weight, activations(rows, 4096, dtype=torch.bfloat16))
            except AssertionError as error:
                yield f"{kind}, nested {nested}, {rows} rows: {str(error).splitlines()[0]}"
            yield None


def sampling_timings(scale: Scale) -> Iterator[dict]:
    """The settings that the aims are about, worst rows beside typical ones; `kernels.py` has the rest."""
    batches = ((1, 151936), (8, 128256), (64, 151936), (256, 151936)) if scale.on_cuda else ((1, 512),)
    kind = "bf16" if scale.on_cuda else "fp32"
    for batch, vocab in batches:
        for mode in ("k+p+min-p", "everything", "temperature"):
            sides = ["handloom", "transformers", "flashinfer"] if mode == "k+p+min-p" else ["handloom"]
            caches = ("warm", "cold") if mode == "k+p+min-p" else ("warm",)
            measure = functools.partial(kernels_sampling.measure, caches=caches, budget=3.0)
            yield from measure(mode, "typical", batch, vocab, kind, scale.device, sides, 9)
    yield from measure("k+p+min-p", "flat", batch, vocab, kind, scale.device, ["handloom"], 9)
    yield from seed_timings(scale)


def seed_timings(scale: Scale) -> Iterator[dict]:
    """One call with a seed of its own for every row, and with one seed for all."""
    from handloom.kernels.sampling.sample import sample

    rows, vocab = (64, 128256) if scale.on_cuda else (2, 512)
    logits = torch.randn(rows, vocab, device=scale.device).to(scale.dtype)
    count = torch.arange(rows, device=scale.device)
    keys = {"handloom": count, "one seed": torch.zeros_like(count)}

    def build(seeds, inputs):
        return lambda: sample(inputs, seeds=seeds, positions=count)

    builders = {name: functools.partial(build, seeds) for name, seeds in keys.items()}
    about = {"benchmark": "kernels/seeds", "batch": rows, "vocab": vocab}
    yield from kernels_timing.measure(
        builders,
        logits,
        logits.nbytes,
        device=scale.device,
        caches=("warm",),
        repeats=15,
        budget=3.0,
        about=about,
    )


def attention_timings(scale: Scale) -> Iterator[dict]:
    """Decode attention of one layer at the shapes of Llama 1B and 8B."""
    heads = ("32/8x128", "32/8x64") if scale.on_cuda else ("4/2x16",)
    grid = ((1, 2048), (1, 32768), (64, 2048)) if scale.on_cuda else ((1, 40),)
    for text in heads:
        for batch, context in grid:
            yield from kernels_attention.measure(
                kernels_attention.parse_heads(text), "ragged" if batch > 1 else "even", batch, context,
                "bf16" if scale.on_cuda else "fp32", scale.device, list(kernels_attention.SIDES), 9,
                caches=("cold",), budget=2.0,
            )  # fmt: skip


def nf4_timings(scale: Scale) -> Iterator[dict]:
    """Single 4-bit layers: our kernel, bitsandbytes', the dense layer."""
    layers = ("8B gate_proj", "8B down_proj") if scale.on_cuda else ("64x128",)
    for name in layers:
        for batch in scale.quantised:
            yield from kernels_nf4.measure(
                name, kernels_nf4.parse_layer(name), batch, "bf16" if scale.on_cuda else "fp32", scale.device,
                ["handloom", "bitsandbytes", "dense"], 9, caches=("cold",), budget=2.0,
            )  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Args:
        run: of a device for kernel checks, of a `Scale` else; yields failures (None for a case that is well) or rows.
        seconds: its share of the time.
        kind: `kernel` or `engine` checks, or `timing`. cuda: whether there is nothing to run on a CPU.
    """

    run: Callable
    seconds: float
    kind: str
    cuda: bool = False

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.run.__name__


SECTIONS = [
    Section(gpu_decode.recorded_steps, 60, "engine"),
    Section(gpu_decode.silent_steps, 20, "engine"),
    Section(gpu_decode.compiled_steps, 30, "engine"),
    Section(gpu_decode.recorded_rules, 25, "engine"),
    Section(attention_values, 25, "kernel", cuda=True),
    Section(graph_replay, 8, "kernel", cuda=True),
    Section(nf4_values, 8, "kernel", cuda=True),
    Section(full_size_tokens, 20, "kernel", cuda=True),
    Section(many_rows, 8, "kernel", cuda=True),
    Section(kernel_values, 30, "kernel", cuda=True),
    Section(gpu_decode.large_steps, 110, "timing"),
    Section(gpu_decode.small_steps, 60, "timing"),
    Section(gpu_decode.many_rows, 45, "timing"),
    Section(sampling_timings, 25, "timing"),
    Section(gpu_decode.four_bits, 25, "timing"),
    Section(gpu_decode.contexts, 15, "timing"),
    Section(attention_timings, 12, "timing"),
    Section(nf4_timings, 12, "timing"),
    Section(gpu_decode.waits_of_replacement, 5, "timing"),
]


class OutOfTime(Exception):
    """A section ran past the end of the whole check."""


@contextmanager
def last_call(seconds: float):
    """Break off whatever runs after so many seconds, a compilation that does not come back included."""

    def ring(number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def driver() -> str | None:
    """GPU name and driver version as nvidia-smi tells them, or None."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_check(section: Section, scale: Scale, end: float, output: Path) -> bool:
    """Run a check until it is done or its time is up, and keep its row; whether all is well."""
    started, failures, cases, done = time.monotonic(), [], 0, False
    try:
        for found in section.run(scale.device if section.kind == "kernel" else scale):
            cases += 1
            failures += [] if found is None else [found]
            if time.monotonic() > end:
                break
        else:
            done = True
    except OutOfTime:
        raise
    except Exception as error:  # noqa: BLE001 - one broken check must not keep the others from running
        failures.append(f"{type(error).__name__}: {error}")
        done = True
    row = {"check": section.name, "failures": failures[:20], "failed": len(failures), "complete": done}
    record([row | {"seconds": round(time.monotonic() - started, 1), "driver": driver()}], output)
    word = "FAILED" if failures else "ok" if done else "SHORT"
    print(
        f"{word:7}{section.name} ({time.monotonic() - started:.1f} s{'' if done else f', cut off after {cases}'})"
    )
    for text in failures[:20]:
        print(f"       {text[:300]}")
    return done and not failures


def run_timing(section: Section, scale: Scale, end: float, output: Path) -> list[dict]:
    """Run a timing until it is done or its time is up; every row is kept as soon as it is there."""
    started, rows, note = time.monotonic(), [], ""
    try:
        for row in section.run(scale):
            rows += record([row | {"section": section.name, "driver": driver()}], output)
            if time.monotonic() > end:
                note = ", cut off: its time is up"
                break
    except OutOfTime:
        raise
    except Exception as error:  # noqa: BLE001 - one broken timing must not keep the others from running
        note = f", BROKEN: {type(error).__name__}: {str(error)[:300]}"
    print(f"       {section.name}: {len(rows)} rows ({time.monotonic() - started:.1f} s{note})", flush=True)
    return rows


def run(
    sections: list[Section], scale: Scale, budget: float, output: Path, alarm: bool = True
) -> tuple[bool, list]:
    """Run sections in order, each until its share of the time and what was left before it is used up.

    Args:
        budget: seconds for all. alarm: break off what runs past the end of all.

    Returns:
        Whether all checks are well, and all rows.
    """
    started, share, well, rows = time.monotonic(), budget / sum(s.seconds for s in sections), True, []
    limit = last_call(budget + LAST_CALL - BUDGET) if alarm else contextmanager(lambda: iter([None]))()
    end = started
    try:
        with limit:
            for section in sections:
                end = max(end, started) + share * section.seconds
                if section.kind == "timing":
                    rows += run_timing(section, scale, end, output)
                else:
                    well &= run_check(section, scale, end, output)
    except OutOfTime:
        print("time is up; what is missing was not measured")
    except KeyboardInterrupt:
        print(f"interrupted; finished rows are in {output}")
        well = False
    return well, rows


def tell(rows: list[dict], output: Path) -> None:
    """The tables, and what was aimed at beside what was measured."""
    decoded = [row for row in rows if row.get("benchmark", "").startswith("decode/")]
    show(
        "decoding, random weights at real shapes",
        {"model": "model", "mode": "mode", **speed.COLUMNS},
        decoded,
    )
    for name, module in (
        ("sampling", kernels_sampling),
        ("attention", kernels_attention),
        ("nf4", kernels_nf4),
    ):
        kernel = [row for row in rows if row.get("benchmark") == f"kernels/{name}"]
        show(f"{name}, microseconds of device time a call in a replayed graph", module.COLUMNS, kernel)
    figures = [row for row in rows if "figure" in row]
    show("figures", {"figure": "figure", "value": "value", "greedy_ms": "greedy ms"}, figures)
    aims = verdicts(rows)
    record([aim | {"driver": driver()} for aim in aims], output)
    show("aims", {"target": "target", "wanted": "wanted", "measured": "measured", "met": "met"}, aims)


def chosen(names: list[str] | None, checks_only: bool, on_cuda: bool = True) -> list[Section]:
    """The sections that were asked for."""
    known = {s.name: s for s in SECTIONS if on_cuda or not s.cuda}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: expected {', '.join(known)}")
    kept = [known[name] for name in names] if names else list(known.values())
    return [s for s in kept if s.kind != "timing" or not checks_only]


def main() -> int:
    """Run what the command line asks for; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checks-only", action="store_true", help="no timings")
    parser.add_argument("--only", action="append", metavar="SECTION", help="this section; may be repeated")
    parser.add_argument("--dry", action="store_true", help=argparse.SUPPRESS)  # tiny, on a CPU: for the tests
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all sections")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="rows are appended here")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; nothing was checked", file=sys.stderr)
        return 2
    scale = DRY if options.dry else FULL
    well, rows = run(
        chosen(options.only, options.checks_only, scale.on_cuda), scale, options.budget, options.output
    )
    tell(rows, options.output)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
