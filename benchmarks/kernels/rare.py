"""How often rare tokens are drawn, over as many trials as their probabilities ask for: coarse noise would lose them.

A trial is a position: the draw of `kernels.sampling` among four tokens, one of which has nearly all of the mass. Their
noise is one Philox call, so a thousand million trials take minutes on one core. Which of the others can win follows
from its word alone; for those the exact noise and scores decide, as in every implementation of the draw.
"""

import math

import numpy as np

from handloom.kernels.noise import philox

PROBABILITIES = (1e-6, 1e-7, 3e-8)  # of the rare tokens, relative to the common one
PIECE = 16384  # trials at a time: what is in work stays in the cache
LARGEST = math.exp(-philox.GUMBEL_MIN) * 1.001  # exponential noise is at most this
SEED = 5


def drawn(trials: int, probabilities: tuple[float, ...] = PROBABILITIES, first: int = 0) -> np.ndarray:
    """How often each rare token was drawn in so many trials, int64 [3], at positions from `first` on."""
    gaps = np.log(np.array(probabilities)).astype(np.float32)
    words_most = np.array(probabilities) * (LARGEST * 2.0**32) + 2
    counter, hits = np.zeros((1, 1), np.uint64), np.zeros(len(gaps), np.int64)
    for start in range(first, first + trials, PIECE):
        positions = np.arange(start, min(start + PIECE, first + trials))
        seeds, streams = np.full_like(positions, SEED), np.zeros_like(positions)
        even, odd = philox.philox_lanes_numpy(seeds, positions, streams, counter)
        near = [(words <= most).nonzero()[0] for words, most in zip(
            (odd[0, :, 0], even[1, :, 0], odd[1, :, 0]), words_most, strict=True)]  # fmt: skip
        index = np.unique(np.concatenate(near))
        noise = philox.gumbel_numpy(seeds[index], positions[index], streams[index], np.arange(4))
        scores = noise + np.concatenate([np.zeros(1, np.float32), gaps])
        hits += np.bincount(scores.argmax(axis=1), minlength=4)[1:]
    return hits


def expected(trials: int, probabilities: tuple[float, ...] = PROBABILITIES) -> np.ndarray:
    """The number that the law has, float64 [3]."""
    return trials * np.array(probabilities) / (1 + sum(probabilities))
