"""What an installation holds, and that the distribution `kernels` and ours never get in each other's way."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import handloom

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("engine", "kernels", "tests", "benchmarks", "docs", ".ci")


def unwanted(folder, names):
    """What is no source: caches, and the link of an editable installation."""
    links = [name for name in names if Path(folder, name).is_symlink()]
    return [*links, *shutil.ignore_patterns("__pycache__", "*.egg-info")(folder, names)]


BUILD_EDITABLE = (
    "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
)


def python(code, *, cwd, path=(), arguments=()):
    """Run code in a fresh interpreter that finds `path` first; return what it printed."""
    environment = {"PYTHONPATH": ":".join(map(str, path)), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A site folder with a distribution called `kernels`, of the kind that transformers imports."""
    site = tmp_path_factory.mktemp("foreign")
    (site / "kernels" / "layer").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text('__version__ = "0.12.0"\nWHOSE = "theirs"\n')
    (site / "kernels" / "layer" / "__init__.py").write_text('WHOSE = "theirs too"\n')
    (site / "kernels-0.12.0.dist-info").mkdir()
    (site / "kernels-0.12.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.12.0\n")
    return site


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that nothing is built into the working tree."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def built(checkout, foreign, tmp_path_factory):
    """Folder with a source distribution and the wheel made from it, built beside the foreign package."""
    target = tmp_path_factory.mktemp("built")
    code = "import sys; from build.__main__ import main; main(sys.argv[1:])"
    arguments = ["--no-isolation", "--skip-dependency-check", "--outdir", target, "."]
    python(code, cwd=checkout, path=[foreign], arguments=arguments)
    return target


def modules_of_the_checkout():
    """Where an installation has every source file: engine/cli.py -> handloom/cli.py."""
    places = {"engine": "handloom", "kernels": "handloom/kernels"}
    return {
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".typed", ".html", ".css", ".js")
        and not any(parent.is_symlink() for parent in file.parents)
    }


def test_the_wheel_holds_every_module_and_no_other_top_level_name(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "handloom = handloom.cli:main" in archive.read(entry_points).decode()
    info = f"handloom-{handloom.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"handloom", info}
    assert {name for name in names if name.startswith("handloom/")} == modules_of_the_checkout()
    assert f"{info}/licenses/LICENSE" in names


def test_the_source_distribution_holds_what_tests_and_users_need(built, checkout):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "CHANGELOG.md", ".ci/run"} <= names
    wanted = {
        file.relative_to(checkout).as_posix()
        for folder in ("engine", "kernels", "tests", "benchmarks", "docs")
        for file in (checkout / folder).rglob("*.py")
    }
    assert wanted - names == set()


