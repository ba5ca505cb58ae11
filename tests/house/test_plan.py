"""The plan of the house: its rooms and their sizes, the way in which imports point, and the README's picture of it."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import handloom

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kernels": "handloom.kernels", "engine": "handloom", "benchmarks": "benchmarks"}
ROOMS = 12  # most rooms of the engine: as many as one can draw from memory
FILES = 8  # most files of a room, `__init__` and `__main__` not counted
LINES = {
    "engine": 420,
    "kernels": 420,
    "benchmarks": 470,
    "tests": 600,
}  # most lines of a file; tests hold tables

# Every room of the package and the files that lie loose, lowest first: a module imports from its own layer and below.
LAYERS = [
    {"errors"},
    {"kernels", "params", "cache"},
    {"text", "pipeline"},
    {"processors", "forward", "loading"},
    {"loop"},
    {"engine", "stepping", "running", "state"},
    {"strategies", "laws", "compat"},
    {"experiments"},
    {"serve", "cli"},
    {"__main__"},
    {"benchmarks"},
]


def sources(*folders: str) -> list[Path]:
    """Every source file of these folders of the project; the link of an editable installation is left out."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not any(parent.is_symlink() for parent in path.parents)]


def rooms(*folders: str) -> list[Path]:
    """Every folder with source files, but those at the top."""
    found = {path.parent for path in sources(*folders)} - {ROOT / folder for folder in folders}
    return sorted(found)


def named(paths) -> list:
    """Paths as parameters of a test."""
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


# -- rooms


def test_the_engine_has_few_rooms():
    found = {room.relative_to(ROOT / "engine").parts[0] for room in rooms("engine")}
    assert len(found) <= ROOMS
    assert found <= set().union(*LAYERS)


@pytest.mark.parametrize("room", named(rooms(*FOLDERS)))
def test_a_room_says_in_a_sentence_what_it_is(room):
    sentence = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert re.match(rf"{room.name}: [^\n]+\.(\n|$)", sentence)


@pytest.mark.parametrize("room", named(rooms(*FOLDERS, "tests")))
def test_a_room_has_at_most_eight_files(room):
    files = {path.name for path in room.glob("*.py")} - {"__init__.py", "__main__.py", "conftest.py"}
    assert len(files) <= FILES, f"{sorted(files)}: find the second noun among them, and give it a room"


@pytest.mark.parametrize("folder", LINES)
def test_a_file_is_no_longer_than_one_reads_at_a_time(folder):
    sizes = {str(path.relative_to(ROOT)): path.read_bytes().count(b"\n") for path in sources(folder)}
    assert {name: size for name, size in sizes.items() if size > LINES[folder]} == {}


# -- imports


