"""Weight-only quantisation for the CPU: linear layers are replaced by packed ones."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from ..errors import ModelError
from ..kernels.linear.blocked import BlockedLinear, unblockable
from ..kernels.linear.packed import PackedLinear, pack_linears, unpackable

log = logging.getLogger("handloom")
BITS = {"int8-cpu": 8, "int4-cpu": 4}


def pack(model, quantization: str, *, group: int = 32, around=None):
    """Replace every linear layer of a model, the output layer too, by an 8- or 4-bit one; in place.

    Input embeddings keep their dtype: a step reads one row of them a token. Where they are tied to the output layer
    that layer gets a copy of its own, in 8 bits. At 4 it would cost most of the quality, so `int4-cpu` leaves it
    unquantised where the CPU has fast bfloat16 products (`kernels.blocked`; measured, they beat torch's 8-bit ones).

    Args:
        model: a transformers model on the CPU, not quantised yet.
        quantization: `int8-cpu` (one scale an output) or `int4-cpu` (scale and zero a group of inputs).
        group: inputs that share a scale at 4 bits: 32, 64, 128 or 256.
        around: (layer, make) -> the module that takes a layer's place; None takes what `make` makes of it, so that the
            layer's own weight can be freed.

    Returns:
        The same model.

    Raises:
        ModelError: the model lies on another device, or has no layer that can be packed.
    """
    place = model.get_input_embeddings().weight.device
    if place.type != "cpu":
        raise ModelError(
            f'quantization={quantization!r} is for the CPU; on {place} use "int8", "nf4" or "fp4"'
        )
    before = _bytes(model)
    output, make = _output(model, quantization)
    left = pack_linears(model, BITS[quantization], group=group, skip=(output,), around=around)
    if make is not None:
        del left[output]
        layer = model.get_output_embeddings()
        model.set_output_embeddings(make(layer) if around is None else around(layer, make))
    packed = sum(isinstance(module, PackedLinear) for module in model.modules())
    if not packed:
        reasons = sorted(set(left.values())) or ["the model has no nn.Linear"]
        raise ModelError(f"quantization={quantization!r}: no layer can be packed: {'; '.join(reasons)[:300]}")
    # Products round their inputs to bfloat16, so logits are compared as those of a quantised model.
    model.is_quantized = True
    log.info(
        "%s: %d layers packed, %.0f MB -> %.0f MB", quantization, packed, before / 1e6, _bytes(model) / 1e6
    )
    for name, reason in left.items():
        log.info("%s stays as it is: %s", name, reason)
    return model


def _output(model, quantization) -> tuple[str | None, Callable[[nn.Linear], nn.Module] | None]:
    """The name of a model's output layer, and what makes another one of it; None where all layers are treated alike."""
    output = model.get_output_embeddings()
    name = next((name for name, part in model.named_modules() if part is output), None)
    if name is not None and type(output) is nn.Linear:
        if quantization == "int4-cpu" and output.weight.dtype == torch.bfloat16 and not unblockable(output):
            return name, BlockedLinear
        if not unpackable(output, 8, 32):
            return name, lambda layer: PackedLinear(layer, 8)
    return None, None


def _bytes(model) -> int:
    """Bytes of parameters, buffers and blocked weights, shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()] if torch.is_tensor(t)}
    blocked = [part for part in model.modules() if isinstance(part, BlockedLinear)]
    return sum(t.numel() * t.element_size() for t in tensors.values()) + sum(part.nbytes for part in blocked)
