"""What the modules inside a decoder layer compute, found out from what they hold and from what they do."""

from __future__ import annotations

import torch
from torch import nn

from ...kernels.layer.gated import ACTIVATIONS
from ...kernels.layer.norm import Norm

EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
FREE = ("_forward_hooks", "_forward_pre_hooks")
LENIENT = {torch.float32: 64, torch.float64: 64}  # roundings that a result may be away, else:
STRICT = 4


class NormReader:
    """A norm module as kernels take it; parameters are read at every call, as they may be assigned anew.

    Args:
        module: the module. eps, offset, centered: see `Norm`.
    """

    def __init__(self, module: nn.Module, eps: float, offset: float, centered: bool):
        self.module, self.eps, self.offset, self.centered = module, eps, offset, centered
        self._norm: Norm | None = None

    def __call__(self) -> Norm:
        weight, bias = (self.module._parameters.get(name) for name in ("weight", "bias"))
        if self._norm is None or self._norm.weight is not weight or self._norm.bias is not bias:
            self._norm = Norm(weight, self.eps, self.offset, bias, self.centered)
        return self._norm


def read_norm(module: nn.Module, size: int) -> NormReader | str:
    """The norm over `size` numbers that a module computes, or why none is recognised, in words."""
    if module._modules or module._buffers or set(module._parameters) - {"weight", "bias"}:
        return f"{type(module).__name__} holds more than a weight and a bias"
    held = [p for p in module._parameters.values() if p is not None]
    if any(p.shape != (size,) for p in held):
        return f"{type(module).__name__} is not over {size} numbers"
    known = [getattr(module, name) for name in EPSILONS if isinstance(getattr(module, name, None), float)]
    place = {"device": held[0].device, "dtype": held[0].dtype} if held else {}
    x = samples(3, size, **place)
    x[1] *= 1e-3  # near eps, which is then seen
    try:
        want = module(x).double()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(module).__name__} does not run alone: {str(error).splitlines()[0][:80]}"
    for eps in known or (1e-5, 1e-6, 1e-8):
        for centered in (False, True):
            for offset in (0.0, 1.0):
                reader = NormReader(module, eps, offset, centered)
                if near(reader()(x), want, x.dtype):
                    return reader
    return f"{type(module).__name__} computes another norm"


def read_activation(module) -> str | None:
    """The name in `ACTIVATIONS` of what a module or function computes, or None."""
    x = torch.linspace(-6, 6, 97)
    try:
        want = module(x.clone())
    except (RuntimeError, TypeError):
        return None
    for name, function in ACTIVATIONS.items():
        if torch.is_tensor(want) and torch.allclose(want, function(x), atol=1e-6):
            return name
    return None


def samples(*shape, device=None, dtype=torch.float32) -> torch.Tensor:
    """Normal numbers around one, so that taking the mean out shows, with an outlier in every row; always the same."""
    x = 1 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., shape[-1] // 3] *= 20
    return x.to(device=device, dtype=dtype)


def near(have, want, dtype) -> bool:
    """Whether two results are equal but for a few roundings in `dtype`, row by row."""
    have, want = have.double(), want.double()
    if have.shape != want.shape or not torch.equal(have.isfinite(), want.isfinite()):
        return False
    eps = LENIENT.get(dtype, STRICT) * torch.finfo(dtype).eps
    scale = want.square().mean(-1, keepdim=True).sqrt()
    return bool(((have - want).abs() <= eps * (want.abs() + scale) + 1e-12).all())


def linear(module) -> bool:
    """Whether a module is a plain linear layer, whose weight may be read by our own product."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def bypassed(module: nn.Module) -> str:
    """What keeps a layer's parts from being run by others than itself, in words; empty if nothing does."""
    for part in module.modules():
        if "forward" in part.__dict__:
            return f"{type(part).__name__} has a forward of its own"
        if isinstance(part, nn.Dropout) and part.training and part.p > 0:
            return "dropout is on"
    return ""


class Hooks:
    """Whether forward hooks sit on the parts of a layer; those by which transformers records outputs do not count."""

    def __init__(self, layer: nn.Module):
        parts = [part for part in layer.modules() if part is not layer]
        self._tables = [getattr(part, name) for part in parts for name in FREE]

    def __bool__(self) -> bool:
        if not any(self._tables):
            return False
        return any(
            getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
            for table in self._tables
            for hook in table.values()
        )
