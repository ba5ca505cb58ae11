"""Drafts that a model makes for itself: early exit (arXiv 2309.08168, 2404.16710), Jacobi (arXiv 2402.02057)."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict

from torch import nn

from ....engine import Engine
from ....errors import CapabilityError, ParameterError


def early_exit(engine: Engine, layers: int, **options) -> Engine:
    """An Engine of the model's first layers, norm and output layer, which share all their weights with it: they draft.

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


class JacobiDraft:
    """Drafts for `speculative` of the model's own guesses: a pass over a wrong draft still says what would follow.

    The most probable tokens behind a rejected draft are n-grams that the model is about to say (the trajectory of a
    Jacobi iteration); a pool of them, by their first token, is what lookahead decoding verifies. No second model, and
    no extra rows: a guess costs nothing but its place in the next pass.

    Args:
        size: n-grams kept for each first token, >= 1.
    """

    def __init__(self, size: int = 8):
        if size < 1:
            raise ParameterError(f"a pool keeps size >= 1 n-grams, got {size}")
        self.size = size
        self.pool: dict[int, OrderedDict[tuple[int, ...], None]] = defaultdict(OrderedDict)

    def observe(self, tokens: list[int], draft: list[int], best: list[int]) -> None:
        """After a pass over a row's last token and its draft: `best` is what the model would say behind each."""
        for at in range(len(best) - 1):
            grams = self.pool[best[at]]
            grams[tuple(best[at + 1 :])] = None
            grams.move_to_end(tuple(best[at + 1 :]))
            if len(grams) > self.size:
                grams.popitem(last=False)

    def __call__(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` draft tokens behind a row; before anything was guessed, its last token again."""
        grams = self.pool.get(tokens[-1])
        found = list(next(reversed(grams))) if grams else []
        while found and len(found) < count and self.pool.get(found[-1]):
            found += next(reversed(self.pool[found[-1]]))
        return (found or [tokens[-1]] * count)[:count]
