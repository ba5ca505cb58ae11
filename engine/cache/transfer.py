"""Numbers of the host on their way to a device."""

from __future__ import annotations

import torch


def upload(values, device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Numbers of the host on a device; the host does not wait for what the device is doing.

    Args:
        values: a list of numbers, nested for more axes.
    """
    if torch.device(device).type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
