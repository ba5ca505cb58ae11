from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

HERE = Path(__file__).parent

DEMO = [
    "accelerate>=1.1",  # transformers reads GGUF files through it
    "filelock>=3.12",
    "gguf>=0.17",
    "platformdirs>=4",
    "rich>=13.8",
    "typer>=0.15",
]
QUANT = [
    "accelerate>=1.1",
    "bitsandbytes>=0.48",
]
GRAMMAR = [
    "llguidance>=1.3",
]
EXPERIMENTS = [
    "matplotlib>=3.9",
    "pyyaml>=6",
    "sacrebleu>=2.4",
]
LM_EVAL = [
    "lm_eval>=0.4.13",
]
RAY = [
    "pandas>=2.2",  # what ray.data sorts and groups with
    "pyarrow>=17",
    "ray>=2.40",
]
MAUVE = [
    "mauve-text>=0.4",
]
SERVE = [
    *DEMO,
    *GRAMMAR,
    "fastapi>=0.115",
    "httptools>=0.6.3",  # uvicorn reads requests with it,
    "prometheus_client>=0.21",
    "uvicorn>=0.32",
    'uvloop>=0.21; sys_platform != "win32"',  # and writes with this, where there are many streams
]
BENCH = [
    "matplotlib>=3.9",
    "psutil>=5.9",
]
DEV = [
    *DEMO,
    *QUANT,
    *GRAMMAR,
    *BENCH,
    *EXPERIMENTS,
    *LM_EVAL,
    *RAY,
    *MAUVE,
    *SERVE,
    "axe-playwright-python>=0.1.4",
    "basedpyright>=1.30",  # pyright in a wheel: PyPI's `pyright` fetches itself from npm
    "build>=1.2",
    "httpx>=0.27",
    "hypothesis>=6.100",
    "logits-processor-zoo>=0.2.1",
    "mypy>=1.15",
    "openai>=1.60",
    "pdoc>=15",
    "peft>=0.18",
    "playwright>=1.49",  # drives a browser that the machine has; none is fetched
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "scipy>=1.11",
    "sentencepiece>=0.2",
    "setuptools>=77",
    "tenacity>=8",  # lm_eval's models for servers
]


class LinkedPath(editable_wheel):
    """An editable installation finds the package on a plain path, which type checkers and editors follow, too.

    Left to itself, setuptools installs an import hook for a package whose folder has another name, which no tool can
    follow. Two links that git ignores give the folders the package's names: what is added to them is there at once.
    """

    LINKS = {".editable/handloom": "../engine", "engine/kernels": "../kernels"}

    def finalize_options(self):
        for link, target in self.LINKS.items():
            (HERE / link).parent.mkdir(exist_ok=True)
            if not (HERE / link).is_symlink():
                (HERE / link).symlink_to(target, target_is_directory=True)
        self.distribution.package_dir = {"": ".editable"}
        super().finalize_options()


def rooms(folder: str) -> list[str]:
    """A folder and the packages below it, as endings of import names; the link in `engine/` is left out."""
    found = find_packages(str(HERE / folder), exclude=["kernels", "kernels.*"])
    return ["", *(f".{name}" for name in sorted(found))]


setup(
    name="handloom",
    version="0.1.0",
    description="A decoding engine for researchers: any Hugging Face LM, a handwritten loop, open kernels",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The import name is `handloom`. Nothing called `engine` or `kernels` may be installed: another
    # distribution owns the top-level name `kernels`, and transformers and bitsandbytes import it.
    package_dir={"handloom": "engine", "handloom.kernels": "kernels"},
    packages=[
        *("handloom" + room for room in rooms("engine")),
        *("handloom.kernels" + room for room in rooms("kernels")),
    ],
    package_data={"handloom": ["py.typed"], "handloom.experiments.analysis": ["page/*"]},
    cmdclass={"editable_wheel": LinkedPath},
    install_requires=[
        "jinja2>=3.1",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "tokenizers>=0.22",
        "torch>=2.9",
        "tqdm>=4.66",
        "transformers>=5.17",
        'triton>=3.6; sys_platform == "linux"',
    ],
    extras_require={
        "demo": DEMO,
        "quant": QUANT,
        "grammar": GRAMMAR,
        "experiments": EXPERIMENTS,
        "lm-eval": LM_EVAL,
        "ray": RAY,
        "mauve": MAUVE,
        "serve": SERVE,
        "bench": BENCH,
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["handloom = handloom.cli:main"],
        "lm_eval.models": ["handloom = handloom.experiments.lm_eval.model:HandloomLM"],
    },
)
