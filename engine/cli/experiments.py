"""The commands of experiments: `handloom sweep`, `compare`, `report`, `score`, `check`, `merge`, `export`, `trace`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import HandloomError, ParameterError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
ANY = "any"  # `--ray` without an address
Files = Annotated[list[Path], typer.Argument(help="Results of `handloom sweep`.")]
Metrics = Annotated[
    list[str] | None, typer.Option("--metric", "-m", help="May be repeated; default: the plan's.")
]


@app.command()
def sweep(
    plan: Annotated[Path, typer.Argument(help="YAML: models, prompts, settings, grid, samples, seed.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: the plan's name with .jsonl.")
    ] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be drawn, and stop.")] = False,
    shard: Annotated[str, typer.Option(help="i/n: one of n parts, for job arrays.")] = "0/1",
    gpus: Annotated[str | None, typer.Option(help="0,1,...: a process for each, merged at the end.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]", help="On a Ray cluster; without an address a running one, or a new one."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Engines on the cluster; default: one a GPU.")
    ] = None,
) -> None:
    """Draw every sample of a plan; run again to resume. Exit code 1 if some failed."""
    from ..experiments.plan import Plan
    from ..experiments.run import run

    read, part = Plan.read(plan), _shard(shard)
    output = output or plan.with_suffix(".jsonl")
    if dry_run:
        _describe(read, part, output)
        return
    if gpus is not None and ray is not None:
        raise ParameterError("--gpus spreads a run over this machine, --ray over a cluster; one of them")
    if gpus is not None:
        raise typer.Exit(_spread(plan, output, _devices(gpus), part))
    if workers is not None and ray is None:
        raise ParameterError("--workers is for --ray")
    note = Console(file=sys.stderr, highlight=False)
    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Progress(*columns, console=note, disable=not note.is_terminal)
    with _told(output, note), _where(ray, workers) as draw, shown as bar:
        task = bar.add_task("samples", total=None)

        def progress(done: int, total: int, _: float) -> None:
            bar.update(task, completed=done, total=total)

        failed = run(read, output, shard=part, draw=draw, progress=progress)
    if failed:
        note.print(f"{failed} samples failed; their records say why", style="red")
        raise typer.Exit(1)


def _where(ray: str | None, workers: int | None):
    """Where to draw: None stands for this process."""
    if ray is None:
        return nullcontext()
    from ..experiments.ray import on_ray

    return on_ray(None if ray == ANY else ray, workers)


@contextmanager
def _told(output: Path, note: Console) -> Iterator[None]:
    """The log's lines go to a file beside the results, and to stderr where no bar is shown."""
    log, form = logging.getLogger("handloom"), logging.Formatter("%(asctime)s %(message)s")
    handlers: list[logging.Handler] = [logging.FileHandler(output.with_suffix(".log"), encoding="utf-8")]
    handlers += [] if note.is_terminal else [logging.StreamHandler(sys.stderr)]
    before = log.level
    log.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(form)
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(before)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def _describe(plan, part: tuple[int, int], output: Path) -> None:
    """What would be drawn, how much that is, and how long by the samples that are there."""
    from ..experiments.records import read_results

    console, units = Console(highlight=False), list(plan.units(part))
    most = sum(unit.setting.params.get("max_new_tokens", 256) for unit in units)
    factors = ((plan.models, "models"), (plan.items, "prompts"), (plan.settings, "settings"))
    product = " x ".join([*(f"{len(found)} {name}" for found, name in factors), f"{plan.samples} samples"])
    product += f" x {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else ""
    console.print(f"{product} = {len(plan)} samples, {len(units)} in this shard, at most {most} tokens")
    read = sum(len(str(item.content)) for item in plan.items[part[0] :: part[1]]) * len(plan.models) // 4
    console.print(f"about {read} tokens of prompts (a token for four letters), each prompt once for a model")
    held = read_results([output])[1] if output.exists() else []
    left = len({unit.id for unit in units} - {record["unit_id"] for record in held})
    spent = [t["prefill"] + t["decode"] for record in held if (t := record.get("time"))]
    if spent:
        rows = min(arguments.get("slots", 8) for arguments in plan.models.values())
        seconds = left * sum(spent) / len(spent) / rows
        console.print(
            f"{left} are left of them, about {seconds:.0f} s by the {len(spent)} in {output}", markup=False
        )
    for setting in plan.settings:
        console.print(
            f"  {setting.name}: {setting.strategy or 'sampling'} {dict(setting.values)}", markup=False
        )


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit()):
        raise ParameterError(f"--shard {text!r}: expected i/n, such as 0/4")
    return int(part), int(parts)


