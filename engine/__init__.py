"""handloom: a decoding engine with a handwritten sampling loop.

Public names are imported on first use, so `import handloom` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ == "engine":
    raise ImportError(
        "this folder is the package `handloom`; it is found as `engine` because the repository root is on "
        "sys.path, and two copies of every class would exist. "
        "Write `import handloom` (after `pip install -e .`)."
    )

if TYPE_CHECKING:
    from handloom.engine import Engine
    from handloom.errors import (
        CapabilityError,
        HandloomError,
        ModelError,
        ParameterError,
        PoolExhausted,
        PromptError,
    )
    from handloom.generation import Event, Generation, Timings
    from handloom.joint import join
    from handloom.kernels.draw import draw
    from handloom.params import SamplingParams
    from handloom.pipeline import Context, Edit, Keep, Pipeline, PipelineWarning, Processor
    from handloom.state import State

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "CapabilityError": "errors",
    "Context": "pipeline",
    "Edit": "pipeline",
    "Engine": "engine",
    "Event": "generation",
    "Generation": "generation",
    "HandloomError": "errors",
    "Keep": "pipeline",
    "ModelError": "errors",
    "ParameterError": "errors",
    "Pipeline": "pipeline",
    "PipelineWarning": "pipeline",
    "PoolExhausted": "errors",
    "Processor": "pipeline",
    "PromptError": "errors",
    "SamplingParams": "params",
    "State": "state",
    "Timings": "generation",
    "draw": "kernels.draw",
    "join": "joint",
}
_MODULES = frozenset({"compat", "kernels", "laws", "naive", "processors", "profiles", "strategies"})

__all__ = [
    "CapabilityError",
    "Context",
    "Edit",
    "Engine",
    "Event",
    "Generation",
    "HandloomError",
    "Keep",
    "ModelError",
    "ParameterError",
    "Pipeline",
    "PipelineWarning",
    "PoolExhausted",
    "Processor",
    "PromptError",
    "SamplingParams",
    "State",
    "Timings",
    "draw",
    "join",
]


def __getattr__(name: str):
    """A public name or submodule, imported when first asked for."""
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every public name, imported or not."""
    return sorted({*globals(), *__all__, *_MODULES})
