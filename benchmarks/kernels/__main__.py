"""Kernels against what others do, sides in turn in one run; see --help, and `attention --help`, `nf4 --help`."""

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from benchmarks.kernels import attention as kernels_attention
from benchmarks.kernels import nf4 as kernels_nf4
from benchmarks.kernels import rare as kernels_rare
from benchmarks.kernels.sampling import COLUMNS, DTYPES, MODES, ROWS, SIDES, measure
from benchmarks.kernels.timing import CACHES, EAGER, OURS
from benchmarks.support.common import RESULTS, record, show

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Device = Annotated[str, typer.Option(help="cpu or cuda")]
Strings = Annotated[list[str] | None, typer.Option(help="default: all")]
Dtypes = Annotated[list[str] | None, typer.Option(help="fp32 or bf16; default bf16, sampling on a CPU fp32")]
Caches = Annotated[
    list[str] | None, typer.Option(help="warm: calls in a row; cold: caches emptied; default both")
]
Repeats = Annotated[int, typer.Option(min=1, help="most rounds in which the sides take turns")]
Budget = Annotated[
    float,
    typer.Option(
        min=0, help="seconds for the rounds of a cell: fewer rounds, but one at least; 0 is no limit"
    ),
]
Output = Annotated[Path, typer.Option(help="rows are appended here")]
Json = Annotated[bool, typer.Option("--json", help="print JSON lines in place of tables")]
DEFAULT_OUTPUT = RESULTS / "kernels.jsonl"


def chosen(option: str, given: list[str] | None, known: Iterable[str], default: Iterable[str]) -> list[str]:
    """What was asked for, or the default.

    Raises:
        typer.BadParameter: an unknown name.
    """
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"{option} {', '.join(unknown)}: expected {', '.join(known)}")
    return list(given or default)


def sides_of(given: list[str] | None, known: Iterable[str]) -> list[str]:
    """Sides that were asked for; ours, which the others are compared with, is always the first."""
    return [OURS, *(name for name in chosen("--side", given, known, known) if name != OURS)]


def prepare(device: str) -> None:
    """One thread on a CPU.

    Raises:
        typer.BadParameter: there is no such device.
    """
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {device}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: there is no CUDA device here")
    torch.set_num_threads(1)


@torch.no_grad()
def run_cells(cells: Iterable[Callable], columns: dict, asked: list[str] | None, output: Path, as_json: bool):
    """Measure cell after cell; the rows of each are kept and shown as soon as they are there.

    Args:
        asked: sides that were asked for by name; those that took no part are named at the end.
    """
    seen = set()
    for cell in cells:
        rows = record(list(cell()), output)
        seen |= {row["side"].removesuffix(EAGER) for row in rows}
        if as_json:
            for row in rows:
                print(json.dumps(row), flush=True)
        else:
            show("", columns, rows)
    for side in sorted(set(asked or ()) - seen):
        print(f"{side} took no part: it is not installed, or cannot do any of this", file=sys.stderr)


@app.callback(invoke_without_command=True)
def sampling(
    context: typer.Context,
    device: Device = "cpu",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="default 1 8, full 1 8 64 256")] = None,
    vocab: Annotated[
        list[int] | None,
        typer.Option(min=1, help="default 49152 151936, full 32000 128256 151936 262144"),
    ] = None,
    dtype: Dtypes = None,
    mode: Annotated[list[str] | None, typer.Option(help=", ".join(MODES))] = None,
    rows: Annotated[list[str] | None, typer.Option(help=", ".join(ROWS))] = None,
    side: Annotated[list[str] | None, typer.Option(help=", ".join(SIDES))] = None,
    cache: Caches = None,
    matrix: Annotated[
        Literal["small", "full"] | None, typer.Option(help="default sizes; full on CUDA, small on a CPU")
    ] = None,
    repeats: Repeats = 15,
    budget: Budget = 10.0,
    output: Output = DEFAULT_OUTPUT,
    as_json: Json = False,
) -> None:
    """Time sampling: handloom, the transformers chain, plain torch, topk first, FlashInfer and vLLM if installed.

    One thread. With `attention` or `nf4` behind it, time those kernels instead. Exact figures beside the times:
    launches (CUDA), operations of torch and the bytes of their operands, passes over the logits. Ours runs in NumPy
    on a CPU, where nothing of it can be counted.
    """
    if context.invoked_subcommand:
        given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            behind = context.invoked_subcommand
            raise typer.BadParameter(
                f"{', '.join(given)} before {behind}: options of {behind} stand behind it"
            )
        return
    prepare(device)
    full = (matrix or ("full" if device == "cuda" else "small")) == "full"
    kinds = chosen("--rows", rows, ROWS, ROWS)
    modes = chosen("--mode", mode, MODES, MODES)
    dtypes = chosen("--dtype", dtype, DTYPES, ["bf16", "fp32"] if full else ["fp32"])
    caches = chosen("--cache", cache, CACHES, CACHES)
    sides = sides_of(side, SIDES)
    batches = batch or ([1, 8, 64, 256] if full else [1, 8])
    vocabularies = vocab or ([32000, 128256, 151936, 262144] if full else [49152, 151936])
    cells = (
        lambda b=b, v=v, kind=kind, d=d, m=m: measure(
            m, kind, b, v, d, device, sides, repeats, caches, budget
        )
        for b, v, kind, d, m in itertools.product(batches, vocabularies, kinds, dtypes, modes)
    )
    run_cells(cells, COLUMNS, side, output, as_json)


