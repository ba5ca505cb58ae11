"""Several processes that decode as one: tensor parallelism by transformers' own plans, started with torchrun.

Every rank runs the same loop. Logits are gathered to all ranks and noise depends on (seed, position, token id)
alone, so ranks that agree on seeds draw the same tokens without telling each other.
"""

from __future__ import annotations

import os

import torch

from ..errors import ModelError

SEEDS = 2**62


def world() -> int:
    """Processes that were started together; 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def plan_arguments(tp_plan) -> dict:
    """Arguments of transformers' `from_pretrained` that split a model over all processes.

    Args:
        tp_plan: `auto` for the plan that the model class brings, or a mapping of module names to styles.

    Raises:
        ModelError: this is a lone process.
    """
    if world() < 2:
        raise ModelError(
            f"tp_plan={tp_plan!r} splits a model over several processes, and this is one alone: "
            "start them with `torchrun --nproc-per-node N script.py`"
        )
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=world(), tp_plan=tp_plan)}


def is_split(model) -> bool:
    """Whether a model is one part of several, so that all ranks have to take every step together."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def fresh_seed(model) -> int:
    """A new seed in 0 .. 2**62 - 1 from torch's global generator; for a split model that of rank 0, on all ranks."""
    seed = torch.randint(SEEDS, ())
    if is_split(model):
        seed = seed.to(model.device)
        torch.distributed.broadcast(seed, src=0)
    return int(seed)
