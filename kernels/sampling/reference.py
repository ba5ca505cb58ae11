"""The reference of `sample` in plain torch: what every other path must reproduce."""

import torch

from ..noise.philox import exp_reference, log_reference
from .draw import NO_TOKEN, NONE_KEPT, coin, draw_reference
from .rules import (
    ENTROPY_SHARE,
    FLOAT_MAX,
    HEAD_TOKENS,
    LIGHTEST,
    MASS_SHARE,
    TAIL_TOKENS,
    Drawn,
    Replaced,
    Statistics,
    unpack_mask,
    with_top,
)

FIXED_ONE = 2.0**35  # of sums in fixed point
NEAR = 40.0  # a token so far below the highest adds nothing to an entropy
PIECE = 32768  # tokens taken at a time on a CPU, so that what is in work stays in the cache
SMALLEST = 1e-30  # share of the most entropy that counts as none


def apply_edits(logits, *, edits=None, bitmask=None, pointwise=()):
    """Sparse edits, bitmask, pointwise edits: logits [B, V] -> new float32 [B, V]; +inf becomes finite."""
    x = logits.float().clamp(max=FLOAT_MAX)
    if edits is not None:
        x = _apply_sparse(x, edits)
    if bitmask is not None:
        x = torch.where(unpack_mask(bitmask, x.shape[1]), x, -torch.inf)
    ids = torch.arange(x.shape[1], device=x.device)
    for point in pointwise:
        edited = point.edit(x, ids, point.parameter[:, None]).clamp(max=FLOAT_MAX)
        x = torch.where(x == -torch.inf, x, edited)
    return x


def _apply_sparse(x, edits):
    listed = (edits.ids >= 0) & (edits.ids < x.shape[1])
    ids = torch.where(listed, edits.ids, 0).long()
    if isinstance(edits, Replaced):
        values = edits.values.clamp(max=FLOAT_MAX)
    else:
        values = penalise(x.gather(1, ids) + edits.bias, edits)
    delta = torch.where(listed, ids, x.shape[1])  # padding goes to a column that is dropped
    padded = torch.cat([x, x.new_zeros(len(x), 1)], dim=1)
    return padded.scatter(1, delta, values)[:, :-1]


def penalise(values, edits):
    """Repetition, then presence and frequency penalties, on the values [B, N] of the listed tokens."""
    factor = edits.repetition[:, None]
    repeated = torch.where(values < 0, values * factor, values / factor)
    values = torch.where((edits.seen > 0) & (factor != 1), repeated, values)
    presence = torch.where(edits.counts > 0, edits.presence[:, None], 0.0)
    values = values - (presence + edits.frequency[:, None] * edits.counts)
    return values.clamp(max=FLOAT_MAX)


def scale(x, temperature):
    """x / temperature; finite values stay finite, -inf stays -inf, rows of temperature 0 stay as they are."""
    temperature = torch.where(temperature > 0, temperature, 1.0)[:, None]
    scaled = (x / temperature).clamp(-FLOAT_MAX, FLOAT_MAX)
    return torch.where(x == -torch.inf, x, scaled)


def entropy_sums(shift):
    """Sums of weight and of -weight * shift of float32 [B, N] relative to a maximum, in fixed point, int64 [B] each."""
    shift = shift.clamp(min=-NEAR)
    weight = exp_reference(shift)
    dot = (shift * -weight).mul_(FIXED_ONE).long().sum(dim=1)
    return weight.mul_(FIXED_ONE).long().sum(dim=1), dot


def temperatures(x, temperature, adaptive=None, count=None):
    """What to divide edited logits [B, V] by, float32 [B]: the temperature, or where there is one the adaptive one.

    Sums are integers, and all else products and sums of float32, so every path has the same bits.

    Args:
        temperature: float32 [B]; where it is 0, nothing is adaptive.
        adaptive: float32 [4, B] or None: (form, three parameters); form 0 is none, 1 `rules.dynamic_temperature`, 2
            `rules.entropy_temperature`.
        count: [B] or None (the tokens above -inf): how many tokens the most entropy is of.
    """
    if adaptive is None:
        return temperature
    form, low, high, power = adaptive
    x = x.clamp(max=FLOAT_MAX)
    top = x.amax(dim=1, keepdim=True)
    sums = [
        entropy_sums(part - top) for part in x.split(PIECE if x.device.type == "cpu" else x.shape[1], dim=1)
    ]
    mass, dot = (sum(parts).float() for parts in zip(*sums, strict=True))
    count = (x > -torch.inf).sum(dim=1) if count is None else count
    entropy = (log_reference(mass * (1 / FIXED_ONE)) + dot / mass).clamp(min=0.0)
    share = (entropy / log_reference(count.float().clamp(min=2.0))).clamp(0.0, 1.0)
    grown = exp_reference(power * log_reference(share.clamp(min=SMALLEST)))
    grown = torch.where(share < SMALLEST, (power <= 0).float(), torch.where(power == 1, share, grown))
    dynamic = low + (high - low) * grown
    by_theta = low * exp_reference((power / entropy.clamp(min=1e-9)) * log_reference(high))
    found = torch.where(form == 1, dynamic, by_theta).clamp(1e-6, FLOAT_MAX)
    return torch.where((form > 0) & (temperature > 0), found, temperature)


