"""laws: what must hold of a strategy, an engine or a processor, as checks to run on your own."""

from .enumeration import chi_square, exact_distribution, sequence_law
from .laws import (
    batch_equals_solo,
    cached_equals_naive,
    fork_and_rewind_equal_replay,
    lossless,
    temperature_zero_is_argmax,
)
from .processors import check_processor

__all__ = [
    "batch_equals_solo",
    "cached_equals_naive",
    "check_processor",
    "chi_square",
    "exact_distribution",
    "fork_and_rewind_equal_replay",
    "lossless",
    "sequence_law",
    "temperature_zero_is_argmax",
]
