"""`sample` on the CPU: the tokens of the reference, from a few passes over each row and never a full sort.

The first rule that is on decides which tokens matter. A count needs only the tokens above a bound taken from
maxima of groups; a mass finds its boundary by a histogram of weights, refined inside the crossing bin; all
later rules work on the few candidates left. Noise is made for survivors alone.
"""

import functools
import math

import numpy as np
import torch

from ..noise import philox
from .draw import FEW, NO_TOKEN, NONE_KEPT, coin, draw_ragged, draw_wide
from .keep_cpu import KEEPS, keep_exactly, keep_tail_free
from .reference import apply_edits, temperatures
from .rules import FLOAT_MAX, MASS_SHARE, Drawn, Statistics, unknown_statistic, with_top

GROUPS = 512  # group maxima taken per row before a count limit
BINS = 4096
PIECE = 8192  # values binned at a time, so that what is in work stays in the cache
SORT_BELOW = 4096  # candidates that are sorted rather than binned
WEIGHT_SPAN = 64.0  # tokens further below the maximum share the last bin


@np.errstate(over="ignore")  # a finite mask lies further from the maximum than a float32 reaches: -inf
def sample_cpu(call):
    """`sample` for CPU tensors: Call -> Drawn."""
    logits, rules, temperature = call.logits, call.rules, call.temperature
    if call.edits is None and call.bitmask is None and not call.pointwise:
        rows = logits.detach().float().numpy()
    else:
        hidden = logits.isnan().any(dim=1)  # a ban must not hide a NaN
        rows = apply_edits(logits.detach(), **call.changes)
        rows = rows.masked_fill_(hidden[:, None], torch.nan).numpy()
    temperature = torch.ones(len(rows)) if temperature is None else temperature
    temperature = temperatures(torch.from_numpy(rows), temperature, call.adaptive).numpy()
    key = tuple(part.numpy() for part in call.key)
    parameters = [rule.parameter.numpy() for rule in rules]
    seconds = [rule.parameter.numpy() if rule.second is None else rule.second.numpy() for rule in rules]
    tossed = any(rule.kind == "xtc" for rule in rules)
    coins = coin(*call.key).numpy() if tossed else None
    drawn = [None] * len(rows)
    pending = []
    for index, row in enumerate(rows):
        drawn[index] = left = _Row(row, temperature[index])
        if left.bad or left.greedy:
            continue
        for rule, values, others in zip(rules, parameters, seconds, strict=True):
            if math.isnan(values[index]) or math.isnan(others[index]):
                left.lose()
            elif rule.kind in KEEPS:
                left.choose(KEEPS[rule.kind], values[index], others[index], coins[index] if tossed else None)
            else:
                left.apply(rule, values[index])
            if left.bad:
                break
        if left.bad:
            continue
        if left.wide:
            left.token = draw_wide(*left.pool(), *(part[index : index + 1] for part in key))
        else:
            pending.append((index, *left.candidates()))
    tokens = np.array([left.token for left in drawn], dtype=np.int64)
    if pending:
        index, winners = draw_ragged(pending, *key)
        tokens[index] = winners
    result = Drawn(torch.from_numpy(tokens))
    if call.logprobs == "chosen":
        chosen = [left.logprob(token) for left, token in zip(drawn, tokens, strict=True)]
        result = result._replace(logprob=torch.from_numpy(np.array(chosen, dtype=np.float32)))
    elif call.logprobs:
        result = _describe(logits, drawn, tokens)
    return with_top(result, logits, call.n_top) if call.n_top else result


