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
    from .engine import Engine
    from .errors import (
        CapabilityError,
        HandloomError,
        ModelError,
        ParameterError,
        PoolExhausted,
        PromptError,
    )
    from .experiments.analysis.compare import compare
    from .experiments.analysis.trace import trace
    from .kernels.sampling.draw import draw
    from .loop.generation import Event, Generation, Results, Timings
    from .params.sampling_params import SamplingParams
    from .pipeline.pipeline import Context, Edit, Keep, Pipeline, PipelineWarning, Processor
    from .state import State
    from .strategies.kit.joint import join

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "CapabilityError": "errors",
    "Context": "pipeline.pipeline",
    "Edit": "pipeline.pipeline",
    "Engine": "engine",
    "Event": "loop.generation",
    "Generation": "loop.generation",
    "HandloomError": "errors",
    "Keep": "pipeline.pipeline",
    "ModelError": "errors",
    "ParameterError": "errors",
    "Pipeline": "pipeline.pipeline",
    "PipelineWarning": "pipeline.pipeline",
    "PoolExhausted": "errors",
    "Processor": "pipeline.pipeline",
    "PromptError": "errors",
    "Results": "loop.generation",
    "SamplingParams": "params.sampling_params",
    "State": "state",
    "Timings": "loop.generation",
    "compare": "experiments.analysis.compare",
    "draw": "kernels.sampling.draw",
    "join": "strategies.kit.joint",
    "trace": "experiments.analysis.trace",
}
_MODULES = {  # public name -> the module that it is
    "compat": "compat",
    "demo": "loading.demo",
    "kernels": "kernels",
    "laws": "laws",
    "naive": "laws.naive",
    "processors": "processors",
    "profiles": "pipeline.profiles",
    "strategies": "strategies",
}

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
    "Results",
    "SamplingParams",
    "State",
    "Timings",
    "compare",
    "draw",
    "join",
    "trace",
]


def __getattr__(name: str):
    """A public name or submodule, imported when first asked for."""
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{_MODULES[name]}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every public name, imported or not."""
    return sorted({*globals(), *__all__, *_MODULES})