@app.command()
def attention(
    device: Device = "cpu",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="default 1 8 64, on a CPU 1 8")] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="cells of a row; default 256 2048 8192 32768, on a CPU 256 2048"),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="QUERY/KEYxSIZE; default 32/8x64 32/8x128 32/32x128, on a CPU also 9/3x64"),
    ] = None,
    rows: Annotated[list[str] | None, typer.Option(help=", ".join(kernels_attention.ROWS))] = None,
    dtype: Dtypes = None,
    side: Annotated[list[str] | None, typer.Option(help=", ".join(kernels_attention.SIDES))] = None,
    cache: Caches = None,
    repeats: Repeats = 15,
    budget: Budget = 10.0,
    output: Output = DEFAULT_OUTPUT,
    as_json: Json = False,
) -> None:
    """Time one layer's decode attention over a paged cache against torch's over gathered and over dense K/V."""
    prepare(device)
    cpu, module = device == "cpu", kernels_attention
    shapes = [module.parse_heads(text) for text in heads or module.DEFAULT_HEADS[device]]
    kinds = chosen("--rows", rows, module.ROWS, module.ROWS)
    dtypes = chosen("--dtype", dtype, module.DTYPES, ["bf16"])
    caches = chosen("--cache", cache, CACHES, CACHES)
    sides = sides_of(side, module.SIDES)
    contexts = context or ([256, 2048] if cpu else [256, 2048, 8192, 32768])
    grid = itertools.product(shapes, dtypes, batch or ([1, 8] if cpu else [1, 8, 64]), contexts, kinds)
    cells = (
        lambda s=s, d=d, b=b, c=c, kind=kind: module.measure(
            s, kind, b, c, d, device, sides, repeats, caches, budget
        )
        for s, d, b, c, kind in grid
    )
    run_cells(cells, module.COLUMNS, side, output, as_json)


@app.command()
def nf4(
    device: Device = "cpu",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="default 1 4 16 64")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help=f"OUTPUTSxINPUTS, or one of {', '.join(kernels_nf4.LAYERS)}; default: all of these"
        ),
    ] = None,
    dtype: Dtypes = None,
    side: Annotated[list[str] | None, typer.Option(help=", ".join(kernels_nf4.SIDES))] = None,
    cache: Caches = None,
    repeats: Repeats = 15,
    budget: Budget = 10.0,
    output: Output = DEFAULT_OUTPUT,
    as_json: Json = False,
) -> None:
    """Time 4-bit linear layers at a Llama's shapes: ours, bitsandbytes', and the dense layer they stand for."""
    prepare(device)
    module = kernels_nf4
    layers = {name: module.parse_layer(name) for name in layer or module.LAYERS}
    dtypes = chosen("--dtype", dtype, module.DTYPES, ["bf16"])
    caches = chosen("--cache", cache, CACHES, CACHES)
    sides = sides_of(side, module.SIDES)
    grid = itertools.product(layers.items(), dtypes, batch or [1, 4, 16, 64])
    cells = (
        lambda name=name, shape=shape, d=d, b=b: module.measure(
            name, shape, b, d, device, sides, repeats, caches, budget
        )
        for (name, shape), d, b in grid
    )
    run_cells(cells, module.COLUMNS, side, output, as_json)


@app.command()
def rare(
    trials: Annotated[int, typer.Option(min=1, help="draws; a thousand million take minutes")] = 10**9,
) -> None:
    """How often tokens of probability 1e-6, 1e-7 and 3e-8 are drawn, beside what the law expects."""
    found, wanted = kernels_rare.drawn(trials), kernels_rare.expected(trials)
    for share, hits, mean in zip(kernels_rare.PROBABILITIES, found, wanted, strict=True):
        print(f"{share:.0e}: {hits} drawn, {mean:.1f} expected, {(hits - mean) / mean**0.5:+.2f} deviations")


if __name__ == "__main__":
    app()