class _Row:
    """One row on its way through the rules: candidates (all tokens while `ids` is None) and their logits."""

    def __init__(self, row, temperature):
        best = row.argmax() if len(row) else 0
        self.top = row[best] if len(row) else -np.inf
        self.bad = not self.top > -np.inf  # True for NaN too: argmax stops at the first one
        self.greedy = not temperature > 0
        self.token = NO_TOKEN if self.bad else best
        self.full = self.values = row
        self.ids = None
        self.limit = -np.inf  # candidates are the tokens at or above it
        self.whole = True  # all of them
        if self.bad:
            return
        if self.top > FLOAT_MAX:
            self.full = self.values = np.minimum(row, np.float32(FLOAT_MAX))
        if not self.greedy and temperature != 1:
            self.full = self.values = _scale(self.values, self.values[best], temperature)
        self.top = self.values[best]

    def apply(self, rule, parameter):
        """Narrow the candidates by one rule; `parameter` is a float32 scalar."""
        if rule.kind == "count":
            if 0 < parameter < len(self.full):
                self._count(math.ceil(parameter))
        elif rule.kind == "mass":
            if parameter < 1:
                self.keep(_mass_limit(self.values, self.top, float(parameter)))
        elif rule.device == "min_p_threshold":
            if parameter > 0:
                self.keep(min(self.top + _log(float(parameter)), self.top))
        else:
            limit = rule.threshold(self.statistics(), torch.tensor([parameter])).numpy()[0]
            if limit != limit:
                self.lose()
            else:
                self.keep(min(limit, self.top))

    def lose(self):
        """Keep nothing: no token reaches NaN."""
        self.bad, self.token = True, NONE_KEPT

    def _count(self, k):
        if self.ids is None:
            self.keep(_count_bound(self.values, k))
        if k < len(self.values):
            self.keep(np.partition(self.values, -k)[-k])

    def choose(self, keep, parameter, second, coin):
        """Narrow the candidates by a rule of `keep_cpu`; what it drops need not be the lowest."""
        if keep is keep_exactly:  # the fast way to few candidates; then ties are cut
            if not 0 < parameter < len(self.full):
                return
            self._count(math.ceil(parameter))
        second = len(self.full) if keep is keep_tail_free else second
        kept = keep(self.values, self.top, parameter, second, coin)
        if kept is None or kept.all():
            return
        chosen = kept.nonzero()[0]
        self.ids = chosen if self.ids is None else self.ids[chosen]
        self.values = self.values[chosen]
        self.top = self.values.max()
        self.whole = False

    def keep(self, limit):
        """Keep candidates at or above a limit."""
        if not limit > -np.inf:
            return
        self.limit = max(self.limit, limit)
        chosen = (self.values >= limit).nonzero()[0]
        if len(chosen) == len(self.values):
            return
        self.ids = chosen if self.ids is None else self.ids[chosen]
        self.values = self.values[chosen]

    def statistics(self):
        """Statistics of the candidates, each made when it is asked for."""
        values = self.values if self.values.min() > -np.inf else self.values[self.values > -np.inf]
        return _Statistics(values, self.top)

    def logprob(self, token):
        """Log-probability of a token among the candidates; NaN for a row without a drawable token."""
        if self.bad:
            return np.nan
        return self.full[token] - self.top - np.log(np.exp(self.values - self.top).sum())

    @property
    def wide(self):
        """Whether so many candidates are left that noise for all of them is made in another way."""
        return len(self.values) > max(len(self.full) // 16, FEW)

    def pool(self):
        """(row in which tokens at or above the limit are the candidates, its maximum, the limit)."""
        pool = self.full
        if not self.whole:
            pool = np.full_like(self.full, -np.inf)
            pool[self.ids] = self.values
        return pool, self.top, self.limit

    def candidates(self):
        """(ids ascending, logits minus their maximum) of the candidates."""
        return np.arange(len(self.values)) if self.ids is None else self.ids, self.values - self.top


class _Statistics:
    """The fields of `Statistics`, tensors of one element, each made when it is asked for."""

    def __init__(self, values, top):
        self.values, self.top = values, top

    def __getattr__(self, name):
        """Called the first time a field is asked for."""
        if name not in Statistics._fields:
            raise AttributeError(unknown_statistic(name))
        field = torch.tensor([getattr(self, "_" + name)()], dtype=torch.float32)
        setattr(self, name, field)
        return field

    @functools.cached_property
    def shifted(self):
        """Logits minus their maximum, float64."""
        return self.values.astype(np.float64) - self.top

    @functools.cached_property
    def weights(self):
        """Probabilities relative to the largest, float64."""
        return np.exp(self.shifted)

    @functools.cached_property
    def mass(self):
        """Sum of the weights, float64."""
        return self.weights.sum()

    def _maximum(self):
        return self.top

    def _log_mass(self):
        return self.top + np.log(self.mass)

    def _entropy(self):
        return np.log(self.mass) - self.weights @ self.shifted / self.mass

    def _collision(self):
        return self.weights @ self.weights / self.mass**2

    def _count(self):
        return len(self.values)

    def _mean(self):
        return self.top + self.shifted.mean()

    def _deviation(self):
        return np.sqrt(((self.shifted - self.shifted.mean()) ** 2).mean())


@functools.lru_cache(maxsize=256)
def _log(share):
    """The exact float32 logarithm of a min-p parameter, with the bits of the kernels."""
    return philox.log_numpy(np.clip(np.float32(share), np.float32(1e-37), np.float32(1.0))[None])[0]


def _scale(values, top, temperature):
    """values / temperature; finite values stay finite and -inf stays -inf."""
    with np.errstate(over="ignore", invalid="ignore"):  # -inf / inf is put right below
        scaled = values / np.float32(temperature)
    ends = FLOAT_MAX * min(float(temperature), 1.0)
    if temperature >= 1 and temperature < np.inf:
        return scaled
    if temperature < np.inf and top <= ends and values.min() >= -ends:
        return scaled
    excluded = values == -np.inf
    np.clip(scaled, -np.float32(FLOAT_MAX), np.float32(FLOAT_MAX), out=scaled)
    scaled[excluded] = -np.inf
    return scaled


def _count_bound(values, k):
    """A lower bound of the k-th largest value: the k-th largest of disjoint groups' maxima."""
    width = len(values) // max(GROUPS, 2 * k)
    if width < 4:
        return -np.inf
    groups = len(values) // width
    maxima = values[: groups * width].reshape(width, groups).max(axis=0)
    return np.partition(maxima, -k)[-k]


def _mass_limit(values, top, share):
    """Smallest kept value when the smallest set of largest values with this share of the mass is kept.

    Values are binned by distance from the top; the bin in which the mass crosses the limit is binned again by
    its own range until it is small or of equal values.
    """
    above, limit = 0.0, None
    low, high = max(float(values.min() - top), -WEIGHT_SPAN), 0.0
    while len(values) > SORT_BELOW and high > low:
        bins, mass = _binned(values, top, low, high)
        limit = share * MASS_SHARE * mass.sum() if limit is None else limit
        total = above + np.cumsum(mass)
        crossing = min(int(np.searchsorted(total, limit)), BINS - 1)
        above = total[crossing] - mass[crossing]
        inside = (bins == crossing).nonzero()[0]
        if len(inside) == len(values):
            break
        values = values[inside]
        low, high = float(values.min() - top), float(values.max() - top)
    order = np.argsort(-values)
    ordered = np.exp((values[order] - top).astype(np.float64))
    limit = share * MASS_SHARE * ordered.sum() if limit is None else limit
    before = above + np.cumsum(ordered) - ordered
    last = max(int(np.searchsorted(before, limit)) - 1, 0)
    return values[order[last]]


def _binned(values, top, low, high):
    """Bin of each value, by distance from the top between -high and -low, and the weight in each bin."""
    bins = np.empty(len(values), dtype=np.int16)
    mass = np.zeros(BINS)
    scale = np.float32((BINS - 1) / (high - low))
    for start in range(0, len(values), PIECE):
        shifted = values[start : start + PIECE] - top
        weights = np.exp(shifted, dtype=np.float64)
        place = np.clip((np.float32(high) - shifted) * scale, 0, BINS - 1).astype(np.intp)
        bins[start : start + PIECE] = place
        mass += np.bincount(place, weights=weights, minlength=BINS)
    return bins, mass


def _describe(logits, drawn, tokens):
    raw = logits.detach().float().numpy()
    floats = np.full((3, len(drawn)), np.nan, dtype=np.float32)
    counts = np.zeros((2, len(drawn)), dtype=np.int64)
    for index, (left, token) in enumerate(zip(drawn, tokens, strict=True)):
        if left.bad:
            continue
        stats = left.statistics()
        value = left.full[token]
        given = _log_probability(raw[index], token)
        floats[:, index] = given, (value - left.top) - np.log(stats.mass), stats.entropy[0]
        counts[:, index] = stats.count[0], 1 + np.count_nonzero(left.full > value)
    floats, counts = torch.from_numpy(floats), torch.from_numpy(counts)
    return Drawn(torch.from_numpy(tokens), floats[0], floats[1], floats[2], counts[0], counts[1])


def _log_probability(row, token):
    """Log-softmax of one row at a token; +inf counts as the largest float."""
    top = row.max()
    if top > FLOAT_MAX:
        row, top = np.minimum(row, np.float32(FLOAT_MAX)), np.float32(FLOAT_MAX)
    return (row[token] - top) - np.log(np.exp(row - top).sum(dtype=np.float64))
