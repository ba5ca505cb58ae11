"""What every test session needs: one thread a worker, no hub, kernels without a GPU, SmolLM2 built once."""

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

torch.set_num_threads(1)

settings.register_profile(
    "handloom", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("handloom")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32; the first session that asks fetches and converts it."""
    from handloom import demo

    return demo.prepare()


@pytest.fixture(scope="session")
def smollm2_engine(smollm2):
    """SmolLM2 behind an Engine with its own defaults, float32, CPU; shared, so a test must not change it."""
    from handloom import Engine

    return Engine.from_pretrained(str(smollm2), dtype="float32", device="cpu")
