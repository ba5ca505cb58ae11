"""`python -m docs [FOLDER]`: the guide, and the reference of the public names, as pages in a folder (`site`)."""

import sys
from pathlib import Path

import pdoc

MODULES = ["docs", "!docs.recipes", "!docs.__main__"]
MODULES += [
    "handloom",
    *(f"handloom.{room}" for room in ("processors", "strategies", "laws", "compat", "kernels")),
]

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "site")
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(f"{folder / 'index.html'}")
