"""Who draws: an engine in this process, or processes of which each holds a slice of a model larger than a device."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from ..engine import Engine
from ..errors import HandloomError, ParameterError
from ..loop.generation import Generation
from .plan import Plan, Unit
from .samples import header_of, load_engine, outcomes

ROUNDS = 4  # units for each slot that are handed over at once
LATE = 60.0  # seconds for which the other ranks may go on when one has failed
Outcome = tuple[Unit, Generation | HandloomError]


class Drawer(Protocol):
    """Draws units of one model. `slots`: samples that run together."""

    slots: int

    def header(self, plan: Plan, model: str) -> dict[str, Any]:
        """What all records have in common."""

    def outcomes(self, units: Sequence[Unit], chat: bool) -> Iterator[Outcome]:
        """The samples of units, an error where one failed."""

    def close(self) -> None:
        """Let the model go."""


def drawer_of(arguments: Mapping[str, Any], load: Callable[..., Engine] = load_engine) -> Drawer:
    """What draws with a model.

    Args:
        arguments: of `load`. `tp`, at least 1: processes among which the tensor-parallel plan of its class divides the
            model, each with a device of its own where there are some.
    """
    own = dict(arguments)
    size = own.pop("tp", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ParameterError(f"tp={size!r} must be a whole number of processes, at least 1")
    devices = torch.cuda.device_count()
    if size > 1 and 0 < devices < size:
        raise ParameterError(f"tp={size}: a process needs a device of its own, and this one sees {devices}")
    return Alone(load(**own)) if size == 1 else Ranks(own, size)


class Alone:
    """An engine in this process."""

    def __init__(self, engine: Engine):
        self.engine, self.slots = engine, engine.slots

    def header(self, plan: Plan, model: str) -> dict[str, Any]:
        """What all records have in common."""
        return header_of(plan, self.engine, model)

    def outcomes(self, units: Sequence[Unit], chat: bool) -> Iterator[Outcome]:
        """The samples, as they finish."""
        return outcomes(self.engine, units, chat)

    def close(self) -> None:
        """Nothing is held beside the engine."""


class Ranks:
    """Processes that split a model by `tp_plan="auto"`; each takes every call, the first one's answer counts.

    They talk over NCCL on GPUs and over gloo elsewhere, and end with this process.

    Args:
        arguments: of `Engine.from_pretrained`. size: how many, at least 2.

    Raises:
        HandloomError: one of them could not load the model, or is gone.
    """

    def __init__(self, arguments: Mapping[str, Any], size: int):
        self._meeting = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen] = []
        for rank in range(size):
            mine, theirs = Pipe()
            self._processes.append(_start(theirs.fileno(), rank, size))
            theirs.close()
            self._pipes.append(mine)
        meeting = f"file://{Path(self._meeting.name) / 'ranks'}"
        self.slots: int = self.call(join, meeting, dict(arguments))

    def call(self, function: Callable, *arguments: Any) -> Any:
        """What `function(engine, *arguments)` returns on the first rank, once all have run it.

        Args:
            function: of a module, as it is sent by name.
        """
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a rank that is gone is found below
                pipe.send((function, arguments))
        answers: dict[Connection, tuple[bool, Any]] = {}
        while missing := [pipe for pipe in self._pipes if pipe not in answers]:
            failed = any(not well for well, _ in answers.values())
            ready = wait(missing, LATE if failed else None)
            for pipe in [pipe for pipe in missing if pipe in ready]:
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    answers[pipe] = False, "the process is gone"
            if not ready:
                break
        wrong = [
            f"rank {i}: {answers[p][1]}" for i, p in enumerate(self._pipes) if not answers.get(p, (True,))[0]
        ]
        if wrong:
            self.close()
            raise HandloomError("; ".join(wrong))
        return answers[self._pipes[0]][1]

    def header(self, plan: Plan, model: str) -> dict[str, Any]:
        """What all records have in common."""
        return self.call(_header, plan, model)

    def outcomes(self, units: Sequence[Unit], chat: bool) -> Iterator[Outcome]:
        """The samples of a few rounds at a time."""
        units = list(units)
        for start in range(0, len(units), ROUNDS * self.slots):
            part = units[start : start + ROUNDS * self.slots]
            yield from zip(part, self.call(_outcomes, part, chat), strict=True)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._meeting.cleanup()


def _start(pipe: int, rank: int, size: int) -> subprocess.Popen:
    """One rank, told where it stands as torchrun does; `multiprocessing` would import the user's script anew."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    place = dict(zip(names, map(str, (rank, rank, size, size)), strict=True))
    command = [sys.executable, "-c", f"from {__name__} import serve; serve({pipe})"]
    return subprocess.Popen(command, env=os.environ | place, pass_fds=[pipe], stdin=subprocess.DEVNULL)


def serve(number: int) -> None:
    """What a rank does: answer until the other end of the pipe with this number is closed."""
    pipe, engine = Connection(number), None
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, given = pipe.recv()
            try:
                made = function(engine, *given)
                if function is join:
                    engine, made = made, made.slots
            except Exception as error:  # noqa: BLE001 - it is raised where the call came from
                pipe.send((False, f"{type(error).__name__}: {error}"))
            else:
                pipe.send((True, made if os.environ["RANK"] == "0" else None))
    os._exit(0)  # without a farewell to the others, who may be gone


def join(_: None, meeting: str, arguments: dict[str, Any]) -> Engine:
    """The engine of this rank, once all have met at a file."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=size)
    return load_engine(**arguments, tp_plan="auto")


def _header(engine: Engine, plan: Plan, model: str) -> dict[str, Any]:
    return header_of(plan, engine, model)


def _outcomes(engine: Engine, units: Sequence[Unit], chat: bool) -> list[Generation | HandloomError]:
    found = {unit.id: outcome for unit, outcome in outcomes(engine, units, chat)}
    return [found[unit.id] for unit in units]
