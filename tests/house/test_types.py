"""What type checkers tell about a user's script: nothing about what is right, and every mistake by its name."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import handloom
from handloom.params.aliases import ALIASES, SPECIAL
from handloom.params.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("user_script.py")
# Pyright reads all of transformers for a minute; nothing of it is in a signature that the script meets.
OPAQUE = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"


def check(arguments, folder: Path) -> str:
    """What a checker prints of the script, as a user has it: in another folder, with this interpreter's packages."""
    (folder / "script.py").write_text(SCRIPT.read_text(encoding="utf-8"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", *arguments, "script.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=os.environ | {"PATH": path}
    )
    return done.stdout + done.stderr


def mistakes(which: int) -> list[tuple[int, str]]:
    """(line, name) of the deliberate mistakes, in the names of mypy (0) or of pyright (1)."""
    lines = SCRIPT.read_text(encoding="utf-8").split("\n")
    return [
        (at, line.split("# expect: ")[1].split()[which])
        for at, line in enumerate(lines, 1)
        if "# expect: " in line
    ]


def found(pattern: str, printed: str) -> list[tuple[int, str]]:
    """(line, name) of the errors that were printed; one that is told twice counts once."""
    return sorted({(int(at), name) for at, name in re.findall(pattern, printed, re.MULTILINE)})


@pytest.mark.slow
def test_mypy_has_nothing_to_say_of_our_rooms_and_finds_the_mistakes_of_a_script(pytestconfig, tmp_path):
    """The rooms that pyproject.toml lists, and then the script: all that it imports is read already."""
    pytest.importorskip("mypy")
    kept = hasattr(pytestconfig, "cache")  # what mypy has read, for the next run
    cache = str(pytestconfig.cache.mkdir("mypy") if kept else tmp_path / "read")
    command = [sys.executable, "-m", "mypy", "--cache-dir", cache]
    path = os.environ | {"MYPYPATH": str(Path(handloom.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=path)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = check(["mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", cache], tmp_path)
    assert found(r"^script\.py:(\d+): error: .*\[([a-z-]+)\]$", printed) == mistakes(0), printed


@pytest.mark.slow
def test_pyright_finds_the_mistakes_of_a_script_and_nothing_else(tmp_path):
    # basedpyright is pyright in a wheel; PyPI's `pyright` fetches itself from npm when it is first called.
    pytest.importorskip("basedpyright")
    (tmp_path / "stubs" / "transformers").mkdir(parents=True)
    (tmp_path / "stubs" / "transformers" / "__init__.pyi").write_text(OPAQUE)
    options = {"typeCheckingMode": "standard", "stubPath": "stubs"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(options))
    printed = check(["basedpyright"], tmp_path)
    assert found(r"script\.py:(\d+):\d+ - error: (?:.|\n  )*?\((report\w+)\)$", printed) == mistakes(1), (
        printed
    )


def test_every_name_of_a_parameter_is_known_to_type_checkers():
    names = {field.name for field in fields(handloom.SamplingParams)}
    assert set(Settings.__annotations__) == names | ALIASES.keys() | SPECIAL
