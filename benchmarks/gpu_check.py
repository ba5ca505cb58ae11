"""Everything that needs a GPU, in one command of under 9 minutes that may be interrupted at any time.

    python benchmarks/gpu_check.py               # checks, then timings
    python benchmarks/gpu_check.py --checks-only

First the checks: kernel values against their references on CUDA, bit equality of noise and tokens with the CPU, capture
and replay in a CUDA graph. Then timings in replayed graphs, cold and warm. Each finished step appends its rows to
benchmarks/results/gpu_check.jsonl, with commit, GPU and versions. Exit status: 0 all well, 1 a check failed, 2 no GPU.

Other modules take part by adding a function to CHECKS (yields one text a failure) or TIMINGS (yields rows).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: this folder must not be where `import kernels` looks
    sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

import torch

from benchmarks import kernels as sampling
from benchmarks.common import RESULTS, record, show
from benchmarks.gpu_decode import COLUMNS, captured_steps, decode_timings, silent_steps

BUDGET = 9 * 60 - 30  # seconds; no step starts that is expected to end later
OUTPUT = RESULTS / "gpu_check.jsonl"


def kernel_values(device):
    """The interpreter's checks, unchanged, on CUDA."""
    import interpreted_kernels

    for name, found in interpreted_kernels.checks(device):
        yield from (f"{name}: {text}" for text in found)


def full_size_tokens(device):
    """Tokens at full vocabularies equal those of the CPU path, whatever the batch around a row."""
    from sampling_rows import key, rows

    from handloom.kernels import rules
    from handloom.kernels.sample import sample

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

    from handloom.kernels.sample import sample

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

    from handloom.kernels import rules
    from handloom.kernels.sample_fused import Plan, sample_fused

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


def sampling_timings(device):
    """The settings that the aims are about, worst rows beside typical ones; `benchmarks/kernels.py` has the rest."""
    for batch, vocab in ((1, 151936), (8, 151936), (64, 151936), (256, 151936), (8, 128256)):
        for mode in ("greedy", "temperature", "k+p+min-p", "p", "everything"):
            for kind in ("typical", "flat"):
                sides = ["handloom", "transformers", "flashinfer"] if kind == "typical" else ["handloom"]
                yield from sampling.measure(mode, kind, batch, vocab, "bf16", device, sides, 15)


CHECKS = [kernel_values, full_size_tokens, many_rows, graph_replay, captured_steps, silent_steps]
TIMINGS = [decode_timings, sampling_timings]


def driver():
    """GPU name and driver version as nvidia-smi tells them, or None."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_checks(device, deadline):
    """Run each check, keep its row; returns the number of checks that failed or found no time."""
    failed = 0
    for check in CHECKS:
        if time.monotonic() > deadline:
            print(f"{check.__name__}: no time left")
            failed += 1
            continue
        started = time.monotonic()
        try:
            failures = list(check(device))
        except Exception as error:  # noqa: BLE001 - one broken check must not keep the others from running
            failures = [f"{type(error).__name__}: {error}"]
        seconds = round(time.monotonic() - started, 1)
        row = {
            "check": check.__name__,
            "failures": failures[:20],
            "failed": len(failures),
            "seconds": seconds,
        }
        record([row | {"driver": driver()}], OUTPUT)
        failed += bool(failures)
        print(f"{'FAILED' if failures else 'ok':7}{check.__name__} ({seconds} s)")
        for text in failures[:20]:
            print(f"       {text[:300]}")
    return failed


def run_timings(device, deadline):
    """Run timings until the time is up; every row is kept as soon as it is there."""
    rows = []
    for timing in TIMINGS:
        for row in timing(device):
            rows += record([row | {"driver": driver()}], OUTPUT)
            if time.monotonic() > deadline:
                print("time is up; what is missing was not measured")
                break
    decoded = [row for row in rows if "ms_per_token" in row]
    show("decoding, weights at real shapes, bfloat16", COLUMNS, decoded)
    sampled = [row for row in rows if "vocab" in row]
    show("sampling, microseconds of device time a call in a replayed graph", sampling.COLUMNS, sampled)


def main():
    """Run what the command line asks for; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checks-only", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; nothing was checked", file=sys.stderr)
        return 2
    deadline = time.monotonic() + BUDGET
    try:
        failed = run_checks("cuda", deadline)
        if not options.checks_only:
            run_timings("cuda", deadline)
    except KeyboardInterrupt:
        print(f"interrupted; finished steps are in {OUTPUT}")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
