"""The commands of the server: `handloom serve`, and `handloom batch` for OpenAI's batch files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from ..errors import HandloomError, ParameterError

if TYPE_CHECKING:
    from ..engine import Engine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
LOCAL = ("127.0.0.1", "localhost", "::1")
LONGEST = 8192  # tokens of prompt and output together, where nobody says

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub id or folder; default $HANDLOOM_MODEL, then the demo."),
]
Dtype = Annotated[str | None, typer.Option(help="auto, fastest, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")]
Quantization = Annotated[
    str | None, typer.Option(help="nf4, fp4, int8, nf4-triton, int8-triton; on a CPU int8-cpu, int4-cpu.")
]
Slots = Annotated[int, typer.Option(help="Sequences decoded at the same time.", min=1)]
Length = Annotated[
    int | None,
    typer.Option(help=f"Most tokens of prompt and output; default the model's, at most {LONGEST}.", min=2),
]


@app.command()
def serve(
    *,
    model: Model = None,
    name: Annotated[
        str | None, typer.Option(help="Under which clients ask for it; default: the model's.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; one beyond this machine needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="HANDLOOM_API_KEY", help="That clients must bring.", show_envvar=True)
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    slots: Slots = 8,
    max_length: Length = None,
    waiting: Annotated[
        int, typer.Option(help="Samples that may wait for a slot; more get a 429.", min=0)
    ] = 256,
    samples: Annotated[int, typer.Option(help="Most samples of one request.", min=1)] = 128,
    body: Annotated[int, typer.Option(help="Most bytes of a request.", min=1)] = 4 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 600.0,
) -> None:
    """OpenAI's API and the inspector page; SIGTERM ends it when what was taken is answered."""
    import uvicorn

    from ..serve.app import Server
    from ..serve.protocol.reading import Limits

    if host not in LOCAL and not api_key:
        raise ParameterError(f"--host {host} is reached by others: set --api-key, or $HANDLOOM_API_KEY")
    engine, found = _loaded(model, dtype, device, quantization, slots, max_length)
    limits = Limits(body=body, samples=samples, waiting=waiting, seconds=timeout)
    hosts = (*LOCAL, "[::1]") if host in LOCAL else ()
    server = Server(engine, name or found, key=api_key, hosts=hosts, limits=limits)
    config = uvicorn.Config(
        server.app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=int(timeout) + 1
    )
    note = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    shown = f"[{host}]" if ":" in host else host
    note.print(
        f"{name or found}: http://{shown}:{port}/ shows the page, http://{shown}:{port}/v1 answers OpenAI's clients"
    )
    uvicorn.Server(config).run()


@app.command()
def batch(
    source: Annotated[Path, typer.Argument(help="JSON lines of custom_id, method, url and body.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Answers are appended; run again to resume.")
    ],
    *,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    quantization: Quantization = None,
    slots: Slots = 32,
    max_length: Length = None,
) -> None:
    """Answer a batch file of OpenAI's API offline. Exit code 1 if some lines got an error."""
    from ..serve.batch import answer_file

    engine, name = _loaded(model, dtype, device, quantization, slots, max_length)
    note = Console(file=sys.stderr, highlight=False)
    with Progress(console=note, disable=not note.is_terminal) as bar:
        task = bar.add_task("requests", total=None)
        failed = answer_file(
            engine, name, source, output, lambda done, n: bar.update(task, completed=done, total=n)
        )
    if failed:
        note.print(f"{failed} requests got an error; their records say why", style="red")
        raise typer.Exit(1)


def _loaded(
    model: str | None, dtype: str | None, device: str | None, quantization: str | None, slots: int,
    max_length: int | None,
) -> tuple[Engine, str]:  # fmt: skip
    """The engine, and the name of its model."""
    from ..engine import Engine
    from ..loading import demo

    where = demo.locate(model)
    given = {"dtype": dtype, "device": device, "quantization": quantization, "max_length": max_length}
    engine = Engine.from_pretrained(where, slots=slots, **{k: v for k, v in given.items() if v is not None})
    if max_length is None:
        engine.max_length = min(engine.max_length, LONGEST)
    named = model or os.environ.get("HANDLOOM_MODEL")
    return engine, demo.HUB_ID if named is None else Path(named).name if Path(named).exists() else named


COMMANDS = frozenset(command.callback.__name__ for command in app.registered_commands if command.callback)


def main() -> None:
    """Run one of the commands, with every error as one line on stderr."""
    try:
        app()
    except ModuleNotFoundError as error:
        raise SystemExit(f'this needs {error.name!r}: pip install "handloom[serve]"') from error
    except (HandloomError, OSError) as error:
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        raise SystemExit(2 if isinstance(error, ParameterError) else 1) from None
