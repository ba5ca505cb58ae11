"""bitsandbytes' 8-bit layers with our own product: weights of bytes read where they lie, activations as they are.

LLM.int8 (arXiv 2208.07339) rounds activations to bytes as well and so has to keep their outliers apart; a product that
widens the weights instead needs neither.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..kernels.linear.few_rows import MOST_ROWS, few_rows_linear
from ..kernels.linear.linears import StandIn

# One opaque op, as in `fourbit`.
_library = torch.library.Library("handloom", "FRAGMENT")
_library.define("eight_bit(Tensor x, Tensor weight, Tensor scales, Tensor? bias, str? kernels) -> Tensor")


def eight_bit_linear(x, weight, scales, bias, kernels):
    """Product of activations with a weight of bytes.

    Args:
        x: [..., K]. weight: int8 [N, K]. scales: float32 [N], of the outputs. bias: [N] in x's dtype, or None.
        kernels: of up to 16 rows, see `kernels.dispatch`; more go through a dense copy of the weight.

    Returns:
        [..., N] in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= MOST_ROWS:
        out = few_rows_linear(rows, [weight], [bias], scales=scales, kernels=kernels)
    else:  # bytes are exact in every dtype, and over 128 they keep sums in float16 in range
        dense = torch.mul(weight, 2.0**-7, out=x.new_empty(weight.shape))
        out = functional.linear(rows, dense) * (scales * 128)
        out = (out if bias is None else out + bias).to(x.dtype)
    return out.view(*x.shape[:-1], len(weight))


def _eight_bit_fake(x, weight, scales, bias, kernels):
    return x.new_empty(*x.shape[:-1], len(weight))


_library.impl("eight_bit", eight_bit_linear, "CompositeExplicitAutograd")
torch.library.register_fake("handloom::eight_bit", _eight_bit_fake, lib=_library)


class EightBitLinear(StandIn):
    """A `bitsandbytes.nn.Linear8bitLt` whose products of few rows read its weights in place, without outliers.

    Args:
        layer: the layer; it keeps its weights, and is called itself while it has hooks.
        kernels: `auto`, `triton`, `torch` or None, see `kernels.dispatch`.
    """

    def __init__(self, layer: nn.Module, kernels: str | None = None):
        super().__init__(layer)
        self.kernels = kernels
        self.register_buffer("scales", torch.empty(0), persistent=False)
        self.renew()

    def renew(self) -> None:
        """Take over the scales as they are now."""
        largest = self.layer.weight.SCB if self.layer.weight.SCB is not None else self.layer.state.SCB
        self.scales = (largest.float() / 127).view(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]` in x's dtype."""
        if self.layer._forward_hooks or self.layer._forward_pre_hooks:
            return self.layer(x)
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        return torch.ops.handloom.eight_bit(x, self.layer.weight.data, self.scales, bias, self.kernels)
