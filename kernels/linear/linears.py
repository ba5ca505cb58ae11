"""Replacing the linear layers of a loaded model."""

from torch import nn


class StandIn(nn.Module):
    """What takes the place of a linear layer, which stays a part of it with its parameters and hooks.

    Args:
        layer: an nn.Linear, or one of bitsandbytes.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def weight(self):
        """The layer's own weight."""
        return self.layer.weight

    @property
    def bias(self):
        """The layer's own bias, or None."""
        return self.layer.bias


def replace_linears(model, refusal, make):
    """Put other modules in the place of linear layers, in place.

    Args:
        model: nn.Module; every nn.Linear in it, subclasses included, is considered.
        refusal: (name, layer) -> why this layer stays as it is, in words; None or empty where it goes.
        make: layer -> the module that takes its place.

    Returns:
        dict of the layers left as they were: name -> why.
    """
    left = {}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # Names, not modules: a replaced layer's memory must be free before the next one takes its own.
    for name in names:
        layer = model.get_submodule(name)
        reason = refusal(name, layer)
        if reason:
            left[name] = reason
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(layer))
    return left
