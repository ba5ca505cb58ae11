"""Layers of a twin that run on copies of their weights, made for speed and made again when the weights have moved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ...errors import ModelError
from ...kernels.linear.blocked import BlockedLinear, plain_alone, small, unblockable
from ...kernels.linear.linears import StandIn, replace_linears
from ...loading.fourbit import own_products
from ...loading.packing import BITS, pack
from .twin import watched

log = logging.getLogger("handloom")
LAYOUTS = ("auto", "blocked", "plain", "triton")
SHARE = 0.5  # of the free memory that `auto` may take for copies


class Origin:
    """The parameters that a copy was made from, as they were then.

    Args:
        modules: of the twin; their tables of parameters are the user's, so what is assigned there is seen.
    """

    __slots__ = ("_seen",)

    def __init__(self, *modules: nn.Module):
        self._seen = [
            (table, name, parameter, _version(parameter))
            for table in (module._parameters for module in modules)
            for name, parameter in table.items()
        ]

    def moved(self) -> bool:
        """Whether one was assigned or edited; what went through `.data` is for `Fingerprint` to see."""
        for table, name, parameter, version in self._seen:  # asked for every product: no list, no generator
            if table.get(name) is not parameter or (version is not None and parameter._version != version):
                return True
        return False


def _version(parameter: nn.Parameter | None) -> int | None:
    """How often a parameter was edited; None of one that does not count it."""
    return None if parameter is None or parameter.is_inference() else parameter._version


class Copied(StandIn):
    """A linear layer of a twin that runs on a copy of its weight, in another layout or packed into fewer bits.

    While the layer has hooks it is called itself.

    Args:
        layer: the twin's nn.Linear.
        make: layer -> the module that holds the copy, such as `kernels.linear.blocked.BlockedLinear`.
        from_rows: rows from which on the copy runs; fewer go through the layer's own weight.
    """

    def __init__(self, layer: nn.Linear, make: Callable[[nn.Linear], nn.Module], from_rows: int = 1):
        super().__init__(layer)
        self.copy, self.from_rows = make(layer), from_rows
        self.__dict__["origin"] = Origin(layer)

    def renew(self) -> None:
        """Copy the weights as they are now."""
        self.copy.take(self.layer)
        self.origin = Origin(self.layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        few = self.from_rows > 1 and x.numel() < self.from_rows * self.in_features
        if torch.compiler.is_compiling():
            return self.layer(x) if few else self.copy(x)  # renewed by its engine before a run
        parts = self._modules  # asked by name, and called, a module takes longer than some products
        layer = parts["layer"]
        if (layer._forward_hooks or layer._forward_pre_hooks) and watched(layer):
            return layer(x)
        if few:
            return layer.forward(x)
        if self.origin.moved():
            self.renew()
        return parts["copy"].forward(x)


def check_layout(layout: str, quantization: str | None = None) -> None:
    """Raise ModelError for an unknown layout, and for a quantization that an engine cannot make of a loaded model."""
    if layout not in LAYOUTS:
        raise ModelError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    if quantization is None:
        return
    if quantization not in BITS:
        raise ModelError(
            f"quantization={quantization!r} is none that an Engine makes of a model, which are {', '.join(BITS)}; "
            "others are made when a model is loaded: Engine.from_pretrained"
        )
    if layout not in ("auto", "plain"):
        raise ModelError(f"quantization={quantization!r} and layout={layout!r} exclude each other")


def lay_out(tree: nn.Module, layout: str, quantization: str | None = None) -> None:
    """Put other linear layers into a twin; see `Engine` for layouts and quantization.

    Raises:
        ModelError: one is unknown, or asks by name for what no layer can have.
    """
    check_layout(layout, quantization)
    if quantization is not None:
        pack(tree, quantization, around=Copied)
    elif layout == "triton":
        own_products(tree)
    elif layout != "plain":
        _block(tree, layout)


def _block(tree: nn.Module, layout: str) -> None:
    def refusal(name, layer):
        return unblockable(layer) or small(layer)

    layers = [m for m in tree.modules() if isinstance(m, nn.Linear) and not refusal("", m)]
    size, free = sum(m.weight.numel() * m.weight.element_size() for m in layers), free_memory()
    if layout == "auto" and size > SHARE * free:
        log.info(
            "the linear layers stay as they are: blocked copies would take %.0f MB of %.0f MB free; "
            "layout='blocked' makes them all the same", size / 1e6, free / 1e6
        )  # fmt: skip
        return
    left = replace_linears(
        tree, refusal, lambda layer: Copied(layer, BlockedLinear, _from_rows(layer, layout))
    )
    if layers:
        log.info(
            "%d linear layers in oneDNN's blocked layout, copies of %.0f MB beside the model's own; %d as they were",
            len(layers), size / 1e6, len(left)
        )  # fmt: skip
    elif layout == "blocked":
        reasons = sorted(set(left.values())) or ["the model has no nn.Linear"]
        raise ModelError(f"layout='blocked': no layer can be: {'; '.join(reasons)[:300]}")


def _from_rows(layer: nn.Linear, layout: str) -> int:
    """Rows from which on a layer runs on its blocked copy."""
    return 2 if layout == "auto" and plain_alone(layer.weight.dtype) else 1


def renew(tree: nn.Module) -> None:
    """Make every copy in a twin again."""
    for part in tree.modules():
        if hasattr(part, "renew"):
            part.renew()


def free_memory() -> float:
    """Bytes that are free on the host, for the machine and for the control group; infinite where unknown."""
    free = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(fields["MemAvailable"].split()[0]))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass  # not Linux, or no control group
    return min(free, default=float("inf"))