def test_the_demo_extra_brings_what_the_conversion_of_its_model_asks_for(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    demo = {
        re.match(r"Requires-Dist: ([\w.-]+)", line).group(1)
        for line in lines
        if line.startswith("Requires-Dist") and 'extra == "demo"' in line
    }
    # transformers names the last two only when it meets a GGUF file.
    assert {"filelock", "platformdirs", "rich", "typer", "gguf", "accelerate"} <= demo


def test_an_installed_wheel_and_the_foreign_package_live_side_by_side(built, foreign, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import handloom.kernels, kernels, kernels.layer; print(handloom.kernels.__file__, kernels.WHOSE)"
    expected = f"{tmp_path}/handloom/kernels/__init__.py theirs"
    assert python(code, cwd=tmp_path, path=[tmp_path, foreign]) == expected
    assert python(code, cwd=tmp_path, path=[foreign, tmp_path]) == expected


def test_an_editable_installation_is_a_plain_path_on_which_new_files_are_there_at_once(
    checkout, foreign, tmp_path
):
    site = tmp_path / "site"
    wheel = python(BUILD_EDITABLE, cwd=checkout, path=[foreign], arguments=[tmp_path]).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        archive.extractall(site)
    # Not an import hook, which no tool can follow, and nothing of what `rm -rf build` or a new room would break.
    (paths,) = site.glob("*.pth")
    assert (Path(paths.read_text().strip()) / "handloom" / "py.typed").is_file()
    assert list(site.glob("*finder*")) == []
    shutil.rmtree(checkout / "build", ignore_errors=True)
    code = """
import os, site, sys
# forget the installation that the tests run from
sys.path = [folder for folder in sys.path if not os.path.exists(os.path.join(folder, "handloom"))]
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[1])
import handloom.kernels, handloom.processors, handloom.attic, kernels
print(handloom.__file__, handloom.kernels.__file__, kernels.WHOSE)
"""
    attic = checkout / "engine" / "attic"
    attic.mkdir()
    (attic / "__init__.py").write_text("")
    *ours, theirs = python(code, cwd=tmp_path, path=[foreign], arguments=[site]).split()
    shutil.rmtree(attic)
    assert [Path(file).resolve() for file in ours] == [
        checkout / f / "__init__.py" for f in ("engine", "kernels")
    ]
    assert theirs == "theirs"


def test_our_folder_hands_the_name_over_when_the_root_is_on_the_path(foreign):
    code = "import kernels, kernels.layer; print(kernels.WHOSE, kernels.layer.WHOSE, kernels.__version__)"
    assert python(code, cwd=ROOT, path=[foreign]) == "theirs theirs too 0.12.0"
    same = (
        "import kernels, importlib, sys; print(importlib.import_module('kernels') is sys.modules['kernels'])"
    )
    assert python(same, cwd=ROOT, path=[foreign]) == "True"
    ours = "import handloom.kernels.noise.philox as ours, kernels; print(ours.__name__, kernels.WHOSE)"
    assert python(ours, cwd=ROOT, path=[foreign]) == "handloom.kernels.noise.philox theirs"


@pytest.mark.skipif("kernels" in {d.name for d in metadata.distributions()}, reason="`kernels` is installed")
def test_what_wants_the_foreign_package_is_told_that_it_is_absent_and_not_of_our_folder():
    code = """
try:
    from kernels import get_kernel
except ImportError as error:
    print(type(error).__name__, error)
"""
    assert python(code, cwd=ROOT) == "ModuleNotFoundError No module named 'kernels'"


@pytest.mark.skipif("kernels" in {d.name for d in metadata.distributions()}, reason="`kernels` is installed")
def test_our_folder_is_taken_for_nothing_where_there_is_no_foreign_package():
    code = """
import kernels, importlib.util
from transformers.utils import is_kernels_available
print(hasattr(kernels, "__version__"), importlib.util.find_spec("kernels.philox"), is_kernels_available())
"""
    assert python(code, cwd=ROOT) == "False None False"


def test_an_error_inside_the_foreign_package_is_shown_as_it_is(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('theirs is broken')")
    code = """
import sys
try:
    import kernels
except ImportError as error:
    print(error, "kernels" in sys.modules)
"""
    assert python(code, cwd=ROOT, path=[tmp_path]) == "theirs is broken False"


def test_the_engine_folder_refuses_to_be_a_package_of_its_own():
    code = """
try:
    import engine
except ImportError as error:
    print(error)
"""
    assert "Write `import handloom`" in python(code, cwd=ROOT)


def test_every_requirement_has_a_tested_version_within_its_range(built):
    pins = dict(
        re.match(r"([\w.-]+)==(\S+)", line).groups()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pins = {normal(name): Version(version) for name, version in pins.items()}
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"handloom-{handloom.__version__}.dist-info/METADATA").decode()
    required = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", text, flags=re.MULTILINE)]
    assert {normal(requirement.name) for requirement in required} - pins.keys() == set()
    outside = [str(r) for r in required if pins[normal(r.name)] not in r.specifier]
    assert outside == []
    assert set(re.findall(r"^Provides-Extra: ([\w-]+)$", text, flags=re.MULTILINE)) == {
        *("demo", "quant", "grammar", "bench", "experiments", "lm-eval", "ray", "mauve", "serve", "dev")
    }


def normal(name):
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_public_names_are_all_there():
    missing = [name for name in handloom.__all__ if not hasattr(handloom, name)]
    assert missing == []
    assert set(handloom.__all__) == set(handloom._HOME) <= set(dir(handloom))
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        handloom.Enigne  # noqa: B018
