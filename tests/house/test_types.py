"""What a type checker tells about a user's script: nothing about what is right, and every mistake by its name."""

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

SCRIPT = Path(__file__).with_name("user_script.py")
ROOT = SCRIPT.resolve().parents[2]


@pytest.mark.slow
def test_a_checker_finds_the_mistakes_of_a_script_and_nothing_else(pytestconfig):
    pytest.importorskip("mypy")
    # Whatever it is that this session imports is checked, be it installed or not.
    package = Path(handloom.__file__).parent
    environment = os.environ | ({} if "build" in package.parts else {"MYPYPATH": str(links(pytestconfig))})
    cache = str(pytestconfig.cache.mkdir("mypy"))
    command = [sys.executable, "-m", "mypy", "--cache-dir", cache, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    found = re.findall(r"user_script\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.M)
    lines = SCRIPT.read_text(encoding="utf-8").split("\n")
    wanted = [(at, line.split("expect: ")[1]) for at, line in enumerate(lines, 1) if "# expect: " in line]
    assert sorted({(int(at), code) for at, code in found}) == wanted, done.stdout + done.stderr


def links(pytestconfig) -> Path:
    """A folder in which a checker finds the package as an installation would lay it out."""
    folder = pytestconfig.cache.mkdir("typed") / "handloom"
    folder.mkdir(exist_ok=True)
    for path in [*(ROOT / "engine").iterdir(), ROOT / "kernels"]:
        link = folder / path.name
        if path.name != "__pycache__" and not (path.name == "kernels" and path.is_symlink()):
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    return folder.parent


def test_every_name_of_a_parameter_is_known_to_type_checkers():
    names = {field.name for field in fields(handloom.SamplingParams)}
    assert set(Settings.__annotations__) == names | ALIASES.keys() | SPECIAL