def statistics(x):
    """`Statistics` of the tokens above -inf in rows of float32 [B, V]; sums are float64."""
    kept = x > -torch.inf
    top = x.amax(dim=1, keepdim=True)
    shifted = torch.where(kept, (x - top).clamp(min=-FLOAT_MAX), -torch.inf).double()
    weights = shifted.exp()
    finite = torch.where(kept, shifted, 0.0)
    mass = weights.sum(dim=1)
    count = kept.sum(dim=1)
    mean = finite.sum(dim=1) / count
    variance = torch.where(kept, (finite - mean[:, None]) ** 2, 0.0).sum(dim=1) / count
    return Statistics(
        maximum=top[:, 0],
        log_mass=(top[:, 0] + mass.log()).float(),
        entropy=(mass.log() - (weights * finite).sum(dim=1) / mass).float(),
        collision=((weights**2).sum(dim=1) / mass**2).float(),
        count=count.float(),
        mean=(top[:, 0] + mean).float(),
        deviation=variance.sqrt().float(),
    )


def threshold(x, rule):
    """The logit threshold [B] of one rule on rows [B, V]; -inf where it is off."""
    if rule.kind == "count":
        return _count_threshold(x, rule.parameter)
    if rule.kind == "mass":
        return _mass_threshold(x, rule.parameter)
    limit = rule.threshold(statistics(x), rule.parameter)
    return torch.minimum(limit, x.amax(dim=1))  # the largest token always stays; but for NaN, that keeps none


def _count_threshold(x, k):
    size = x.shape[1]
    place = k.nan_to_num().ceil().clamp(1, size).long() - 1  # 2.5 tokens are 3, as the kernels count
    limit = x.sort(dim=1, descending=True).values.gather(1, place[:, None])[:, 0]
    return torch.where((k > 0) & (k < size), limit, -torch.inf)


def _mass_threshold(x, p):
    """Keep a token iff the mass strictly above it is less than p of the whole; the largest always."""
    ordered = x.sort(dim=1, descending=True).values
    weights = (ordered - ordered[:, :1]).double().exp()
    above = weights.cumsum(dim=1) - weights
    needed = above < (p.double() * MASS_SHARE)[:, None] * weights.sum(dim=1, keepdim=True)
    last = (needed.sum(dim=1) - 1).clamp(min=0)
    return torch.where(p < 1, ordered.gather(1, last[:, None])[:, 0], -torch.inf)


