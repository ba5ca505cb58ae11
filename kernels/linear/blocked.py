"""Linear layers for the CPU whose weights lie in oneDNN's blocked layout: the same product in the same dtype, sooner.

A plain product rearranges its weight, or reads it badly, at every call; a blocked weight is rearranged once. The sum
over the inputs is taken in another order, so results differ from `torch.nn.functional.linear` by rounding.
"""

import itertools
import weakref

import torch
from torch import nn

from .linears import replace_linears

ROWS = 8  # rows of the inputs that the layout is chosen for; it serves all others well, too
SMALLEST = 1 << 16  # weights of a layer below which the dearer call costs more than the layout saves

# An op takes numbers and tensors only, and a compiler cannot hold a blocked tensor: it finds its layer by a number.
_layers = weakref.WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("handloom", "FRAGMENT")
_library.define("blocked_linear(Tensor x, int layer, int outputs) -> Tensor")


def _blocked_linear(x, layer, outputs):
    return _layers[layer].product(x)


def _blocked_linear_fake(x, layer, outputs):
    return x.new_empty(*x.shape[:-1], outputs)


_library.impl("blocked_linear", _blocked_linear, "CPU")
torch.library.register_fake("handloom::blocked_linear", _blocked_linear_fake, lib=_library)


class BlockedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weight in oneDNN's blocked layout; it stores nothing else of it.

    `weight` gives the plain weight `[N, K]` back, a copy at every access. Copies, pickles and state dicts carry plain
    weights; `.to(dtype)` works, `.to(device)` does not.

    Args:
        source: nn.Linear on the CPU with a float32, bfloat16 or, where oneDNN has it, float16 weight [N, K]; it is
            not changed.

    Raises:
        ValueError: what `unblockable` says.
    """

    def __init__(self, source):
        super().__init__()
        reason = unblockable(source)
        if reason:
            raise ValueError(reason)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())
        self._block(source.weight)

    def take(self, source):
        """Take over weight and bias of a layer of the same shape, in place: a compiled step finds them."""
        self.bias = None if source.bias is None else source.bias.detach().clone()
        number, self._blocked = self._number, None  # the old copy goes before the new one takes its memory
        self._block(source.weight)
        self._number = number
        _layers[number] = self

    def _block(self, weight):
        """Take over a plain weight [N, K]."""
        self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self._number = next(_numbers)
        _layers[self._number] = self

    @property
    def weight(self):
        """The plain weight [N, K], a copy."""
        return self._blocked.to_dense()

    @property
    def nbytes(self):
        """Bytes of the weight, which is neither parameter nor buffer."""
        return self._blocked.numel() * self._blocked.element_size()

    def forward(self, x):
        """x [..., K] in the weight's dtype -> [..., N]."""
        if torch.compiler.is_compiling():
            return torch.ops.handloom.blocked_linear(x, self._number, self.out_features)
        return self.product(x)

    def product(self, x):
        """`forward` without a look at who calls."""
        bias = self._buffers["bias"]  # asked by name, it takes as long as a small operation
        return torch.ops.mkldnn._linear_pointwise(x, self._blocked, bias, "none", [], "")

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        weight = fn(self.weight)
        if weight.device.type != "cpu" or not supports(weight.dtype):
            raise RuntimeError(
                f"a blocked weight cannot become {weight.dtype} on {weight.device}; load the model with layout='plain'"
            )
        self._block(weight)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
        else:
            self._block(weight.to(self._blocked.dtype))
        super()._load_from_state_dict(state_dict, prefix, metadata, False, missing, unexpected, errors)

    def __getstate__(self):
        return {**self.__dict__, "_blocked": self.weight}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._block(self._blocked)


def block_linears(model):
    """Replace the linear layers of a CPU model by blocked ones where that pays, in place.

    Args:
        model: nn.Module for inference; every nn.Linear in it is considered, the output layer too. A weight tied to
            an embedding stays in the embedding, and the linear layer gets a blocked copy.

    Returns:
        dict of the layers left as they were: name -> why. Blocking twice changes nothing.
    """
    return replace_linears(model, lambda name, layer: unblockable(layer) or small(layer), BlockedLinear)


def unblockable(layer):
    """Why a linear layer cannot be blocked, in words; None where it can."""
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, not a plain nn.Linear"
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        return "it has hooks, which a replacement would lose"
    weight = layer.weight
    if weight.device.type != "cpu" or type(weight.data) is not torch.Tensor or weight.layout != torch.strided:
        kind = type(weight.data).__name__
        return f"weight is a {kind} on {weight.device}; blocked products need a plain one on the CPU"
    if not supports(weight.dtype):
        return f"weight is {weight.dtype}, for which this CPU has no blocked product"
    return None


def supports(dtype):
    """Whether torch has blocked products of this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def plain_alone(dtype):
    """Whether on this processor a lone row goes sooner through the plain weight.

    A rule and no measurement, so that results do not change from one process to the next. On a Xeon with AMX the plain
    float32 product of one row took 0.5 to 0.8 of the blocked one's time at every shape; on an EPYC 0.5 to 2.1 times it.
    """
    return dtype == torch.float32 and torch.cpu._is_amx_tile_supported()


def small(layer):
    """Why blocking a layer would not pay, in words; None where it does."""
    count = layer.weight.numel()
    return f"{count} weights; blocking pays from {SMALLEST}" if count < SMALLEST else None
