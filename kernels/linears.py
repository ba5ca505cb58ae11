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
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        reason = refusal(name, module)
        if reason:
            left[name] = reason
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(module))
    return left
