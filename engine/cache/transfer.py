"""Numbers of the host on their way to a device."""

from __future__ import annotations

import numpy as np
import torch


def upload(values, device: torch.device, dtype: torch.dtype | None = torch.long) -> torch.Tensor:
    """Numbers of the host on a device; the host does not wait for what the device is doing.

    Args:
        values: a list of numbers, nested for more axes, or an array of the dtype, which is not written to later.
        dtype: of the tensor; None takes that of the numbers.
    """
    device = torch.device(device)
    if isinstance(values, np.ndarray):
        there = torch.from_numpy(values)
        return there if device.type == "cpu" else there.pin_memory().to(device, non_blocking=True)
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def send(values: np.ndarray, there: torch.Tensor) -> None:
    """Numbers of the host into a tensor of a device that is there already; the array may be written to afterwards."""
    here = torch.from_numpy(values)
    there.copy_(here.pin_memory() if there.device.type == "cuda" else here, non_blocking=True)
