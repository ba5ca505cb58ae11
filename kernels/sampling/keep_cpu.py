"""Truncation rules on one NumPy row that keep something else than all tokens from a threshold up.

Each takes (candidates' logits float32 [N], their maximum, parameter, second parameter, coin; for tail-free, V as the
second) and returns which
to keep, bool [N], or None where the rule is off. Candidates are in order of id. The torch forms in
`sample_reference` define the results.
"""

import math

import numpy as np

from .rules import ENTROPY_SHARE, HEAD_TOKENS, LIGHTEST, MASS_SHARE, TAIL_TOKENS

FIRST_PREFIX = 1024  # tokens sorted first; eight times as many when they do not reach the limit


def keep_exactly(values, top, count, second, coin):
    """The `count` largest, of ties at the last one the lowest ids."""
    count = math.ceil(min(count, len(values)))
    if count <= 0:
        return None
    last = np.partition(values, -count)[-count]
    kept = values > last
    kept[(values == last).nonzero()[0][: count - np.count_nonzero(kept)]] = True
    return kept


def keep_xtc(values, top, threshold, chance, coin):
    """All but the tokens above the least likely one whose probability reaches the threshold."""
    if not coin < chance:
        return None
    mass = np.exp((values - top).astype(np.float64)).sum()
    level = np.float32(top + np.log(mass)) + np.log(max(threshold, np.float32(1e-37)), dtype=np.float32)
    return values <= values[values >= min(level, top)].min()


def keep_typical(values, top, share, second, coin):
    """The smallest set of tokens nearest to the mean logit that has this share of the mass."""
    if not share < 1:
        return None
    shift = values - top
    weights = np.exp(shift.astype(np.float64))
    mass = weights.sum()
    centre = np.float32((weights @ np.where(weights > 0, shift, 0)) / mass)
    rank = -np.abs(shift - centre)
    limit = share * MASS_SHARE * mass
    for order in prefixes(rank):
        before = np.cumsum(weights[order]) - weights[order]
        needed = int(np.searchsorted(before, limit))
        if needed < len(order) or len(order) == len(rank):
            break
    return rank >= rank[order[max(needed - 1, 0)]]


def keep_top_h(values, top, alpha, head, coin):
    """The longest prefix of the sorted tokens whose entropy stays within alpha of the whole's."""
    if not alpha > 0 or (head <= 0 and alpha >= 1):
        return None
    partial = head > 0
    looked_at = values[next(prefixes(values, HEAD_TOKENS))] if partial else values
    shift = (looked_at - top).astype(np.float64)
    weights = np.exp(shift)
    mass = weights.sum()
    total = np.log(mass) - (weights @ np.where(weights > 0, shift, 0.0)) / mass
    for order in prefixes(values, HEAD_TOKENS if partial else FIRST_PREFIX):
        shift = (values[order] - top).astype(np.float64)
        some = np.exp(shift)
        sums, parts = some.cumsum(), (some * np.where(some > 0, -shift, 0.0)).cumsum()
        entropy = (sums * np.log(mass) + parts) / mass if partial else np.log(sums) + parts / sums
        inside = (entropy <= float(alpha) * ENTROPY_SHARE * total) & (values[order] >= top - LIGHTEST)
        if partial or not inside.all():
            break
    last = max(int(np.argmin(inside)) if not inside.all() else len(order), 1)
    return values >= values[order[last - 1]]


def keep_tail_free(values, top, z, vocab, coin):
    """The sorted tokens up to where their weights have bent by z of the whole; those that are no candidates weigh 0."""
    if not z < 1 or vocab < 3:
        return None
    least = np.partition(values, -TAIL_TOKENS)[-TAIL_TOKENS] if len(values) > TAIL_TOKENS else -np.inf
    ordered = np.sort(values[values >= least])[::-1]
    weights = np.exp((ordered - top).astype(np.float64))
    bent = np.abs(np.diff(np.pad(weights, (0, min(2, vocab - len(ordered)))), 2)).cumsum()
    within = np.count_nonzero(bent <= float(z) * ENTROPY_SHARE * bent[-1])
    return values >= ordered[min(within, len(ordered) - 1)]


def prefixes(rank, size=FIRST_PREFIX):
    """Yield the indices of the largest ranks in descending order, more of them each time, all at last."""
    while size < len(rank):
        chosen = np.argpartition(-rank, size)[:size]
        yield chosen[np.argsort(-rank[chosen], kind="stable")]
        size *= 8
    yield np.argsort(-rank, kind="stable")


KEEPS = {
    "exact_count": keep_exactly,
    "xtc": keep_xtc,
    "typical": keep_typical,
    "top_h": keep_top_h,
    "tail_free": keep_tail_free,
}
