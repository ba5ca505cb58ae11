"""Imports point one way: kernels, values, model, loop, engine, what is built upon it, benchmarks."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import handloom

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kernels": "handloom.kernels", "engine": "handloom", "benchmarks": "benchmarks"}

# Every room of the package and the files that lie loose, lowest first: a module imports from its own layer and below.
LAYERS = [
    {"errors"},
    {"kernels", "params", "cache"},
    {"text", "pipeline"},
    {"processors", "forward", "loading"},
    {"loop"},
    {"engine", "state"},
    {"strategies", "laws", "compat"},
    {"experiments"},
    {"cli"},
    {"__main__"},
    {"benchmarks"},
]


def module_name(path: Path) -> str:
    """Import name of a file: engine/processors/base.py -> handloom.pipeline.forms."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def layer(module: str) -> int:
    """Number of the layer that a module, or a public name of the package, belongs to."""
    parts = module.split(".")
    noun = parts[0] if parts[0] == "benchmarks" else handloom._HOME.get(parts[1], parts[1]).split(".")[0]
    found = [number for number, nouns in enumerate(LAYERS) if noun in nouns]
    assert found, f"{module}: give it a place in LAYERS"
    return found[0]


def imports(path: Path, *, nested: bool) -> list[str]:
    """What a file imports, `nested` in functions too; blocks for type checkers are left out."""
    module, is_package = module_name(path), path.name == "__init__.py"
    return parse(path.read_text(encoding="utf-8"), module, is_package=is_package, nested=nested)


def parse(code: str, module: str, *, is_package: bool, nested: bool) -> list[str]:
    """As `imports`, for the code of a module; `from a import b` gives a.b, be b a module or an object."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names, waiting = [], [ast.parse(code)]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif nested or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return names


def sources() -> list:
    """Every source file of the project but the tests, as parameters."""
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    ]


@pytest.mark.parametrize("path", sources())
def test_a_module_imports_only_from_its_layer_and_below(path):
    module, found = module_name(path), imports(path, nested=True)
    ours = [name for name in found if name.startswith(("handloom.", "benchmarks."))]
    if module == "handloom":
        assert ours == []  # the package itself imports nothing before it is asked
        return
    assert [name for name in ours if layer(name) > layer(module)] == []
    assert [name for name in found if name.split(".")[0] in {"engine", "kernels", "tests"}] == []


@pytest.mark.parametrize("path", [source for source in sources() if source.id.startswith("kernels/")])
def test_kernels_know_neither_the_engine_nor_its_libraries(path):
    found = imports(path, nested=True)
    ours = [name for name in found if name.split(".")[0] == "handloom"]
    assert [name for name in ours if not name.startswith("handloom.kernels")] == []
    foreign = {"transformers", "tokenizers", "safetensors", "bitsandbytes", "accelerate"}
    assert [name for name in found if name.split(".")[0] in foreign] == []


def test_no_modules_import_each_other():
    modules = {module_name(source.values[0]): source.values[0] for source in sources()}
    graph = {}
    for module, path in modules.items():
        found = imports(path, nested=False)
        owners = {name if name in modules else name.rpartition(".")[0] for name in found}
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
    found = parse(code, "handloom.kernels.draw", is_package=False, nested=True)
    assert sorted(found) == [
        "handloom.kernels.philox",
        "handloom.kernels.philox.gumbel",
        "handloom.kv.BlockPool",
        "handloom.loop",
        "typing.TYPE_CHECKING",
    ]
    top = parse(code, "handloom.kernels.draw", is_package=False, nested=False)
    assert set(found) - set(top) == {"handloom.loop"}
    package = parse("from .base import Rule", "handloom.processors", is_package=True, nested=True)
    assert package == ["handloom.processors.base.Rule"]


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
