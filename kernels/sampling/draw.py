"""The draw: Gumbel-argmax over the tokens that a pipeline left, seeded per row.

The score of a token is (logit - row maximum) + g in float32, with g the noise of `philox.gumbel`; the highest
score wins, the lowest token id on ties. The maximum is subtracted before the noise is added so that a row's
offset does not cost the noise its resolution. Tokens at -inf cannot be drawn; tokens at +inf share the whole
probability.
"""

import math

import numpy as np
import torch

from .. import dispatch
from ..noise import philox
from .rules import FLOAT_MAX, Call

GUMBEL_SPAN = 26.7  # a token this far below the maximum cannot win: more than GUMBEL_MAX - GUMBEL_MIN
FEW = 1024  # candidates that get noise at once, whatever the share of the row that they are
PIECE = 49152  # tokens taken at a time, at most: what is in work stays in the cache
SAMPLE = 64  # tokens whose noise gives the first lower bound of the winning score
SLACK = 1.0001  # relative slack of the word limit: covers rounding of exp, of the noise and of the score
NO_TOKEN, NONE_KEPT = (
    -1,
    -2,
)  # of a row that holds nothing to draw, and of one of which the rules keep nothing
COIN_ID = 2**33  # the coin of a row is the noise of this token id, which no vocabulary reaches


def draw(logits, seeds, positions, streams=None, greedy=None, kernels=None):
    """Draw one token a row by Gumbel-argmax; a row's token depends on nothing outside the row.

    Args:
        logits: float32 [B, V]; -inf excludes a token.
        seeds: integers [B], or one for all rows.
        positions: integers [B] or one, absolute position of the token now drawn.
        streams: integers [B] or one, or None (all 0).
        greedy: bool [B] or None (none); a greedy row takes its highest logit, the lowest id on ties, and no
            noise.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).

    Returns:
        int64 [B], the tokens; -1 for a row that holds a NaN or nothing above -inf.

    Raises:
        ValueError: a key that is neither an integer nor one for each row.
    """
    keys = {"seeds": seeds, "positions": positions, "streams": 0 if streams is None else streams}
    seeds, positions, streams = (_key(name, value, logits) for name, value in keys.items())
    if dispatch.select("draw", logits.device, kernels) == "triton":
        from .fused import sample_fused

        temperature = None if greedy is None else (~greedy).float()
        key = {"seeds": seeds, "positions": positions, "streams": streams}
        with torch.cuda.device_of(logits):
            return sample_fused(Call(logits, **key, temperature=temperature)).tokens
    if logits.device.type != "cpu":
        return draw_reference(logits, seeds, positions, streams, greedy)
    rows = logits.detach().float().numpy()
    greedy = None if greedy is None else greedy.numpy()
    return torch.from_numpy(_draw_numpy(rows, seeds.numpy(), positions.numpy(), streams.numpy(), greedy))


def _key(name, value, logits):
    """A part of the noise's key as int64 [B] on the logits' device."""
    key = torch.as_tensor(value, device=logits.device)
    whole = not (key.is_floating_point() or key.is_complex() or key.dtype == torch.bool)
    if not whole or key.shape not in ((), logits.shape[:1]):
        raise ValueError(f"{name} are integers, one or [{len(logits)}]; got {key.dtype} {list(key.shape)}")
    return key.to(torch.int64).expand(len(logits)).contiguous()


def draw_reference(logits, seeds, positions, streams=None, greedy=None):
    """`draw` in plain torch on any device, noise for every token; this function defines the result."""
    streams = torch.zeros_like(seeds) if streams is None else streams
    ids = torch.arange(logits.shape[1], device=logits.device)
    noise = philox.gumbel_reference(seeds, positions, streams, ids)
    if greedy is not None:
        noise = torch.where(greedy[:, None], 0.0, noise)
    best = logits.amax(dim=1, keepdim=True) if logits.numel() else logits.new_empty(len(logits), 1)
    scores = (logits.clamp(max=FLOAT_MAX) - best.clamp(max=FLOAT_MAX)) + noise
    wins = scores == scores.amax(dim=1, keepdim=True)
    tokens = torch.where(wins, ids, logits.shape[1]).amin(dim=1)
    return torch.where(best[:, 0] > -torch.inf, tokens, NO_TOKEN)  # False for NaN too


