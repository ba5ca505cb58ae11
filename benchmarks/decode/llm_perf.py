"""The LLM-Perf protocol, and reports in the form of optimum-benchmark (read back with 0.6.0).

One prompt of 256 random tokens, 64 new ones, greedy, random weights where the model is a shape. Each side answers once
unseen and once as `first_generate`, warms up with ten runs of two tokens, and is then measured at least ten times and
for ten seconds; the sides take turns. Where this differs from optimum-benchmark: moments are taken on the host when it
holds a token, so `prefill` includes drawing the first one; all sides run in one process, so `max_ram` includes what
the others hold; `generate.throughput` counts samples as its unit says, where theirs counts decoded tokens.
"""

import json
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.decode.rivals import side
from benchmarks.decode.sides import Clock, Request, Side, Timeline
from benchmarks.decode.speed import Case, Subject, rates, share, summary
from benchmarks.support.bandwidth import read_bandwidth
from benchmarks.support.common import Progress, cpu_name, git_commit, median_ratio
from benchmarks.support.peak import Peak
from benchmarks.support.shapes import build, config_of

TARGETS = ("load_model", "first_generate", "generate", "prefill", "decode", "per_token")
LIBRARIES = ("optimum-benchmark", "transformers", "accelerate", "diffusers", "optimum", "timm", "peft")
MEGABYTE = 1e6  # theirs too


@dataclass(frozen=True)
class Protocol:
    """Sizes of the run; the defaults are LLM-Perf's.

    Args:
        batch, prompt, new: rows, tokens of a prompt, tokens of an answer, > 1.
        warmup: runs of two tokens that do not count.
        iterations, duration: runs and seconds that each side is measured for at least.
    """

    batch: int = 1
    prompt: int = 256
    new: int = 64
    warmup: int = 10
    iterations: int = 10
    duration: float = 10.0


@dataclass
class Contender:
    """A side and what was measured of it.

    Args:
        loaded, first: seconds to have the model ready, and the first tracked run.
        memory: target -> optimum-benchmark's memory entry.
        runs: one timeline for each measured run.
    """

    side: Side
    loaded: float
    first: float = 0.0
    memory: dict[str, dict] = field(default_factory=dict)
    runs: list[Timeline] = field(default_factory=list)


def latency(values: list[float]) -> dict:
    """Seconds as optimum-benchmark reports them; the deviation is that of the whole population."""
    deviation, mean = float(np.std(values)), float(np.mean(values))
    middle, p90, p95, p99 = (float(p) for p in np.percentile(values, (50, 90, 95, 99)))
    return {
        "unit": "s", "values": list(values), "count": len(values), "total": float(sum(values)), "mean": mean,
        "p50": middle, "p90": p90, "p95": p95, "p99": p99, "stdev": deviation, "stdev_": 100 * deviation / abs(mean),
    }  # fmt: skip


def memory(peak: Peak) -> dict:
    """What a `Peak` saw, as optimum-benchmark reports it: megabytes of 10**6 bytes; None off CUDA."""
    on_device = peak.device.type == "cuda"
    used = None
    if on_device:
        free, total = torch.cuda.mem_get_info(peak.device)
        used = (total - free) / MEGABYTE  # at the end of the run: the allocator keeps what it reserved
    return {
        "unit": "MB",
        "max_ram": peak.resident / MEGABYTE,
        "max_global_vram": used,
        "max_process_vram": None,
        "max_reserved": peak.reserved / MEGABYTE if on_device else None,
        "max_allocated": peak.allocated / MEGABYTE if on_device else None,
    }


def report(protocol: Protocol, contender: Contender) -> dict:
    """A side's measurements as optimum-benchmark's `benchmark_report.json`."""
    runs = contender.runs
    prefill = [max(moments[0] for moments in run.tokens) for run in runs]
    generate = [run.total for run in runs]
    decode = [whole - first for whole, first in zip(generate, prefill, strict=True)]
    values = {
        "load_model": [contender.loaded],
        "first_generate": [contender.first],
        "generate": generate,
        "prefill": prefill,
        "decode": decode,
        "per_token": [float(gap) for run in runs for gap in np.diff(run.tokens[0])],
    }
    volumes = {
        "generate": (protocol.batch, "samples/s"),
        "prefill": (protocol.batch, "samples/s"),
        "decode": (protocol.batch * (protocol.new - 1), "tokens/s"),
    }
    found = {}
    for target in TARGETS:
        entry = dict.fromkeys(("memory", "latency", "throughput", "energy", "efficiency"))
        entry["latency"] = latency(values[target])
        entry["memory"] = contender.memory.get(target)
        if target in volumes:
            volume, unit = volumes[target]
            entry["throughput"] = {"unit": unit, "value": volume / entry["latency"]["mean"]}
        found[target] = entry
    return found


