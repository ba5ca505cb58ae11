"""What the server counts, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..loop.generation import Generation
from .worker import Worker

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds


class Metrics:
    """Counters of one server.

    Args:
        worker: whose queue is looked at when somebody asks.
    """

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self.answers = self._made(Counter, "requests", "Requests by path and status.", ["path", "status"])
        self.samples = self._made(Counter, "samples", "Samples by how they ended.", ["finish"])
        self.prompt = self._made(Counter, "prompt_tokens", "Prompt tokens of finished samples.")
        self.output = self._made(Counter, "output_tokens", "Tokens generated.")
        self.first = self._made(Histogram, "first_token_seconds", "To the first token.", buckets=BUCKETS)
        self.total = self._made(Histogram, "sample_seconds", "To the last token.", buckets=BUCKETS)
        pool = worker.engine.pool
        for name, text, value in (
            ("samples_pending", "Samples that run or wait.", lambda: worker.pending),
            # as they were counted last: counting is for the threads that compute
            (
                "blocks_in_use",
                "Blocks of the key/value pool in use.",
                lambda: len(pool.refs) - pool.refs.count(0),
            ),
            ("blocks_cached", "Blocks that hold known prefixes.", lambda: len(pool._idle)),
        ):
            self._made(Gauge, name, text).set_function(value)

    def _made(self, kind, name: str, text: str, labels=(), **options):
        return kind(f"handloom_{name}", text, labels, registry=self.registry, **options)

    def ended(self, result: Generation) -> None:
        """Count one finished sample."""
        self.samples.labels(result.finish_reason).inc()
        self.prompt.inc(len(result.prompt_token_ids))
        self.output.inc(result.n_new)
        if result.n_new:
            self.first.observe(result.timings.first_token)
        self.total.observe(result.timings.total)

    def text(self) -> bytes:
        """Everything, as a scraper reads it."""
        return generate_latest(self.registry)
