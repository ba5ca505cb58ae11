"""Replacing the linear layers of a loaded model."""

from torch import nn


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
    for name in (
        names
    ):  # names, not modules: a replaced layer's memory must be free before the next one takes its own
        layer = model.get_submodule(name)
        reason = refusal(name, layer)
        if reason:
            left[name] = reason
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(layer))
    return left
