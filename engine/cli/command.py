"""The command `handloom`: a prompt, a conversation or a file of prompts in; streamed text or JSON lines out.

Exit codes: 0 done; 1 error: a model that does not load, a request that failed; 2 wrong usage: an unknown
option, a value out of range, a prompt that is none; 130 stopped by Ctrl-C, what was finished is kept.
Text and records go to stdout, everything else to stderr.
"""

import functools
import gc
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    raise SystemExit(f'the command line needs {error.name!r}: pip install "handloom[demo]"') from error

import handloom

from ..errors import HandloomError, ParameterError, PromptError
from ..experiments.records import Record, ResultFile, read_records
from ..loading import demo
from . import options, terminal
from .work import Work

if TYPE_CHECKING:
    from ..engine import Engine
    from ..loop.generation import Generation
    from ..params.sampling_params import SamplingParams

FAILED, USAGE, INTERRUPTED = 1, 2, 130
CHAT_HELP = "/reset starts anew, /exit or Ctrl-D ends, Ctrl-C cuts an answer short, /help shows this"


def main() -> None:
    """Run the command `handloom` with the arguments of this process."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(_with_parameters(command))
    app(options.spelled(sys.argv[1:]), prog_name="handloom")


def _with_parameters(function):
    """`function`, which takes **parameters, with the options of all sampling parameters in its signature."""

    @functools.wraps(function)
    def whole(**arguments):
        return function(**arguments)

    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own, *options.signature_parameters()]
    whole.__signature__ = signature.replace(parameters=parameters)
    whole.__annotations__ = {p.name: p.annotation for p in parameters}
    return whole


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to answer, as a user's turn where the model has a chat template (Python's "
            "Engine.generate continues a string as it is: --raw); - or nothing reads stdin."
        ),
    ] = None,
    *,
    chat: Annotated[bool, typer.Option("--chat", "-c", help="Hold a conversation.")] = False,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            help="JSON lines to answer, - for stdin; each has a prompt (a user's turn), text (continued as it "
            "is), messages or token_ids, and perhaps an id and params.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Append the answers to --file here, - for stdout; run again to resume."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, for the chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one JSON line.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id or folder; default $HANDLOOM_MODEL, then a small demo."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (the checkpoint's), fastest, float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="nf4, fp4, int8, nf4-triton, fp4-triton or int8-triton; on a CPU int8-cpu or int4-cpu."
        ),
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Sequences decoded at the same time.")] = None,
    strategy: options.Strategy = None,
    option: options.StrategyOptions = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run a model's code.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    **parameters: Any,
) -> None:
    """Generate text with a language model, one token at a time.

    Exit codes: 0 done, 1 error, 2 wrong usage, 130 stopped by Ctrl-C (what was finished is kept).
    """
    if version:
        _write(f"handloom {handloom.__version__}\n")
        raise typer.Exit
    loading = {
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "quantization": quantization,
        "slots": slots,
        "trust_remote_code": trust_remote_code or None,
    }
    chosen = strategy, tuple(option or ())
    call = Call(model, loading, parameters, system=system, raw=raw, as_json=as_json, strategy=chosen)
    raise typer.Exit(call.guarded(prompt, chat, file, output))


@dataclass
class Call:
    """One call of the command: which model with which parameters, and how the answers are shown.

    Args:
        model: name or path, or None.
        loading: arguments of `Engine.from_pretrained`; None means its default.
        parameters: sampling parameters as the command line gave them.
        system: system prompt, or None. raw: no chat template. as_json: print JSON lines.
        strategy: name of a strategy or None, and its options as name=value.
    """

    model: str | None
    loading: dict[str, Any]
    parameters: dict[str, Any]
    system: str | None = None
    raw: bool = False
    as_json: bool = False
    strategy: tuple[str | None, tuple[str, ...]] = (None, ())

    def __post_init__(self):
        self.note = Console(file=sys.stderr, highlight=False, soft_wrap=True)

    def guarded(self, prompt: str | None, chat: bool, file: str | None, output: Path | None) -> int:
        """Run, with every error as one line on stderr; return the exit code."""
        try:
            return self.run(prompt, chat, file, output)
        except (ParameterError, PromptError) as error:
            return self._fail(error, USAGE)
        except BrokenPipeError:  # the reader of stdout has left; keep Python from complaining at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except (HandloomError, OSError) as error:
            return self._fail(error, FAILED)
        except KeyboardInterrupt:
            self.note.print("stopped", style="dim")
            return INTERRUPTED

    def run(self, prompt: str | None, chat: bool, file: str | None, output: Path | None) -> int:
        """Check the arguments, load the model, and do what was asked for; return the exit code."""
        if chat + (file is not None) + (prompt is not None) > 1:
            raise ParameterError("give one of a prompt, --chat and --file")
        if output is not None and file is None:
            raise ParameterError("--output needs --file; a single answer can be redirected")
        params = options.read_parameters(self.parameters)
        self.events = options.strategy_events(*self.strategy)
        if chat:
            if self.as_json or params.n > 1:
                raise ParameterError("--chat shows one answer at a time: leave out --json and --n")
            return self.converse(self.load(), params)
        if file is None:
            text = _read_prompt(prompt)
            engine = self.load()
            return self.answer(engine, self.ids(engine, "prompt", text), params)[0]
        with ExitStack() as stack:
            lines = sys.stdin if file == "-" else stack.enter_context(open(file, encoding="utf-8"))
            to_file = output is not None and str(output) != "-"
            results = stack.enter_context(ResultFile(output)) if to_file else None
            return self.work_off(read_records(lines), results, params)

    def load(self) -> "Engine":
        """The engine, after the demo model was fetched if no other was named."""
        name = demo.locate(self.model)
        if Path(name).is_dir():  # a download from the hub keeps its bars
            from transformers.utils import logging

            logging.disable_progress_bar()
        with self.note.status(f"loading {name}"), _no_collector():
            given = {key: value for key, value in self.loading.items() if value is not None}
            return handloom.Engine.from_pretrained(name, **given)

    def ids(self, engine: "Engine", kind: str, content: Any) -> list[int]:
        """Token ids of a prompt; text goes through the chat template where there is one, unless `raw`."""
        if kind == "token_ids":
            return content
        if kind == "text":
            return engine.encode(content)
        if kind == "prompt":
            if self.raw or not getattr(engine.tokenizer, "chat_template", None):
                return engine.encode(content)
            content = [{"role": "user", "content": content}]
        opening = [{"role": "system", "content": self.system}] if self.system is not None else []
        return engine.chat_prompt([*opening, *content])

    def answer(self, engine: "Engine", ids: list[int], params: "SamplingParams") -> tuple[int, str]:
        """Generate and show; return the exit code and the text that was shown."""
        streamed = params.n == 1 and not self.as_json
        shown, code = [], 0
        try:
            with closing(self.events(engine, [ids], params)) as events:
                for event in events:
                    if streamed:
                        shown.append(event.text)
                        _write(event.text)
                    if event.generation is not None:
                        code = max(code, FAILED * (event.finish == "error"))
                        self._finished(event.generation, engine, streamed=streamed)
        except KeyboardInterrupt:
            if streamed:
                _write("\n")
            self.note.print("stopped", style="dim")
            code = INTERRUPTED
        return code, "".join(shown)

    def _finished(self, generation: "Generation", engine: "Engine", *, streamed: bool) -> None:
        if self.as_json:
            _write(json.dumps(generation.to_dict(), ensure_ascii=False) + "\n")
            return
        _write("\n" if streamed else f"[{generation.sample}] {generation.text}\n")
        if generation.params is not None and generation.params.logprobs is not None:
            Console(file=sys.stdout, soft_wrap=True).print(
                terminal.probabilities(generation, engine.tokenizer)
            )
        self.note.print(terminal.statistics(generation), style="dim", markup=False)

    def converse(self, engine: "Engine", params: "SamplingParams") -> int:
        """Hold a conversation until the input ends; a line is a turn."""
        interactive = sys.stdin.isatty()
        if interactive:
            self.note.print(CHAT_HELP, style="dim")
        messages, code = [], 0
        while (line := _read_line(self.note if interactive else None)) not in (None, "/exit"):
            if line == "/reset":
                messages = []
            if line == "/help":
                self.note.print(CHAT_HELP, style="dim")
            if line in ("", "/reset", "/help"):
                continue
            turn = [*messages, {"role": "user", "content": line}]
            try:
                code, text = self.answer(engine, self.ids(engine, "messages", turn), params)
            except PromptError as error:  # too long by now: say so, and keep the conversation
                code = self._fail(error, FAILED)
                continue
            messages = [*turn, {"role": "assistant", "content": text}]
            if code == INTERRUPTED and not interactive:
                return code
        return 0 if interactive else code

    def work_off(self, records: list[Record], results: ResultFile | None, params: "SamplingParams") -> int:
        """Answer the records of a file, all at once; what `results` has already is not done again."""
        jobs = [(record, self._own(params, record)) for record in records]
        keys = {record.id: self._key(record, own) for record, own in jobs}
        done = {} if results is None else results.done
        for (name, sample), key in done.items():
            if keys.get(name, key) != key:
                raise ParameterError(
                    f"{results.path} has an answer to {name!r}, sample {sample}, that was made from another "
                    "prompt or with other settings; name another --output"
                )
        pending = [(r, own) for r, own in jobs if any((r.id, s) not in done for s in range(own.n))]
        if not pending:
            self.note.print(f"all {len(records)} records are done", style="dim")
            return 0
        engine = self.load()
        prompts = [self.ids(engine, record.kind, record.content) for record, _ in pending]
        self._begin(engine, params, results)
        with (
            closing(self.events(engine, prompts, [own for _, own in pending])) as events,
            Work(self.note, sum(own.n for _, own in pending), bar=results is not None) as work,
        ):
            for generation in (event.generation for event in events if event.generation is not None):
                record, own = pending[generation.request]
                work.advance(generation)
                if (record.id, generation.sample) not in done:
                    entry = {"id": record.id, "sample": generation.sample, "key": keys[record.id]}
                    entry |= generation.to_dict() | {"params": differing(own, params)}
                    del entry["request"]
                    _store(entry, results)
        return FAILED if work.failed else 0

    def _begin(self, engine: "Engine", params: "SamplingParams", results: ResultFile | None) -> None:
        """The header: what all records have in common, so that each holds only what differs."""
        header = {
            "model": self._model(),
            "revision": self.loading.get("revision"),
            "quantization": self.loading.get("quantization"),
            "dtype": str(engine.dtype).removeprefix("torch."),
            "device": str(engine.device),
            "system": self.system,
            "raw": self.raw,
            "versions": {name: version(name) for name in ("torch", "transformers")}
            | {"handloom": handloom.__version__},
            "params": params.to_dict(),
        }
        if results is None:
            _store({"header": header}, None)
        else:
            results.begin(header)

    def _model(self) -> str:
        return self.model or os.environ.get("HANDLOOM_MODEL") or demo.HUB_ID

    def _own(self, params: "SamplingParams", record: Record) -> "SamplingParams":
        try:
            return params.replace(**record.params)
        except ParameterError as error:
            raise ParameterError(f"record {record.id!r}: {error}") from error

    def _key(self, record: Record, params: "SamplingParams") -> str:
        """Names all that an answer depends on: model, prompt, parameters."""
        loading = {key: self.loading.get(key) for key in ("revision", "dtype", "quantization")}
        facts = [self._model(), loading, self.system, self.raw, record.kind, record.content, params.to_dict()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _fail(self, error: Exception, code: int) -> int:
        self.note.print("error:", style="bold red", end=" ")
        self.note.print(str(error), markup=False)
        return code


@contextmanager
def _no_collector() -> Iterator[None]:
    """No garbage collection meanwhile: it is a fifth of the time that importing transformers takes."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def differing(own: "SamplingParams", common: "SamplingParams") -> dict[str, Any]:
    """The parameters of one record that are not those of all."""
    others = common.to_dict()
    return {name: value for name, value in own.to_dict().items() if value != others[name]}


def _store(entry: dict[str, Any], results: ResultFile | None) -> None:
    if results is None:
        _write(json.dumps(entry, ensure_ascii=False) + "\n")
    else:
        results.write(entry)


def _read_prompt(prompt: str | None) -> str:
    """The prompt itself, or what stdin holds."""
    if prompt not in (None, "-"):
        text = prompt
    elif sys.stdin is None or sys.stdin.isatty():
        raise PromptError('no prompt: handloom "What is the capital of France?" (handloom --help lists all)')
    else:
        text = sys.stdin.read().rstrip("\n")
    if not text:
        raise PromptError("the prompt is empty")
    return text


def _read_line(prompter: Console | None) -> str | None:
    """The next turn of a conversation, None at the end of the input."""
    try:
        return (prompter.input("[bold]>[/bold] ") if prompter else input()).strip()
    except EOFError:
        return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
