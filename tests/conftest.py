"""What every test session needs: one thread a worker, no hub, kernels without a GPU, engines, SmolLM2 built once."""

import gc
import importlib.util
import os
from pathlib import Path

# Workers share the cores, so one thread each; nothing here may ask a hub; where there is no GPU, Triton
# kernels run in its interpreter. Libraries read these variables when they are imported, Triton when a kernel
# is defined.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("triton"):
    import quick_interpreter

    quick_interpreter.install()

torch.set_num_threads(1)

settings.register_profile(
    "handloom", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("handloom")


def pytest_collection_modifyitems(items):
    """The dear ones begin, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What was imported stays: no collection of garbage looks at it again, and every test that leaks nothing asks for
    one. The oldest generation, which takes 0.1 s to look at, is looked at ten times less often than by default."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 100)


def pytest_unconfigure():
    """Libraries that count what is left at the end find nothing."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def model():
    """A random Llama of 101 tokens, none of them special; a test that changes it makes its own."""
    from helpers import tiny_llama

    return tiny_llama()


@pytest.fixture
def engine(model):
    """An engine of three slots without a tokenizer, which must have given every block back."""
    from handloom import Engine

    yield from watched(Engine(model, slots=3))


@pytest.fixture
def texts():
    """An engine of three slots with a tokenizer, which must have given every block back."""
    from helpers import text_engine

    yield from watched(text_engine(slots=3))


@pytest.fixture(params=[False, True], ids=["plain", "graph"])
def either(request, model):
    """`engine`, whose step runs as it is, or as the one device program that a CUDA graph captures."""
    from handloom import Engine

    yield from watched(Engine(model, slots=3, graph=request.param))


@pytest.fixture(params=[False, True], ids=["plain", "graph"])
def either_texts(request):
    """`texts`, whose step runs as it is, or as the one device program that a CUDA graph captures."""
    from helpers import text_engine

    yield from watched(text_engine(slots=3, graph=request.param))


def watched(engine):
    """Hand an engine to a test, and see that nothing leaked."""
    from helpers import assert_nothing_leaked

    yield engine
    assert_nothing_leaked(engine)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32; the first session that asks fetches and converts it."""
    from handloom.loading import demo

    return demo.prepare()


@pytest.fixture(scope="session")
def smollm2_engine(smollm2):
    """SmolLM2 behind an Engine with its own defaults, float32, CPU; shared, so a test must not change it."""
    from handloom import Engine

    return Engine.from_pretrained(str(smollm2), dtype="float32", device="cpu")