def coin(seeds, positions, streams):
    """Uniform float32 [B] in [0, 1) of int64 [B] keys, the same bits on every path, independent of the draw."""
    ids = torch.full((1,), COIN_ID, device=seeds.device)
    if seeds.device.type == "cpu":
        key = (part.numpy() for part in (seeds, positions, streams))
        words = torch.from_numpy(philox.philox_words_numpy(*key, ids.numpy()).astype(np.int64))
    else:
        words = philox.philox_words_reference(seeds, positions, streams, ids)
    return (words[:, 0] >> 8).to(torch.float32) * 2.0**-24


def _draw_numpy(rows, seeds, positions, streams, greedy):
    """`draw` on NumPy arrays: noise only for the tokens that can still win."""
    tokens = np.full(len(rows), NO_TOKEN, dtype=np.int64)
    pending = []
    for index, row in enumerate(rows):
        best = row.argmax()
        top = row[best]
        if not top > -np.inf:  # True for NaN too
            continue
        if greedy is not None and greedy[index]:
            tokens[index] = best
            continue
        top = min(top, np.float32(FLOAT_MAX))
        ids = (row >= top - np.float32(GUMBEL_SPAN)).nonzero()[0]
        if len(ids) > max(len(row) // 16, FEW):
            key = seeds[index : index + 1], positions[index : index + 1], streams[index : index + 1]
            tokens[index] = draw_wide(row, top, -np.inf, *key)
            continue
        pending.append((index, ids, np.minimum(row[ids], np.float32(FLOAT_MAX)) - top))
    if pending:
        index, winners = draw_ragged(pending, seeds, positions, streams)
        tokens[index] = winners
    return tokens


def draw_ragged(pending, seeds, positions, streams):
    """Gumbel-argmax over lists of candidates.

    Args:
        pending: list of (row, ids int64 [n] ascending, logits minus their maximum float32 [n]), n >= 1.
        seeds, positions, streams: int64 arrays [B], indexed by row.

    Returns:
        (rows, tokens): two lists of the length of `pending`.
    """
    index = [row for row, _, _ in pending]
    if len(pending) == 1:
        noise = philox.gumbel_numpy(seeds[index], positions[index], streams[index], pending[0][1])
        return index, [pending[0][1][(pending[0][2] + noise[0]).argmax()]]
    ends = np.cumsum([len(ids) for _, ids, _ in pending])
    owner = np.repeat(index, np.diff(ends, prepend=0))
    ids = np.concatenate([ids for _, ids, _ in pending])
    noise = philox.gumbel_numpy(seeds[owner], positions[owner], streams[owner], ids[:, None])[:, 0]
    scores = np.concatenate([shifted for _, _, shifted in pending]) + noise
    starts = [0, *ends[:-1].tolist()]
    return index, [ids[start + scores[start:end].argmax()] for start, end in zip(starts, ends, strict=True)]


def draw_wide(row, top, floor, seeds, positions, streams):
    """The token of a row of which many can win: words for all, logarithms for few.

    With S the score of some token, token i can win only if g_i >= S - d_i (d = logit - top), which needs
    E_i <= exp(d_i - S) and, as E >= u, a word of at most 2**32 * exp(d_i - S). S is the best score of tokens near the
    top. The row is taken in pieces that stay in the cache, the one with the top first.

    Args:
        row: float32 [V]. top: its maximum, finite. floor: tokens below it cannot be drawn; at most top.
        seeds, positions, streams: int64 [1].

    Returns:
        The token id.
    """
    size = 4 * -(-len(row) // (4 * -(-len(row) // PIECE)))  # even pieces: NumPy is slow on a short one
    pieces = sorted(range(0, len(row), size), key=(row.argmax() // size * size).__ne__)
    found, bound = {}, None
    for start in pieces:
        part = row[start : start + size]
        shifted = part - top
        words = philox.philox_range_numpy(seeds, positions, streams, start, len(part))
        if bound is None:
            near = (part >= max(top - np.float32(1.0), floor)).nonzero()[0][:SAMPLE]
            scores = np.minimum(shifted[near], 0) + philox.gumbel_from_words_numpy(words[near])
            bound = scores.max() - np.float32(math.log(2.0**32 * SLACK))
        limits = np.exp(shifted - bound)
        limits += np.float32(2.0)
        if floor > -np.inf:
            limits[part < floor] = -1.0
        hits = (words.astype(np.float32) <= limits).nonzero()[0]
        found[start] = hits + start, np.minimum(shifted[hits], 0), words[hits]
    ids, shifted, words = (
        np.concatenate(parts) for parts in zip(*(found[s] for s in sorted(found)), strict=True)
    )
    return ids[(shifted + philox.gumbel_from_words_numpy(words)).argmax()]