def module_name(path: Path) -> str:
    """Import name of a file: engine/pipeline/forms/edit.py -> handloom.pipeline.forms.edit."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def layer(module: str) -> int:
    """Number of the layer that a module, or a public name of the package, belongs to."""
    parts = module.split(".")
    noun = parts[0] if parts[0] == "benchmarks" else handloom._HOME.get(parts[1], parts[1]).split(".")[0]
    found = [number for number, nouns in enumerate(LAYERS) if noun in nouns]
    assert found, f"{module}: give it a place in LAYERS"
    return found[0]


def imports(path: Path) -> list[str]:
    """What a file imports, in functions too; blocks for type checkers are left out."""
    code, is_package = path.read_text(encoding="utf-8"), path.name == "__init__.py"
    return [name for _, name in parse(code, module_name(path), is_package=is_package)]


def parse(code: str, module: str, *, is_package: bool) -> list[tuple[int, str]]:
    """(level, name) of every import; `from a import b` gives a.b, be b a module or an object."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names, waiting = [], [ast.parse(code)]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Import):
            names += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [(node.level, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("path", named(sources(*FOLDERS)))
def test_a_module_imports_only_from_its_layer_and_below(path):
    module, found = module_name(path), imports(path)
    ours = [name for name in found if name.startswith(("handloom.", "benchmarks."))]
    if module == "handloom":
        assert ours == []  # the package itself imports nothing before it is asked
        return
    assert [name for name in ours if layer(name) > layer(module)] == []
    assert [name for name in found if name.split(".")[0] in {"engine", "kernels", "tests"}] == []


@pytest.mark.parametrize("path", named(sources("engine", "kernels")))
def test_the_package_imports_itself_relatively(path):
    code, is_package = path.read_text(encoding="utf-8"), path.name == "__init__.py"
    found = parse(code, module_name(path), is_package=is_package)
    assert [name for level, name in found if not level and name.startswith("handloom.")] == []


@pytest.mark.parametrize("path", named(sources("kernels")))
def test_kernels_know_neither_the_engine_nor_its_libraries(path):
    found = imports(path)
    ours = [name for name in found if name.split(".")[0] == "handloom"]
    assert [name for name in ours if not name.startswith("handloom.kernels")] == []
    foreign = {"transformers", "tokenizers", "safetensors", "bitsandbytes", "accelerate"}
    assert [name for name in found if name.split(".")[0] in foreign] == []


def test_no_modules_import_each_other():
    modules = {module_name(path): path for path in sources(*FOLDERS)}
    graph = {}
    for module, path in modules.items():
        owners = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = {owner for owner in owners & modules.keys() if owner != module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_the_parser_sees_relative_nested_and_typing_imports():
    code = """
from typing import TYPE_CHECKING
from . import philox
from .philox import gumbel
from ..kv import BlockPool
if TYPE_CHECKING:
    from handloom.engine import Engine
def f():
    import handloom.loop
"""
    assert sorted(parse(code, "handloom.kernels.draw", is_package=False)) == [
        (0, "handloom.loop"),
        (0, "typing.TYPE_CHECKING"),
        (1, "handloom.kernels.philox"),
        (1, "handloom.kernels.philox.gumbel"),
        (2, "handloom.kv.BlockPool"),
    ]
    package = parse("from .base import Rule", "handloom.processors", is_package=True)
    assert package == [(1, "handloom.processors.base.Rule")]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import handloom", {"torch", "transformers", "triton", "numpy"}),
        ("import handloom.kernels", {"torch", "transformers", "triton"}),
        ("import handloom.kernels.sampling.draw", {"transformers", "triton"}),
        ("from handloom import SamplingParams", {"torch", "transformers", "triton"}),
        ("import handloom.cli", {"torch", "transformers"}),
    ],
)
def test_importing_stays_lean(statement, absent):
    code = f"import sys; {statement}; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# -- the README's picture


def picture() -> dict[str, dict[str, str]]:
    """The README's tree: {top folder: {entry: what is said of it}}, "" for what is said of the folder itself."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    tree: dict[str, dict[str, str]] = {}
    for line in text.strip("\n").split("\n"):
        indent, words = len(line) - len(line.lstrip()), line.split(maxsplit=1)
        if indent == 0:
            entries, entry = tree.setdefault(words[0].rstrip("/"), {}), ""
            entries[entry] = words[1]
        elif indent == 2:
            entry = words[0].rstrip("/")
            entries[entry] = words[1]
        else:
            entries[entry] += " " + line.strip()
    return tree


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_readme_draws_the_house_as_it_is(folder):
    tree, here = picture()[folder], ROOT / folder
    there = [room.relative_to(here) for room in rooms(folder)]
    assert {entry for entry in tree if entry and not entry.endswith(".py")} == {
        room.parts[0] for room in there
    }
    for entry, text in tree.items():
        if entry.endswith(".py"):
            assert (here / entry).is_file()
        elif entry:
            inside = {room.name for room in there if room.parts[0] == entry and len(room.parts) > 1}
            assert set(re.findall(r"\b(\w+)/", text)) == inside, f"rooms named in {folder}/{entry}"
            files = {path.name for path in (here / entry).rglob("*.py")}
            assert set(re.findall(r"\b\w+\.py\b", text)) <= files


def test_the_tests_have_the_rooms_of_what_they_test():
    own = set(re.findall(r"\b(\w+)/", picture()["tests"][""]))
    tested = {room.name for room in rooms(*FOLDERS)} | {*FOLDERS, "docs"}
    assert {room.relative_to(ROOT / "tests").parts[0] for room in rooms("tests")} <= tested | own
