"""Everything that needs a GPU, in one command that may be interrupted at any time.

    python -m benchmarks.gpu                   # checks, then a short version of every benchmark, in under 9 minutes
    python -m benchmarks.gpu --minutes 3       # or 6: the most important sections
    python -m benchmarks.gpu --checks-only
    python -m benchmarks.gpu --only large_steps --only many_rows

Every section is a process of its own, so that a fault in one spoils no other. They start together, compile and warm
up side by side, and measure one at a time, with the device to themselves. Every row is appended to
benchmarks/results/gpu_check.jsonl as soon as it is there, with commit, GPU and versions; last comes what was aimed at,
what was measured and whether it was met. FlashInfer and vLLM are timed beside where they can be imported, gpt-fast
where its files are given: `--peers FOLDER` names a folder of checkouts (gpt-fast/, vllm/ ...) to import from. Of
FlashInfer its headers are enough (flashinfer/include/), where there is nvcc; building them takes a minute.
Exit status: 0 all well, 1 a check failed, was interrupted or found no time, 2 no GPU. An aim that was missed is no
failure.
"""

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # before Triton is imported; tests import this file, and have an interpreter
    os.environ["TRITON_INTERPRET"] = "0"

import torch

from benchmarks.decode import speed
from benchmarks.gpu import checks, decode, kernels
from benchmarks.gpu.scale import DRY, FULL, Scale
from benchmarks.gpu.targets import verdicts
from benchmarks.gpu.turns import Turns
from benchmarks.kernels import attention as kernels_attention
from benchmarks.kernels import nf4 as kernels_nf4
from benchmarks.kernels import sampling as kernels_sampling
from benchmarks.kernels import varlen as kernels_varlen
from benchmarks.support.common import RESULTS, ROOT, read, record, show

OUTPUT = RESULTS / "gpu_check.jsonl"
MINUTES = (3, 6, 9)
GRACE = 20  # seconds of the last minute in which sections are stopped and the aims are told


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Args:
        run: of a `Scale`; yields failures (None for a case that is well) or rows.
        seconds: for which it may have the device alone, or a check may run.
        minutes: the smallest size of the whole check that has it. cuda: whether there is nothing to run on a CPU.
    """

    run: Callable
    seconds: float
    minutes: int
    cuda: bool = False

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.run.__name__

    @property
    def is_check(self) -> bool:
        """Whether it can fail."""
        return self.run.__module__ == checks.__name__


# In the order in which they start: first what the clock has cut off before, then what takes longest to warm up.
SECTIONS = [
    Section(checks.recorded_steps, 150, 3),
    Section(checks.fused_layers, 150, 3),
    Section(checks.recorded_rules, 60, 6),
    Section(decode.contexts, 15, 6),
    Section(checks.compiled_steps, 90, 6),
    Section(decode.large_steps, 40, 3),
    Section(decode.many_rows, 30, 3),
    Section(decode.small_steps, 25, 3),
    Section(decode.first_tokens, 10, 3),
    Section(kernels.sampling_timings, 20, 3),
    Section(kernels.few_row_timings, 15, 3),
    Section(checks.silent_steps, 30, 3),
    Section(checks.full_size_tokens, 60, 3, cuda=True),
    Section(decode.large_rivals, 40, 6),
    Section(decode.small_rivals, 25, 6),
    Section(decode.dependent_launches, 20, 6),
    Section(decode.gpt_fast, 20, 6, cuda=True),
    Section(kernels.attention_timings, 12, 6),
    Section(kernels.varlen_timings, 15, 6, cuda=True),
    Section(kernels.nf4_timings, 12, 6),
    Section(checks.kernel_values, 240, 6, cuda=True),
    Section(checks.attention_values, 60, 6, cuda=True),
    Section(checks.shuffled_rows, 30, 6, cuda=True),
    Section(checks.graph_replay, 20, 6, cuda=True),
    Section(checks.nf4_values, 20, 6, cuda=True),
    Section(checks.few_row_values, 40, 6, cuda=True),
    Section(decode.many_rows_rivals, 40, 9),
    Section(kernels.sampling_peers, 40, 9),
    Section(decode.four_bits, 25, 9),
    Section(decode.waits_of_replacement, 5, 9),
    Section(checks.tensor_parallel, 120, 9, cuda=True),
    Section(checks.memory_faults, 240, 9, cuda=True),
]


@functools.cache
def driver() -> str | None:
    """GPU name and driver version as nvidia-smi tells them, or None."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_check(section: Section, scale: Scale, turns: Turns, output: Path) -> bool:
    """Run a check until it is done or its time is up, and keep its row; whether all is well."""
    started, waited, failures, cases, done, skipped = time.monotonic(), turns.waited_for, [], 0, False, {}
    try:
        for found in section.run(scale):
            cases += 1
            if isinstance(found, checks.Skipped):
                skipped = {"skipped": str(found)}
                continue
            failures += [] if found is None else [found]
            turns.let_others()
            if time.monotonic() - started - (turns.waited_for - waited) > section.seconds:
                break
        else:
            done = True
    except Exception as error:  # noqa: BLE001 - what is broken is a failure, and has its row
        failures.append(f"{type(error).__name__}: {error}")
        done = True
    seconds = time.monotonic() - started
    row = {
        "check": section.name,
        "failures": failures[:20],
        "failed": len(failures),
        "complete": done,
    } | skipped
    record([row | {"seconds": round(seconds, 1), "driver": driver()}], output)
    word = "FAILED" if failures else "SHORT" if not done else "SKIPPED" if skipped else "ok"
    print(f"{word:8}{section.name} ({seconds:.1f} s{'' if done else f', cut off after {cases}'})")
    for text in (*skipped.values(), *failures[:20]):
        print(f"       {text[:300]}")
    return done and not failures


