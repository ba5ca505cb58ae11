"""Programs that a model wrote, run against their tests: HumanEval's check in processes with limits."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...errors import ParameterError

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
SAID = "every test passed"
# Limits come first, as nothing that runs later can raise them; the verdict goes where the program's prints do not.
CHILD = """
import os, resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
for name, most in (("CPU", seconds), ("AS", memory), ("FSIZE", 1 << 20), ("NOFILE", 64), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
source, verdict = sys.stdin.read(), os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stdin = open(os.devnull)
exec(compile(source, "program", "exec"), {"__name__": "program"})
os.write(verdict, b"every test passed")
"""


def program(record: Mapping[str, Any]) -> str:
    """What is run: the prompt and what continues it, or a block of code that defines the function anew, and the tests.

    Args:
        record: of a HumanEval prompt, whose `task` has `test` and `entry_point`.

    Raises:
        ParameterError: it has not.
    """
    task = record.get("task") or {}
    if not {"test", "entry_point"} <= set(task):
        raise ParameterError(
            f"prompt {record.get('prompt_id')!r} has no tests: its row needs the fields test and entry_point"
        )
    text, prompt = record["text"], record["prompt"]
    block = FENCE.search(text)
    code = block.group(1) if block else text
    if re.search(rf"^\s*def {re.escape(task['entry_point'])}\b", code, re.M):
        imports = re.findall(r"^(?:from|import) .*$", prompt, re.M) if isinstance(prompt, str) else []
        code = "\n".join([*imports, code])
    elif isinstance(prompt, str):
        code = prompt + code
    return f"{code}\n\n{task['test']}\n\ncheck({task['entry_point']})\n"


def verdict(source: str, *, seconds: float = 10.0, memory: int = 4 << 30) -> str:
    """`passed`, `timed out`, or the last line of what went wrong, of a program in a process of its own.

    It runs in an empty folder without the environment, with limits on time, memory, files and their size. That keeps
    accidents small; it is no sandbox against a program that means harm.

    Args:
        source: Python. seconds: of wall time and of the processor, > 0. memory: bytes of address space.
    """
    command = [sys.executable, "-I", "-c", CHILD, str(max(1, round(seconds))), str(memory)]
    with tempfile.TemporaryDirectory() as folder:
        pipe = subprocess.PIPE
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            text=True,
            start_new_session=True,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
        )
        try:
            said, wrong = child.communicate(source, timeout=seconds)
        except subprocess.TimeoutExpired:
            said = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what it may have started
        if said is None:
            child.communicate()
            return "timed out"
    if said == SAID and child.returncode == 0:
        return "passed"
    lines = wrong.strip().splitlines()
    return lines[-1][:200] if lines else f"ended early (exit status {child.returncode})"


def checked(
    records: Sequence[Mapping[str, Any]],
    *,
    execute: bool = False,
    seconds: float = 10.0,
    memory: int = 4 << 30,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Records with `correct`, whether their program passes its tests, and `check`, what happened; `pass_1` reads it.

    Args:
        records: of HumanEval's prompts, or of any rows with `test` and `entry_point`.
        execute: must be true: programs that a model wrote are run on this machine.
        seconds, memory: limits of each, see `verdict`. workers: processes at once; None is the machine's processors.

    Raises:
        ParameterError: `execute` is not true, or a record has no tests.
    """
    if not execute:
        raise ParameterError(
            "this runs programs that a model wrote; execute=True (--execute) if that may happen here"
        )
    sources = [program(record) for record in records]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = list(pool.map(lambda source: verdict(source, seconds=seconds, memory=memory), sources))
    return [
        {**record, "correct": said == "passed", "check": said}
        for record, said in zip(records, found, strict=True)
    ]
