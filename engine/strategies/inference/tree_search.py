"""Monte Carlo tree search over tokens with a value function (PPL-MCTS, arXiv 2109.13582)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ...state import State
from ..kit.decode import decode
from .tree import Node


def tree_search(
    engine, prompts, params=None, *, value: Callable[[Sequence[list[int]]], Sequence[float]], simulations=50, c=3.0,
    temperature=2.0, k=None, stream=False, **options,
) -> list[Generation]:  # fmt: skip
    """Before every token, `simulations` walks down a tree of continuations; the most visited token is taken.

    A walk goes by Q(v) + c p(v) sqrt(N) / (1 + N(v)) to a beginning that was not there yet, whose value is added
    along it. p is the pipeline's distribution at the root and the model's own below, at a temperature of the
    search. A token costs `simulations` + 1 passes of one row for each prompt; all prompts walk together, and the
    subtree of the token that is taken stays.

    Args:
        prompts, params, options: as for `decode`. The temperature of the search is another one than that of params.
        value: output ids of N beginnings -> N values in [0, 1], such as a classifier's probability.
        simulations: a token, >= 1. c: c_puct, >= 0. temperature: of the priors, > 0.
        k: tokens that a node may go on with, the most probable; None: all.

    Returns:
        One Generation for each prompt; `extra["values"]`: the mean value of each token taken.
    """
    if simulations < 1 or c < 0 or temperature <= 0:
        raise ParameterError(
            f"tree search takes simulations >= 1, c >= 0 and temperature > 0, got {simulations}, {c}, {temperature}"
        )
    roots: dict = {}

    def priors(logits) -> dict[int, float]:
        best, ids = logits.topk(min(k or logits.shape[0], logits.shape[0]))
        p = (best / temperature).softmax(-1)
        return {token: share for token, share in zip(ids.tolist(), p.tolist(), strict=True) if share > 0}

    def step(now):
        tree = []
        for row, request in enumerate(now.live):
            root = roots.pop(request, None) or Node(None)
            root.state, root.priors = now.state.select([row]), priors(now.processed[row])
            tree.append(root)
        stops = now.engine.eos_token_ids
        for _ in range(simulations):
            paths, texts, leaves = [], [], []
            for root, request in zip(tree, now.live, strict=True):
                path, text = root.walk(c)
                paths.append(path)
                texts.append([*request.stopper.token_ids, *text])
                fresh = len(path) > 1 and not path[-1].visits and text[-1] not in stops
                if fresh and path[-2].state.rows[0].length + 1 < now.engine.max_length:
                    leaves.append((path[-1], path[-2].state, text[-1]))
            for path, worth in zip(paths, value(texts), strict=True):
                for node in path:
                    node.visits, node.total = node.visits + 1, node.total + float(worth)
            if leaves:
                states = State.concat([state for _, state, _ in leaves])
                grown = now.engine.step(states, [token for _, _, token in leaves])
                for i, (node, _, _) in enumerate(leaves):
                    node.state, node.priors = grown.select([i]), priors(grown.logits[i])
        tokens = []
        for root, request in zip(tree, now.live, strict=True):
            if not root.children:
                tokens.append(-1)
                continue
            token, roots[request] = max(root.children.items(), key=lambda item: item[1].visits)
            request.extra.setdefault("values", []).append(roots[request].total / roots[request].visits)
            tokens.append(token)
        return torch.tensor(tokens, device=now.logits.device)

    return decode(engine, prompts, params, step=step, stream=stream, **options)
