"""What a sampling call is asked for: truncation rules, sparse edits, and what it returns.

A truncation rule keeps the tokens of a row whose logit is at or above a threshold. The threshold is given
* by a count: keep the k largest, ties at the k-th kept, or exactly k, the lowest ids of the ties kept;
* by a mass: keep the smallest set of largest tokens with at least the share p of what the rules before left,
  ties at the boundary kept;
* directly, as a function of row statistics over the tokens that the rules before left;
* by entropy: the longest prefix of the sorted tokens whose entropy stays within a share of the whole's;
* by curvature: the sorted tokens up to where the second differences of their weights pass a share of the whole's.
Two rules may drop the largest tokens: "xtc", and "typical", which ranks by distance from the mean logit. All
others keep a row's largest token. Rules act in the order given.

Where float rounding decides: sums of weights differ by about 1e-6 of themselves between the paths. So sets
may differ only by tokens at whose place a mass is within that of its limit, an entropy within 1e-5 of its,
an XTC probability within 1e-6 of the threshold, or by two tokens on either side of the mean logit whose
distances from it differ by less than 1e-5.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..noise import philox

FLOAT_MAX = torch.finfo(torch.float32).max
MASS_SHARE = (
    1 - 2.0**-21
)  # a mass limit counts as reached this close to it: float32 cannot tell .3 + .5 from .8
ENTROPY_SHARE = 1 + 2.0**-20  # an entropy limit counts as kept this close to it
HEAD_TOKENS = 100  # tokens that the "code" form of top-H looks at
TAIL_TOKENS = 256  # tokens that tail-free sampling looks at, and ties of the last one
LIGHTEST = 24.25  # top-H leaves out tokens this far below the maximum: 2**-35 of its weight
TIES = {"keep": "count", "lowest": "exact_count"}  # what becomes of ties at the k-th -> kind of rule


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A sampling call: rows of logits, and what is asked of each; the arguments are those of `sample`.

    Every implementation (`sample_reference`, `sample_cpu`, `sample_fused`) takes one of these. `rules` holds all
    truncation rules, in order.
    """

    logits: torch.Tensor  # [B, V]
    _: dataclasses.KW_ONLY
    seeds: torch.Tensor  # int64 [B]
    positions: torch.Tensor  # int64 [B]
    streams: torch.Tensor | None = None  # int64 [B]
    temperature: torch.Tensor | None = None  # float32 [B]
    adaptive: torch.Tensor | None = None  # float32 [4, B], a temperature by the entropy, see `sample`
    rules: "tuple[Rule, ...]" = ()
    edits: "SparseEdits | Replaced | None" = None
    bitmask: torch.Tensor | None = None  # int32 [B, ceil(V / 32)]
    pointwise: "tuple[Pointwise, ...]" = ()
    logprobs: bool | str = False
    n_top: int = 0

    @property
    def key(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(seeds, positions, streams) of the noise, int64 [B] each."""
        streams = torch.zeros_like(self.seeds) if self.streams is None else self.streams
        return self.seeds, self.positions, streams

    @property
    def changes(self) -> dict[str, Any]:
        """The edits, as arguments of `reference.apply_edits`."""
        return {"edits": self.edits, "bitmask": self.bitmask, "pointwise": self.pointwise}


class Drawn(NamedTuple):
    """What `sample` returns; fields that were not asked for are None.

    A row without a drawable token (a NaN in it, or all -inf) has token -1, one of which the rules keep nothing (NaN is
    a parameter or a threshold) -2; float fields are NaN then, kept 0 and rank 0.
    """

    tokens: torch.Tensor  # int64 [B]
    raw_logprob: torch.Tensor | None = None  # float32 [B], log-softmax of the logits as given, at the token
    logprob: torch.Tensor | None = None  # float32 [B], log-softmax of what the rules left, at the token
    entropy: torch.Tensor | None = None  # float32 [B], nats, of what the rules left
    kept: torch.Tensor | None = None  # int64 [B], number of tokens that the rules left
    rank: torch.Tensor | None = None  # int64 [B], 1 + number of tokens above the drawn one after edits
    top_ids: torch.Tensor | None = None  # int64 [B, n_top], by the logits as given, lowest id first on ties
    top_logprobs: torch.Tensor | None = None  # float32 [B, n_top], log-softmax of the logits as given


def with_top(result, logits, n_top):
    """Add the log-probabilities of the n_top highest logits as given, ties by lowest id; NaN for a row with a
    NaN, or all -inf.

    Only tokens at or above the n_top-th are sorted: an exact count by id decides among its ties.
    """
    given = logits.float().clamp(max=FLOAT_MAX)
    raw = torch.log_softmax(given, dim=1)
    given = torch.where(raw.isnan().any(dim=1, keepdim=True), 0.0, given)
    kth = given.topk(n_top, dim=1).values[:, -1:]
    higher = given > kth
    room = n_top - higher.sum(dim=1, keepdim=True)
    ties = given == kth
    chosen = higher | (ties & (ties.cumsum(dim=1) <= room))
    ids = torch.arange(raw.shape[1], device=raw.device).expand_as(raw)[chosen].view(len(raw), n_top)
    order = given.gather(1, ids).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order.indices)
    return result._replace(top_ids=ids, top_logprobs=raw.gather(1, ids))


class Statistics(NamedTuple):
    """Statistics of the kept tokens of each row, float32 [B], of logits after temperature."""

    maximum: torch.Tensor
    log_mass: torch.Tensor  # log of the sum of exp(logit)
    entropy: torch.Tensor  # nats
    collision: torch.Tensor  # sum of squared probabilities
    count: torch.Tensor
    mean: torch.Tensor  # of the logits
    deviation: torch.Tensor  # standard deviation of the logits, divisor count

    def __getattr__(self, name):
        """Called for names that are none of the fields."""
        raise AttributeError(unknown_statistic(name))


def unknown_statistic(name):
    """What to say where a rule reads a statistic that there is none of."""
    return f"there is no statistic {name!r}; a rule may read {', '.join(Statistics._fields)}"


class Rule(NamedTuple):
    """A truncation rule with one parameter a row.

    Args:
        kind: "count", "exact_count", "mass", "value", "xtc", "typical", "top_h" or "tail_free".
        parameter: float32 [B]; off is k <= 0 or k >= V for a count (2.5 is 3), p >= 1 for a mass, typical and
            tail_free; <= 0 for a value rule and top_h; NaN, in `second` too, keeps nothing.
        threshold: value rules: (Statistics of [B] tensors, parameter [B]) -> logits threshold float32 [B]; NaN keeps
            nothing.
        device: value rules: the same in Triton, a @triton.jit function (maximum, log_mass, entropy,
            collision, count, mean, deviation, parameter) -> threshold, or the name of one in
            `kernels.triton_rules`. Without it the rule cannot run in the fused kernel.
    """

    kind: str
    parameter: torch.Tensor
    threshold: Callable | None = None
    device: object | None = None
    needs_statistics: bool = True  # False: `threshold` uses the maximum alone
    second: torch.Tensor | None = None  # float32 [B], the second parameter of a kind that has two

    @property
    def senseless(self):
        """bool [B], where a parameter is NaN: the rule keeps nothing."""
        found = self.parameter.isnan()
        return found if self.second is None else found | self.second.isnan()


class SparseEdits(NamedTuple):
    """Edits of listed tokens: logit + bias (-inf bans), then penalties. Ids are unique in a row; -1 is
    padding.

    `touched` has bit id % 32 of word id // 32 set for the listed ids; `touched_bits` makes it.
    """

    ids: torch.Tensor  # int32 [B, N]
    bias: torch.Tensor  # float32 [B, N]
    seen: torch.Tensor  # int32 [B, N], > 0 where the repetition penalty acts
    counts: torch.Tensor  # int32 [B, N], occurrences that presence and frequency penalties count
    repetition: torch.Tensor  # float32 [B], > 0; 1 is off
    presence: torch.Tensor  # float32 [B]; 0 is off
    frequency: torch.Tensor  # float32 [B]; 0 is off
    touched: torch.Tensor  # int32 [B, ceil(V / 32)]


class Replaced(NamedTuple):
    """New logits of listed tokens, whatever edited them. Ids are unique in a row; -1 is padding."""

    ids: torch.Tensor  # int32 [B, N]
    values: torch.Tensor  # float32 [B, N]
    touched: torch.Tensor  # int32 [B, ceil(V / 32)], as in `SparseEdits`


class Pointwise(NamedTuple):
    """An edit of each logit alone, before temperature: (logit, id, parameter) -> logit; -inf stays -inf."""

    parameter: torch.Tensor  # float32 [B]
    edit: Callable  # torch: float32 [B, V], int64 [V], float32 [B, 1] -> float32 [B, V]
    device: object | None = (
        None  # the same as a @triton.jit function of float32, int32 tiles and a float32 scalar
    )


def touched_bits(ids, vocab_size):
    """Packed bitmap of listed ids: int [B, N] unique, -1 = padding -> int32 [B, ceil(vocab_size / 32)]."""
    words = torch.zeros(len(ids), (vocab_size + 31) // 32, dtype=torch.int64, device=ids.device)
    listed = ids >= 0
    ids = ids.clamp(min=0).long()
    words.scatter_add_(1, ids >> 5, torch.where(listed, 1 << (ids & 31), 0))
    return _to_int32(words)


def pack_mask(allowed):
    """Packed bitmask of a bool [B, V] tensor: int32 [B, ceil(V / 32)], bit id % 32 of word id // 32."""
    rows, vocab_size = allowed.shape
    padded = torch.zeros(rows, (vocab_size + 31) // 32 * 32, dtype=torch.int64, device=allowed.device)
    padded[:, :vocab_size] = allowed
    bits = padded.view(rows, -1, 32) << torch.arange(32, device=allowed.device)
    return _to_int32(bits.sum(dim=-1))


def _to_int32(words):
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_mask(bitmask, vocab_size):
    """Inverse of `pack_mask`: int32 [B, ceil(V / 32)] -> bool [B, vocab_size]; tail bits are ignored."""
    bits = (bitmask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device)) & 1
    return bits.flatten(1)[:, :vocab_size].bool()


def count_tokens(tokens, starts, ends, capacity=None):
    """Distinct ids of a history with their counts in two windows, ready for `SparseEdits`.

    Args:
        tokens: int64 [B, T] history; -1 where it holds no token.
        starts: pair of int64 [B], first history index of the repetition window and of the count window.
        ends: pair of int64 [B], one past the last index of each.
        capacity: columns of the result; default T.

    Returns:
        (ids int32 [B, N], seen int32 [B, N], counts int32 [B, N]), ids ascending, padded with -1.
    """
    rows, length = tokens.shape
    order = tokens.argsort(dim=1, stable=True)
    ids = tokens.gather(1, order)
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    fresh &= ids >= 0
    slot = (fresh.cumsum(dim=1) - 1).clamp(min=0)
    width = length if capacity is None else capacity
    result = [torch.full((rows, width), -1, dtype=torch.int32, device=tokens.device)]
    result[0].scatter_reduce_(1, slot, ids.clamp(min=-1).to(torch.int32), "amax")
    for start, end in zip(starts, ends, strict=True):
        inside = (order >= start[:, None]) & (order < end[:, None]) & (ids >= 0)
        counts = torch.zeros_like(result[0])
        result.append(counts.scatter_add_(1, slot, inside.to(torch.int32)))
    return tuple(result)


def dynamic_temperature(temperature, reach, exponent):
    """A temperature from max(0, t - reach) to t + reach by (entropy / its most)**exponent, [4, B] for `sample`.

    temperature, reach, exponent: [B], >= 0. The most is the logarithm of the number of tokens above -inf (kalomaze,
    llama.cpp).
    """
    low, high = (temperature - reach).clamp(min=0.0), temperature + reach
    return torch.stack([torch.ones_like(low), low, high, exponent]).float()


def entropy_temperature(temperature, base, theta):
    """A temperature t * base**(theta / entropy), [4, B] for `sample`; base (0, 1] (arXiv 2403.14541)."""
    return torch.stack([torch.full_like(temperature, 2.0), temperature, base, theta]).float()


def top_k(k, ties="keep"):
    """Keep the k largest logits; k int or float [B], <= 0 or >= V is off.

    Args:
        ties: "keep" keeps all ties of the k-th; "lowest" keeps exactly k tokens, of the ties those with the
            lowest ids.

    Raises:
        ValueError: ties is neither.
    """
    if ties not in TIES:
        raise ValueError(f"ties={ties!r}: expected one of {', '.join(map(repr, TIES))}")
    return Rule(TIES[ties], k.to(torch.float32))


def top_p(p):
    """Keep the smallest set of largest tokens of mass >= p, ties kept; p [B], >= 1 is off (1904.09751)."""
    return Rule("mass", p.to(torch.float32))


def typical(p):
    """Keep the tokens nearest to the mean logit, in surprise to the entropy, until their mass is >= p; ties
    kept; p [B], >= 1 is off (arXiv 2202.00666)."""
    return Rule("typical", p.to(torch.float32))


def xtc(threshold, chance):
    """With a chance, drop all tokens with p >= threshold but the least likely of them and its ties.

    threshold, chance [B]; chance <= 0 is off. A row's coin is `draw.coin`, independent of its draw
    (p-e-w, 2024).
    """
    return Rule("xtc", threshold.to(torch.float32), second=chance.to(torch.float32))


def top_h(alpha, code=None):
    """Keep the longest prefix of the sorted tokens with entropy <= alpha times the row's (arXiv 2509.02510).

    Args:
        alpha: [B]; <= 0 is off, >= 1 too unless `code`.
        code: [B] or None, > 0 for the form of the authors' code: the prefix's part of the entropy of the 100
            most likely tokens, against alpha times that entropy. Otherwise the entropy of the prefix
            renormalised. Ties of the last token are kept in both.
    """
    code = torch.zeros_like(alpha) if code is None else code
    return Rule("top_h", alpha.to(torch.float32), second=code.to(torch.float32))


def tail_free(z):
    """Keep the sorted tokens while the |second differences| of their weights sum to at most z of the whole sum; z [B],
    >= 1 is off (Bricken 2019).

    Of what the rules before left it looks at the TAIL_TOKENS most likely and the ties of the last one, and keeps no
    others: behind a count of at most so many, these are all.
    """
    return Rule("tail_free", z.to(torch.float32))


def min_p(p):
    """Keep tokens at least p times as probable as the likeliest; p [B], <= 0 is off (arXiv 2407.01082)."""
    return Rule("value", p.to(torch.float32), _min_p_threshold, "min_p_threshold", False)


def _min_p_threshold(statistics, parameter):
    floor = philox.log_reference(parameter.clamp(min=1e-37, max=1.0))
    return torch.where(parameter > 0, statistics.maximum + floor, -torch.inf)


def top_n_sigma(n):
    """Keep logits within n standard deviations of the maximum; n [B], <= 0 is off (arXiv 2411.07641)."""
    return Rule("value", n.to(torch.float32), _top_n_sigma_threshold, "top_n_sigma_threshold")


def _top_n_sigma_threshold(statistics, parameter):
    return torch.where(parameter > 0, statistics.maximum - parameter * statistics.deviation, -torch.inf)


def epsilon(cutoff):
    """Keep tokens of probability >= cutoff; cutoff [B], <= 0 is off (arXiv 2210.15191)."""
    return Rule("value", cutoff.to(torch.float32), _epsilon_threshold, "epsilon_threshold")


def _epsilon_threshold(statistics, parameter):
    floor = statistics.log_mass + torch.log(parameter.clamp(min=1e-37))
    return torch.where(parameter > 0, floor, -torch.inf)


def eta(cutoff):
    """Keep p >= min(cutoff, sqrt(cutoff) * exp(-entropy)); cutoff [B], <= 0 is off (arXiv 2210.15191)."""
    return Rule("value", cutoff.to(torch.float32), _eta_threshold, "eta_threshold")


def _eta_threshold(statistics, parameter):
    level = torch.log(parameter.clamp(min=1e-37))
    floor = statistics.log_mass + torch.minimum(level, 0.5 * level - statistics.entropy)
    return torch.where(parameter > 0, floor, -torch.inf)


def top_a(a):
    """Keep p >= a * (largest p)**2; a [B], <= 0 is off (KoboldAI, 2022)."""
    return Rule("value", a.to(torch.float32), _top_a_threshold, "top_a_threshold")


def _top_a_threshold(statistics, parameter):
    floor = torch.log(parameter.clamp(min=1e-37)) + 2 * statistics.maximum - statistics.log_mass
    return torch.where(parameter > 0, floor, -torch.inf)


def p_less(on):
    """Keep p >= the collision probability, the sum of p**2; on [B], 0 is off (arXiv 2509.23234)."""
    return Rule("value", on.to(torch.float32), _p_less_threshold, "p_less_threshold")


def _p_less_threshold(statistics, parameter):
    floor = statistics.log_mass + torch.log(statistics.collision)
    return torch.where(parameter > 0, floor, -torch.inf)