def run_timing(section: Section, scale: Scale, turns: Turns, output: Path) -> None:
    """Run a timing until it is done or its time is up; every row is kept as soon as it is there."""
    started, rows, note = time.monotonic(), 0, ""
    try:
        for row in section.run(scale):
            record([row | {"section": section.name, "driver": driver()}], output)
            rows += 1
            if turns.alone_for > section.seconds:
                note = ", cut off: its time is up"
                break
    except Exception as error:  # noqa: BLE001 - its rows so far are kept, and the others run
        note = f", BROKEN: {type(error).__name__}: {str(error)[:300]}"
    seconds = time.monotonic() - started
    print(
        f"       {section.name}: {rows} rows ({seconds:.1f} s, {turns.alone_for:.1f} alone{note})", flush=True
    )


def run_section(section: Section, scale: Scale, lock: Path, output: Path) -> bool:
    """Run one section in this process; whether nothing failed."""
    turns = Turns(lock)
    with turns.shared():
        if section.is_check:
            return run_check(section, scale, turns, output)
        run_timing(section, replace(scale, alone=turns.alone), turns, output)
    return True


class Children:
    """The processes of the sections; those that still run are ended together."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock, self._ended = threading.Lock(), False

    def run(self, command: list[str]) -> tuple[int | None, str]:
        """Exit status and output of a process; None where it was ended or never started."""
        with self._lock:
            if self._ended:
                return None, ""
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self._running.add(child)
        text, _ = child.communicate()
        with self._lock:
            self._running.discard(child)
            return (None if self._ended else child.returncode), text

    def end(self) -> None:
        """End every process and what it started; no further one starts."""
        with self._lock:
            self._ended = True
            for child in self._running:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(child.pid, signal.SIGKILL)


def run(
    sections: list[Section], options: list[str], seconds: float, jobs: int, output: Path
) -> tuple[bool, list]:
    """Run sections in processes of their own until all are done or the time is up.

    Args:
        options: more of the children's command line. jobs: processes at once.

    Returns:
        Whether all checks are well, and all rows.
    """
    before, well, children = len(read(output)) if output.exists() else 0, True, Children()
    alarm = threading.Timer(seconds, children.end)
    alarm.start()
    with tempfile.TemporaryDirectory() as folder:

        def one(section: Section) -> bool:
            command = [sys.executable, "-m", "benchmarks.gpu", "--section", section.name]
            command += ["--lock", f"{folder}/turns", "--output", str(output.resolve()), *options]
            status, text = children.run(command)
            if status is None:
                text += f"       {section.name}: time is up; what is missing was not measured\n"
            elif status not in (0, 1):
                text = f"BROKEN {section.name}: exit status {status}\n{text[-1500:]}\n"
            print(text, end="", flush=True)
            return status == 0 or (status is None and not section.is_check)

        pool = ThreadPoolExecutor(jobs)
        try:
            well = all(list(pool.map(one, sections)))
        except KeyboardInterrupt:
            print(f"interrupted; finished rows are in {output}")
            well = False
        finally:
            alarm.cancel()
            children.end()
            pool.shutdown()
    return well, read(output)[before:] if output.exists() else []


def tell(rows: list[dict], output: Path) -> None:
    """The tables, and what was aimed at beside what was measured."""
    decoded = [row for row in rows if row.get("benchmark", "").startswith("decode/")]
    show(
        "decoding, random weights at real shapes",
        {"model": "model", "mode": "mode", **speed.COLUMNS},
        decoded,
    )
    modules = (
        ("sampling", kernels_sampling), ("attention", kernels_attention), ("varlen", kernels_varlen),
        ("nf4", kernels_nf4),
    )  # fmt: skip
    for name, module in modules:
        kernel = [row for row in rows if row.get("benchmark") == f"kernels/{name}"]
        show(f"{name}, microseconds of device time a call in a replayed graph", module.COLUMNS, kernel)
    profiled = {"model": "model", "kernel": "kernel", "calls_per_step": "calls", "us_per_step": "us a step"}
    show("a greedy step by kernel", profiled, [row for row in rows if row.get("benchmark") == "gpu/profile"])
    figures = [row for row in rows if "figure" in row]
    show("figures", {"figure": "figure", "value": "value", "greedy_ms": "greedy ms"}, figures)
    aims = verdicts(rows)
    record([aim | {"driver": driver()} for aim in aims], output)
    show("aims", {"target": "target", "wanted": "wanted", "measured": "measured", "met": "met"}, aims)


def chosen(
    names: list[str] | None, checks_only: bool, minutes: int = 9, on_cuda: bool = True
) -> list[Section]:
    """The sections that were asked for."""
    known = {s.name: s for s in SECTIONS if on_cuda or not s.cuda}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: expected {', '.join(known)}")
    kept = [known[name] for name in names] if names else [s for s in known.values() if s.minutes <= minutes]
    return [s for s in kept if s.is_check or not checks_only]


def main() -> int:
    """Run what the command line asks for; see the module's text."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--minutes", type=int, choices=MINUTES, default=9, help="how long all of it may take")
    parser.add_argument("--checks-only", action="store_true", help="no timings")
    parser.add_argument("--only", action="append", metavar="SECTION", help="this section; may be repeated")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="sections at once"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="rows are appended here")
    parser.add_argument("--peers", type=Path, help="folder with checkouts of gpt-fast, FlashInfer, vLLM")
    parser.add_argument("--dry", action="store_true", help=argparse.SUPPRESS)  # tiny, on a CPU: for the tests
    parser.add_argument("--section", help=argparse.SUPPRESS)  # run it in this process
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("gpu: no CUDA device here; nothing was checked", file=sys.stderr)
        return 2
    scale = replace(DRY if options.dry else FULL, peers=options.peers)
    if options.peers is not None:
        sys.path += [str(folder.resolve()) for folder in sorted(options.peers.iterdir()) if folder.is_dir()]
    if options.section:
        (section,) = chosen([options.section], False, on_cuda=scale.on_cuda)
        return 0 if run_section(section, scale, options.lock, options.output) else 1
    sections = chosen(options.only, options.checks_only, options.minutes, scale.on_cuda)
    passed = ["--dry"] if options.dry else []
    passed += ["--peers", str(options.peers.resolve())] if options.peers else []
    well, rows = run(sections, passed, 60 * options.minutes - GRACE, options.jobs, options.output)
    tell(rows, options.output)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