def _devices(text: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the devices of `--gpus`: numbers among those that this process sees, or UUIDs."""
    import torch

    names, count = [name.strip() for name in text.split(",")], torch.cuda.device_count()
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    seen = dict(zip(map(str, range(count)), given or map(str, range(count)), strict=False))
    wrong = next((name for name in names if name not in seen and not name.startswith(("GPU-", "MIG-"))), None)
    if wrong is not None or not count:
        there = (
            f"one of {', '.join(seen)}" if seen else "a machine with CUDA; without --gpus a run takes the CPU"
        )
        raise ParameterError(f"--gpus {text!r}: {wrong or names[0]!r} is not there; expected {there}")
    return [seen.get(name, name) for name in names]


def _spread(plan: Path, output: Path, gpus: list[str], shard: tuple[int, int]) -> int:
    """One process a device, each with a part of the shard; what they wrote becomes one file."""
    from ..experiments.records import merge

    parts = [output.with_suffix(f".{place}.jsonl") for place in range(len(gpus))]
    children = []
    for place, (gpu, part) in enumerate(zip(gpus, parts, strict=True)):
        own = f"{shard[0] + place * shard[1]}/{shard[1] * len(gpus)}"
        command = [sys.executable, "-m", "handloom", "sweep", str(plan), "-o", str(part), "--shard", own]
        children.append(subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}))
    codes = [child.wait() for child in children]
    merge([path for path in (output, *parts) if path.exists()], output)
    return max(codes)


@app.command()
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Results, plans, or YAML files with the parameters of one setting each."),
    ],
    *,
    metric: Metrics = None,
    baseline: Annotated[str | None, typer.Option(help="Setting that the others are compared with.")] = None,
    texts: Annotated[int, typer.Option(help="Show so many samples with what differs marked.", min=0)] = 0,
    model: Annotated[str | None, typer.Option(help="For files of settings: hub id, folder or demo.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="For files of settings: as in a plan.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="For files of settings: of each prompt.")] = None,
    seed: Annotated[int | None, typer.Option(help="For files of settings.")] = None,
    chat: Annotated[bool, typer.Option("--chat", "-c", help="Through the chat template.")] = False,
) -> None:
    """Compare settings on the same prompts and noise: paired differences with intervals."""
    from ..experiments.analysis.compare import by_model, compare_records, identity, read_sides

    asked = {"model": model, "prompts": prompts, "samples": samples, "seed": seed, "chat": chat}
    records, metrics = read_sides(files, {name: value for name, value in asked.items() if value})
    records = by_model(records)
    found = compare_records(records, metric or metrics or ["logprob", "tokens"], baseline)
    console = Console(highlight=False, soft_wrap=True)
    console.print(str(found), markup=False)
    for pair in found.pairs:
        shared = [key for key in map(identity, records) if key[0] == pair.name][:texts]
        for setting, prompt, sample in shared:
            console.print(f"\n{setting}, prompt {prompt}, sample {sample}:\n{found.text(setting, prompt, sample)}",
                          markup=False)  # fmt: skip


@app.command()
def report(
    files: Files,
    *,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Where the report goes.")] = Path("report"),
    metric: Metrics = None,
    baseline: Annotated[str | None, typer.Option(help="Setting that the others are compared with.")] = None,
) -> None:
    """Tables, plots and one HTML page of a run."""
    from ..experiments.analysis.report import report as write
    from ..experiments.records import read_results

    header, records = read_results(files)
    for path in write(
        records, folder, metric or header.get("metrics") or ["logprob", "diversity"], header, baseline
    ):
        Console(highlight=False).print(str(path), markup=False)


@app.command()
def score(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="The records with what the model says.")],
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id, folder or demo; default: that of the run.")
    ] = None,
    steps: Annotated[
        bool,
        typer.Option("--steps", help="Entropy, rank and kept set of every token, by the run's own model."),
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", "-c", help="Through the judge's chat template; with --steps as the plan says."
        ),
    ] = False,
) -> None:
    """Ask a model about the samples: a judge for judge_perplexity, or with --steps the one that drew them."""
    from ..experiments.analysis import judged
    from ..experiments.records import read_results, write_results
    from ..experiments.samples import load_engine

    header, records = read_results(files)
    own = header.get("models") or {}
    if model is None and len(own) != 1:
        raise ParameterError(f"--model: the run has {', '.join(own) or 'none'}; name one")
    arguments = next(iter(own.values())) if model is None else {"name_or_path": model}
    engine = load_engine(**{name: value for name, value in arguments.items() if name != "tp"})
    chat = chat or (steps and bool(header.get("chat")))
    made = (judged.with_steps if steps else judged.with_judge)(records, engine, chat=chat)
    write_results(output, header, made)
    Console(highlight=False).print(f"{len(made)} samples in {output}", markup=False)


@app.command()
def check(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="The records with what the tests said.")],
    *,
    execute: Annotated[bool, typer.Option("--execute", help="Run programs that a model wrote.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="For each of them.")] = 10.0,
) -> None:
    """Run the programs of HumanEval's prompts against their tests, in processes with limits: for pass_1 and others."""
    from ..experiments.analysis.checking import checked
    from ..experiments.records import read_results, write_results

    header, records = read_results(files)
    made = checked(records, execute=execute, seconds=seconds)
    write_results(output, header, made)
    passed = sum(record["correct"] for record in made)
    Console(highlight=False).print(f"{passed} of {len(made)} programs pass", markup=False)


@app.command()
def merge(
    files: Files, output: Annotated[Path, typer.Option("--output", "-o", help="The file of all.")]
) -> None:
    """Put the results of shards into one file."""
    from ..experiments.records import merge as join

    Console(highlight=False).print(f"{join(files, output)} samples in {output}", markup=False)


@app.command()
def export(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o")],
    form: Annotated[str, typer.Option(help="parquet, human-eval, alpaca-eval or open-ended.")] = "parquet",
) -> None:
    """Write results in a form that other tools read."""
    from ..experiments.records import export as write
    from ..experiments.records import read_results

    header, records = read_results(files)
    write(records, output, form, header)


@app.command()
def trace(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write .html, .npz or .parquet.")
    ] = None,
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id or folder; default: the demo.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the inspector's page, which opens offline.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", "-c", help="Through the chat template.")] = False,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="name=value; may be repeated.")
    ] = None,
) -> None:
    """Every step's distribution before and after each member of the pipeline, and who removed what."""
    import yaml

    from ..engine import Engine
    from ..experiments.analysis.trace import page
    from ..experiments.analysis.trace import trace as follow
    from ..loading import demo
    from ..params.sampling_params import SamplingParams

    pairs = [text.partition("=") for text in param or []]
    wrong = next((name for name, equals, _ in pairs if not equals), None)
    if wrong is not None:
        raise ParameterError(f"--param {wrong!r}: expected name=value")
    params = SamplingParams(
        **{"max_new_tokens": 64} | {name: yaml.safe_load(value) for name, _, value in pairs}
    )
    engine = Engine.from_pretrained(demo.locate(model))
    found = follow(engine, [{"role": "user", "content": prompt}] if chat else prompt, params)
    Console(highlight=False, soft_wrap=True).print(str(found), markup=False)
    if output is not None:
        found.save(output)
    if html is not None:
        html.write_text(page(found), encoding="utf-8")


COMMANDS = frozenset(command.callback.__name__ for command in app.registered_commands if command.callback)


def main() -> None:
    """Run one of the commands, with every error as one line on stderr."""
    given = sys.argv[1:]
    for place in [at for at, word in enumerate(given) if word == "--ray"]:
        if place + 1 == len(given) or given[place + 1].startswith("-"):
            given.insert(place + 1, ANY)
    try:
        app(given)
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "experiments"
        raise SystemExit(f'this needs {error.name!r}: pip install "handloom[{extra}]"') from error
    except (HandloomError, OSError) as error:
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        raise SystemExit(2 if isinstance(error, ParameterError) else 1) from None