def configuration(protocol: Protocol, subject: Subject, name: str) -> dict:
    """Model, protocol and machine as optimum-benchmark's `benchmark_config.json`."""
    about, random_weights = subject.about(), subject.random_weights
    backend = {
        "name": name, "version": _version("handloom" if name.startswith("handloom") else "transformers"),
        "_target_": "benchmarks.decode.llm_perf.measure", "model": subject.name, "processor": subject.name,
        "task": "text-generation", "library": "transformers", "model_type": subject.model.config.model_type,
        "device": about["device"], "device_ids": "0" if about["device"] == "cuda" else None, "seed": 0,
        "inter_op_num_threads": None, "intra_op_num_threads": torch.get_num_threads(), "model_kwargs": {},
        "processor_kwargs": {}, "no_weights": random_weights, "torch_dtype": about["dtype"],
        "attn_implementation": subject.model.config._attn_implementation, "torch_compile": "compile" in name,
        "quantization_config": {},
    }  # fmt: skip
    scenario = {
        "name": "inference", "_target_": "optimum_benchmark.scenarios.inference.scenario.InferenceScenario",
        "iterations": protocol.iterations, "duration": protocol.duration, "warmup_runs": protocol.warmup,
        "input_shapes": {"batch_size": protocol.batch, "sequence_length": protocol.prompt},
        "new_tokens": None, "memory": True, "latency": True, "energy": False, "forward_kwargs": {},
        "generate_kwargs": {
            "num_return_sequences": 1, "max_new_tokens": protocol.new, "min_new_tokens": protocol.new,
            "do_sample": False, "use_cache": True, "num_beams": 1,
        },
        "call_kwargs": {},
    }  # fmt: skip
    launcher = {
        "name": "inline", "_target_": "optimum_benchmark.launchers.inline.launcher.InlineLauncher",
        "device_isolation": False, "device_isolation_action": None, "numactl": False, "numactl_kwargs": {},
    }  # fmt: skip
    return {
        "name": f"{subject.name}-{name}".replace(" ", "-"), "backend": backend, "scenario": scenario,
        "launcher": launcher, "environment": environment(), "print_report": False, "log_report": True,
    }  # fmt: skip