def _keep_exactly(x, rule, key):
    """The k largest; of ties at the k-th the lowest ids."""
    k = rule.parameter[:, None]
    order = x.sort(dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(1, order, torch.arange(x.shape[1], device=x.device).expand_as(x))
    return (place < k) | (k <= 0)


def _keep_xtc(x, rule, key):
    """All but the tokens above the least likely one whose probability reaches the threshold."""
    if key is None:
        raise ValueError("an xtc rule tosses a coin a row: give key=(seeds, positions, streams)")
    stats = statistics(x)
    level = torch.minimum(stats.log_mass + torch.log(rule.parameter.clamp(min=1e-37)), stats.maximum)
    least = torch.where(x >= level[:, None], x, torch.inf).amin(dim=1)
    return (x <= least[:, None]) | ~(coin(*key) < rule.second)[:, None]


def _keep_typical(x, rule, key):
    """The smallest set of tokens nearest to the mean logit that has this share of the mass."""
    shift = x - x.amax(dim=1, keepdim=True)
    weights = shift.double().exp()
    mass = weights.sum(dim=1, keepdim=True)
    centre = (weights * torch.where(weights > 0, shift, 0.0)).sum(dim=1, keepdim=True) / mass
    rank = torch.where(x > -torch.inf, -(shift - centre.float()).abs(), -torch.inf)
    ordered, order = rank.sort(dim=1, descending=True)
    weights = weights.gather(1, order)
    above = weights.cumsum(dim=1) - weights
    needed = above < (rule.parameter.double() * MASS_SHARE)[:, None] * mass
    last = (needed.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return (rank >= ordered.gather(1, last)) | (rule.parameter >= 1)[:, None]


def _keep_top_h(x, rule, key):
    """The longest prefix of the sorted tokens whose entropy stays within a share of the whole's."""
    ordered = x.sort(dim=1, descending=True).values
    heavy = ordered >= ordered[:, :1] - LIGHTEST
    code = rule.second[:, None] > 0
    looked_at = ~code | (torch.arange(x.shape[1], device=x.device) < HEAD_TOKENS)
    shift = (ordered - ordered[:, :1]).double()
    weights = torch.where(looked_at, shift.exp(), 0.0)
    parts = torch.where(weights > 0, -weights * shift, 0.0)
    mass, part = weights.cumsum(dim=1), parts.cumsum(dim=1)
    whole, log_whole = mass[:, -1:], mass[:, -1:].log()
    partial = (mass * log_whole + part) / whole
    entropy = torch.where(code, partial, mass.log() + part / mass)
    limit = rule.parameter.double()[:, None] * ENTROPY_SHARE * (log_whole + part[:, -1:] / whole)
    inside = (entropy <= limit) & heavy & looked_at
    last = (inside.long().cumprod(dim=1).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    on = (rule.parameter > 0)[:, None] & (code | (rule.parameter < 1)[:, None])
    return (x >= ordered.gather(1, last)) | ~on


def tail_free_threshold(x, z):
    """The lowest logit [B, 1] that tail-free sampling by z [B, 1] keeps of rows [B, V]."""
    ordered = x.sort(dim=1, descending=True).values
    if x.shape[1] < 3:
        return ordered[:, -1:]
    curvature = (ordered - ordered[:, :1]).double().exp().diff(n=2, dim=1).abs()
    limit = z.double() * ENTROPY_SHARE * curvature.sum(dim=1, keepdim=True)
    return ordered.gather(1, (curvature.cumsum(dim=1) <= limit).sum(dim=1, keepdim=True))


def _keep_tail_free(x, rule, key):
    """The sorted tokens up to where their weights have bent by a share of the whole."""
    seen = x.topk(min(TAIL_TOKENS, x.shape[1]), dim=1).values[:, -1:]
    kept = x >= tail_free_threshold(torch.where(x >= seen, x, -torch.inf), rule.parameter[:, None])
    return (kept & (x >= seen)) | (rule.parameter >= 1)[:, None] | (x.shape[1] < 3)


KEEPS = {
    "exact_count": _keep_exactly,
    "xtc": _keep_xtc,
    "typical": _keep_typical,
    "top_h": _keep_top_h,
    "tail_free": _keep_tail_free,
}


def truncate(x, rules, key=None):
    """Apply rules in order: float32 [B, V] -> float32 [B, V] with dropped tokens at -inf.

    key: (seeds, positions, streams), int64 [B] each, for rules that toss a coin.
    """
    for rule in rules:
        if rule.kind in KEEPS:
            kept = KEEPS[rule.kind](x, rule, key)
        else:
            kept = x >= threshold(x, rule)[:, None]
        x = torch.where(kept & ~rule.senseless[:, None], x, -torch.inf)
    return x


def sample_reference(call):
    """`sample` in plain torch on any device: Call -> Drawn."""
    logits, temperature = call.logits, call.temperature
    edited = apply_edits(logits, **call.changes)
    temperature = torch.ones(len(logits), device=logits.device) if temperature is None else temperature
    greedy = temperature <= 0
    bad = ~(edited.amax(dim=1) > -torch.inf) | logits.isnan().any(dim=1)
    scaled = scale(edited, temperatures(edited, temperature, call.adaptive))
    usable = torch.where(bad[:, None], 0.0, scaled)
    left = torch.where(greedy[:, None], usable, truncate(usable, call.rules, call.key))
    tokens = draw_reference(left, *call.key, greedy)
    tokens = torch.where(bad, NO_TOKEN, torch.where(tokens < 0, NONE_KEPT, tokens))
    return describe(logits, usable, left, tokens, call.logprobs, call.n_top)


def describe(logits, usable, left, tokens, logprobs, n_top):
    """The result tuple from raw logits, edited and scaled logits, what the rules left, and the tokens."""
    result = Drawn(tokens)
    if logprobs:
        raw = torch.log_softmax(logits.float().clamp(max=FLOAT_MAX), dim=1)
        bad = tokens < 0
        at = tokens.clamp(min=0)[:, None]
        stats = statistics(left)
        shifted = torch.log_softmax(left - stats.maximum[:, None], dim=1)
        rank = 1 + (usable > usable.gather(1, at)).sum(dim=1)
        result = Drawn(
            tokens,
            raw_logprob=torch.where(bad, torch.nan, raw.gather(1, at)[:, 0]),
            logprob=torch.where(bad, torch.nan, shifted.gather(1, at)[:, 0]),
            entropy=torch.where(bad, torch.nan, stats.entropy),
            kept=torch.where(bad, 0, stats.count.long()),
            rank=torch.where(bad, 0, rank),
        )
    return with_top(result, logits, n_top) if n_top else result
