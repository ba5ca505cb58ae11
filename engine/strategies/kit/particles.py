"""Particles: weighted samples of a prompt, their effective number, and which of them go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...loop.generation import Event, Generation
from ...loop.request import Request


def normalised(log_weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1; equal ones where all are 0 (-inf)."""
    top = max(log_weights)
    if top == -math.inf:
        return [1 / len(log_weights)] * len(log_weights)
    weights = [math.exp(w - top) for w in log_weights]
    total = math.fsum(weights)
    return [w / total for w in weights]


def log_mean(log_weights: Sequence[float]) -> float:
    """Logarithm of the mean weight; -inf where all are 0."""
    top = max(log_weights)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(w - top) for w in log_weights) / len(log_weights))


def effective(log_weights: Sequence[float]) -> float:
    """Effective sample size, 1 / sum of squared weights: from 1 to their number."""
    return 1 / math.fsum(w * w for w in normalised(log_weights))


def systematic(weights: Sequence[float], u: float) -> list[int]:
    """Systematic resampling: how often each one comes differs from weight * number by less than 1.

    Args:
        weights: that sum to 1. u: uniform in [0, 1).

    Returns:
        As many indices, ascending.
    """
    count, picked, reached, index = len(weights), [], weights[0], 0
    for i in range(count):
        while (i + u) / count >= reached and index < count - 1:
            index += 1
            reached += weights[index]
        picked.append(index)
    return picked


@dataclass(eq=False)
class Particle:
    """One of a prompt's weighted sequences; `weight` and `twist` are logarithms, `result` comes when it ends."""

    request: Request
    weight: float = 0.0
    twist: float = 0.0
    result: Generation | None = None

    def fork(self) -> Particle:
        """A copy of weight 1 that goes on by itself."""
        result = self.result and replace(self.result, extra=dict(self.result.extra))
        return Particle(self.request.fork(), 0.0, self.twist, result)

    def weigh(self, event: Event, gained: float, twist: float) -> None:
        """After its next token: `gained` is log p^alpha / q, and the twist takes the place of the one before."""
        dead = event.finish == "error" or twist == -math.inf
        self.result = event.generation
        self.weight += -math.inf if dead else gained + twist - self.twist
        self.twist = twist


class Cloud:
    """The n particles of one prompt.

        cloud = Cloud([request.fork() for _ in range(8)])
        for slot in cloud.live():
            cloud.particles[slot].weigh(event, gained=0.2, twist=0.0)
        ancestors = cloud.resample(threshold=0.5, u=0.3)  # slot i goes on from what slot ancestors[i] was

    Args:
        requests: running ones, one for each particle.
    """

    def __init__(self, requests: Sequence[Request]):
        self.particles = [Particle(request) for request in requests]
        self.evidence, self.resampled = 0.0, 0

    def live(self) -> list[int]:
        """The slots that go on."""
        return [slot for slot, particle in enumerate(self.particles) if particle.result is None]

    def resample(self, threshold: float, u: float) -> list[int]:
        """Resample if the effective number is below threshold n; the ancestor of each slot, which else is its own."""
        weights = [particle.weight for particle in self.particles]
        if not self.live() or max(weights) == -math.inf or effective(weights) >= threshold * len(weights):
            return list(range(len(weights)))
        ancestors = systematic(normalised(weights), u)
        self.evidence, self.resampled = self.evidence + log_mean(weights), self.resampled + 1
        self.particles = [self.particles[ancestor].fork() for ancestor in ancestors]
        return ancestors

    def results(self) -> list[Generation]:
        """Its particles with the `extra` "weight", "log_evidence" and "resampled"."""
        weights = [particle.weight for particle in self.particles]
        told = {"log_evidence": self.evidence + log_mean(weights), "resampled": self.resampled}
        for slot, (particle, weight) in enumerate(zip(self.particles, normalised(weights), strict=True)):
            particle.result.sample = slot
            particle.result.extra |= {"weight": weight, **told}
        return [particle.result for particle in self.particles]
