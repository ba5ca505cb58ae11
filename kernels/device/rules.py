"""Device side of the truncation rules that set their threshold directly.

Each takes (maximum, log_mass, entropy, collision, count, mean, deviation, parameter), float32 scalars of one
row over the tokens kept so far, and returns the logit threshold. It is called only where parameter > 0.
"""

import triton
import triton.language as tl

from ..noise.philox_triton import exact_log


@triton.jit
def min_p_threshold(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    return maximum + exact_log(tl.minimum(tl.maximum(parameter, 1e-37), 1.0))


@triton.jit
def top_n_sigma_threshold(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    return maximum - parameter * deviation


@triton.jit
def epsilon_threshold(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    return log_mass + tl.log(tl.maximum(parameter, 1e-37))


@triton.jit
def eta_threshold(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    level = tl.log(tl.maximum(parameter, 1e-37))
    return log_mass + tl.minimum(level, 0.5 * level - entropy)


@triton.jit
def top_a_threshold(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    return tl.log(tl.maximum(parameter, 1e-37)) + 2 * maximum - log_mass


@triton.jit
def p_less_threshold(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    """Parameter 1: as published; the vocabulary size, above 1: the normalised variant."""
    others = (parameter * collision - 1) / tl.maximum(parameter - 1, 1.0)
    return log_mass + tl.log(tl.maximum(tl.where(parameter > 1, others, collision), 1e-37))


@triton.jit
def mirostat_threshold(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    """Surprise of at most `parameter` bits."""
    return log_mass - parameter * 0.6931471805599453
