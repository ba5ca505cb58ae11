"""The law of sequences, by enumerating every one that can be drawn, and the tests against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ParameterError
from ..params.sampling_params import SamplingParams
from . import naive
from .runs import bind, context_of, ids_of, run

LEAVES = 300_000  # most sequences that `sequence_law` enumerates
EXPECTED = 5.0  # least expected count of a chi-square cell; rarer sequences are pooled


def exact_distribution(
    strategy: Callable,
    engine,
    prompt,
    params: SamplingParams,
    *,
    draws: int = 20_000,
    batch: int = 500,
    seed: int = 0,
    samples: bool = True,
    false_alarm: float = 1e-6,
    next_logits: Callable[[list[list[int]]], Tensor] | None = None,
    **options,
) -> float:
    """The strategy samples whole sequences with exactly the probabilities that model and pipeline define.

    The law is enumerated (`sequence_law`) and compared with `draws` sequences by a chi-square test; sequences
    expected fewer than five times are pooled. An impossible sequence fails at once.

    Args:
        strategy: the sampler.
        engine: with a vocabulary small enough to enumerate.
        prompt: one prompt.
        params: with temperature > 0, and max_new_tokens as the depth of the enumeration.
        draws, batch: sequences in all, and in one call.
        seed: of the draws; the result is the same every time.
        samples: ask for n samples of the prompt, which is prefilled once; False gives the strategy the prompt
            many times, each time with another seed.
        false_alarm: probability of failing a strategy that is right.
        next_logits: for a strategy with a law of its own, see `sequence_law`.
        options: fields of `SamplingParams`, and options of the strategy.

    Returns:
        The p-value.
    """
    law = sequence_law(engine, prompt, params, next_logits)
    counts: Counter[tuple[int, ...]] = Counter()
    for start in range(seed, seed + draws, batch):
        count = min(batch, seed + draws - start)
        if samples:
            results = run(strategy, engine, [prompt], [params.replace(seed=start, n=count)], options)
        else:
            each = [params.replace(seed=start + i) for i in range(count)]
            results = run(strategy, engine, [prompt] * count, each, options)
        assert len(results) == count, f"exact_distribution: {len(results)} results, {count} were asked for"
        counts.update(tuple(ids_of(result)) for result in results)
    impossible = [sequence for sequence in counts if sequence not in law]
    assert not impossible, f"exact_distribution: drew {impossible[0]}, which has probability 0"
    p_value = chi_square(counts, law, draws)
    worst = max(law, key=lambda s: abs(counts[s] - draws * law[s]) / (draws * law[s]) ** 0.5)
    assert p_value >= false_alarm, (
        f"exact_distribution: p-value {p_value:.2e} is below the false-alarm probability {false_alarm:g}; "
        f"the worst of {len(law)} sequences is {worst}: drawn {counts[worst]} times, "
        f"expected {draws * law[worst]:.1f} of {draws}"
    )
    return p_value


@torch.no_grad()
def sequence_law(
    engine, prompt, params: SamplingParams, next_logits: Callable[[list[list[int]]], Tensor] | None = None
) -> dict[tuple[int, ...], float]:
    """The probability of every sequence that can be drawn, by enumerating the tree without a cache.

    Args:
        engine: with a small vocabulary; about V ** max_new_tokens sequences are enumerated.
        prompt: one prompt of ids or text.
        params: its `max_new_tokens` is the depth; EOS and stop token ids end a sequence earlier.
        next_logits: what the pipeline is given, `[N, V]` behind N sequences of equal length, prompt included; None:
            the model's logits.

    Returns:
        {token ids: probability} of the sequences whose probability is above 0.

    Raises:
        ParameterError: there are more than 300,000 of them.
    """
    (request, *_) = engine.requests([prompt], params.replace(n=1))
    params, prompt = request.params, request.prompt.ids
    stops = {*params.stop_token_ids, *params.ends(engine.eos_token_ids)}
    given = next_logits or (lambda ids: naive.next_logits(engine.model, ids))
    rows, paths = bind(engine, request), [()]
    weights = torch.ones(1, dtype=torch.float64)
    law: dict[tuple[int, ...], float] = {}
    for depth in range(params.max_new_tokens):
        ids = [prompt + list(path) for path in paths]
        context = context_of(request, ids, len(prompt), engine)
        logits = torch.cat([given(ids[i : i + 512]) for i in range(0, len(ids), 512)])
        processed = rows.apply(logits, context).double().cpu()
        if params.greedy:
            step = torch.zeros_like(processed).scatter_(1, processed.argmax(-1, keepdim=True), 1.0)
        else:
            step = processed.softmax(-1)
        parents, tokens = (step > 0).nonzero(as_tuple=True)
        weights = (weights[:, None] * step)[parents, tokens]
        if len(weights) + len(law) > LEAVES:
            raise ParameterError(f"more than {LEAVES} sequences; use a smaller vocabulary, depth, or top_k")
        grown = [(*paths[p], t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
        ends = [path[-1] in stops or depth + 1 == params.max_new_tokens for path in grown]
        law |= {path: w for path, w, end in zip(grown, weights.tolist(), ends, strict=True) if end}
        going = [i for i, end in enumerate(ends) if not end]
        if not going:
            break
        parents, tokens = parents[going], tokens[going]
        again = rows.select(parents)  # processors that carry memory want the very context that apply saw
        at = context_of(request, [ids[p] for p in parents.tolist()], len(prompt), engine)
        again.apply(logits[parents.to(logits.device)], at)
        rows, weights = again.accept(tokens.to(logits.device), at), weights[going]
        paths = [grown[i] for i in going]
    return law


def chi_square(counts: dict, law: dict, draws: int) -> float:
    """The p-value of Pearson's chi-square test that `counts` of `draws` outcomes come from `law`.

    Outcomes expected fewer than five times are pooled into one cell; 1.0 if only one cell is left.
    """
    cells = [(counts.get(key, 0), draws * p) for key, p in law.items() if draws * p >= EXPECTED]
    pooled = draws - sum(seen for seen, _ in cells), draws - sum(expected for _, expected in cells)
    if pooled[1] >= EXPECTED or not cells:
        cells.append(pooled)
    elif pooled[1] > 0:
        cells.sort(key=lambda cell: cell[1])
        cells[0] = cells[0][0] + pooled[0], cells[0][1] + pooled[1]
    if len(cells) < 2:
        return 1.0
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
