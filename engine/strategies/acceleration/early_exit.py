"""Early exit (arXiv 2309.08168, 2404.16710): the first layers of a model, with its output layer, draft for it."""

from __future__ import annotations

import copy

from torch import nn

from ...engine import Engine
from ...errors import CapabilityError, ParameterError


def early_exit(engine: Engine, layers: int, **options) -> Engine:
    """An Engine of the model's first layers, norm and output layer, which share all their weights with it.

    For `speculative(engine, prompts, draft=early_exit(engine, 8))`; a draft token costs layers / depth of a pass. It
    keeps keys and values of its own. It pays where a model was trained to exit early.

    Args:
        engine: that it drafts for.
        layers: of its depth, 1 to one less.
        options: as for `Engine`.

    Raises:
        CapabilityError: the model's layers were not found.
    """
    depth = engine.config.num_hidden_layers
    if not isinstance(layers, int) or not 1 <= layers < depth:
        raise ParameterError(f"layers={layers!r} is not in 1..{depth - 1}")
    paths = [
        path
        for path, part in engine.model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == depth
    ]
    if len(paths) != 1:
        raise CapabilityError(
            f"{type(engine.model).__name__}: {len(paths)} lists of {depth} modules are its layers"
        )
    config = copy.deepcopy(engine.model.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model = _cut(engine.model, paths[0].split("."), layers, config, text)
    return Engine(
        model, engine.tokenizer, **{"slots": engine.slots, "max_length": engine.max_length, **options}
    )


def _cut(module, path: list[str], layers: int, config, text):
    """A shallow copy of a module with fewer layers; parameters, and all other modules, are the same objects."""
    twin = copy.copy(module)
    first, *rest = path
    inner = module._modules[first]
    part = _cut(inner, rest, layers, config, text) if rest else nn.ModuleList(list(inner)[:layers])
    twin.__dict__["_modules"] = {**module._modules, first: part}
    if hasattr(module, "config"):
        twin.__dict__["config"] = text if type(module.config) is type(text) else config
    return twin