def environment() -> dict:
    """The machine and the libraries, under optimum-benchmark's names."""
    found = {
        "cpu": cpu_name(), "cpu_count": os.cpu_count(), "cpu_ram_mb": psutil.virtual_memory().total / MEGABYTE,
        "system": platform.system(), "machine": platform.machine(), "platform": platform.platform(),
        "processor": platform.processor(), "python_version": platform.python_version(),
    }  # fmt: skip
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found |= {"gpu": [card.name for card in cards], "gpu_count": len(cards)}
        found["gpu_vram_mb"] = sum(card.total_memory for card in cards) / MEGABYTE
    for library in LIBRARIES:
        name = library.replace("-", "_")
        found |= {f"{name}_version": _version(library), f"{name}_commit": None}
    return found | {"handloom_version": _version("handloom"), "handloom_commit": git_commit()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(protocol: Protocol, subject: Subject, contender: Contender, folder: Path) -> Path:
    """Write `benchmark_report.json`, `benchmark_config.json` and `benchmark.json` (both); the folder they are in."""
    config, found = configuration(protocol, subject, contender.side.name), report(protocol, contender)
    place = folder / config["name"]
    place.mkdir(parents=True, exist_ok=True)
    files = {
        "benchmark_report": found, "benchmark_config": config, "benchmark": {"config": config, "report": found},
    }  # fmt: skip
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return place


def load(name: str, dtype: torch.dtype, device: torch.device, clock: Clock = time.perf_counter):
    """The model, the seconds it took to have it, and its memory entry."""
    start = clock()
    with Peak(device) as peak:
        model = build(name, dtype, device, config_of(name))
    return model, clock() - start, memory(peak)


def measure(
    protocol: Protocol,
    subject: Subject,
    names: list[str],
    loaded: tuple[float, dict],
    folder: Path,
    progress: Progress,
    clock: Clock = time.perf_counter,
) -> Iterator[list[dict]]:
    """Run the protocol, write a report for each side, and yield its row.

    Args:
        loaded: seconds and memory entry of loading the model.
    """
    bandwidth = read_bandwidth(subject.model.device)
    contenders = [enter(protocol, subject, name, loaded, progress, clock) for name in names]
    ours = next((c for c in contenders if c.side.name == "handloom"), None)
    rounds(protocol, subject, contenders, progress, clock)
    bandwidth = max(bandwidth, read_bandwidth(subject.model.device))
    for contender in contenders:
        weigh(protocol, subject, contender, progress)
        place = write(protocol, subject, contender, folder)
        found = summary(contender.runs)
        case = Case(protocol.batch, protocol.prompt, protocol.new)
        about = {"benchmark": "decode/llm-perf", "case": case.name, "side": contender.side.name}
        about |= subject.about() | {"batch": case.batch, "context": case.context, "new_tokens": case.new}
        found |= share(found["tpot_p50_ms"], subject.sized, case, bandwidth)
        if contender is not ours and ours is not None:
            found["ratio"] = median_ratio(rates(ours.runs), rates(contender.runs))
        yield [
            about
            | {"repeats": len(contender.runs), "protocol": asdict(protocol)}
            | found
            | {"report": place.name}
        ]
    for contender in contenders:
        contender.side.close()


def _requests(subject: Subject, protocol: Protocol, turn: int, new: int) -> list[Request]:
    """The same prompts for all sides in one round, others in the next, so that no cache of prompts helps."""
    rng = random.Random(turn)
    return [Request(subject.prompt(rng, protocol.prompt), new) for _ in range(protocol.batch)]


def enter(
    protocol: Protocol,
    subject: Subject,
    name: str,
    loaded: tuple[float, dict],
    progress: Progress,
    clock: Clock,
) -> Contender:
    """A side that is ready to be measured."""
    progress("llm-perf", f"{name} warms up")
    start = clock()
    made = side(name, subject.model, protocol.batch, protocol.prompt + protocol.new)
    contender = Contender(made, loaded[0] + clock() - start, memory={"load_model": loaded[1]})
    made.timeline(_requests(subject, protocol, -1, protocol.new))
    with Peak(subject.model.device) as peak:
        start = clock()
        made.timeline(_requests(subject, protocol, -2, protocol.new))
        contender.first = clock() - start
    contender.memory["first_generate"] = memory(peak)
    for turn in range(protocol.warmup):
        made.timeline(_requests(subject, protocol, -3 - turn, 2))
    return contender


def rounds(
    protocol: Protocol, subject: Subject, contenders: list[Contender], progress: Progress, clock: Clock
) -> None:
    """Measure all sides in turn until each has its iterations and its duration."""
    spent, turn = dict.fromkeys((c.side.name for c in contenders), 0.0), 0
    while turn < protocol.iterations or min(spent.values()) < protocol.duration:
        progress("llm-perf", f"round {turn + 1}, {min(spent.values()):.0f} of {protocol.duration:.0f} s")
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            start = clock()
            contender.runs.append(contender.side.timeline(_requests(subject, protocol, turn, protocol.new)))
            spent[contender.side.name] += clock() - start
        turn += 1


def weigh(protocol: Protocol, subject: Subject, contender: Contender, progress: Progress) -> None:
    """Memory of a prefill and of a whole answer."""
    progress("llm-perf", f"memory of {contender.side.name}")
    for turn, (targets, new) in enumerate(((("prefill",), 1), (("generate", "decode"), protocol.new))):
        with Peak(subject.model.device) as peak:
            contender.side.timeline(_requests(subject, protocol, -1000 - turn, new))
        contender.memory |= dict.fromkeys(targets, memory(peak))
