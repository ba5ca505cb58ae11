"""The decode step as one device program: draw, append, stop test and forward, captured and replayed on CUDA."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from .batch import IDLE, Batch, Step
from .feed import Feed
from .pipeline import Context

log = logging.getLogger("handloom")


@dataclass
class Captured:
    """A recorded step: the graph, and the tensors it reads that may be replaced between replays."""

    graph: Any
    leaves: list[torch.Tensor]
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    alive: list = field(default_factory=list)  # what the graph reads but nobody else may hold


class GraphBatch(Batch):
    """A Batch whose step never asks the host anything; the host looks at it one step late.

    Every tensor keeps its address. EOS, stop ids and lengths end a row on the device; stop strings, criteria and
    time are seen late, and the step drawn meanwhile is dropped. Without CUDA the same program runs uncaptured.
    """

    lag = 1

    def __init__(self, engine, size: int, width: int):
        super().__init__(engine, size, width)
        self.captured: dict[tuple, Captured] = {}
        self.memory_pool = torch.cuda.graph_pool_handle() if self.on_cuda else None
        self.refused: set[tuple] = set()
        self.failures: dict[int, str] = {}

    @property
    def on_cuda(self) -> bool:
        """Whether there is anything to capture with."""
        return self.positions.device.type == "cuda"

    # -- what the host does

    @torch.no_grad()
    def draw(self) -> Step:
        """Start one whole step, forward pass included; its results are on their way when this returns."""
        live = self._live()
        key = self._key(live)
        whole = self._capturable()
        best = self._best_buffers()
        if not self.on_cuda or key in self.refused:
            self._sample(best)
            self._advance()
        else:
            if not whole:
                self._sample(best)
            if key not in self.captured:
                self._capture(key, live, best, whole)
            if key in self.captured:
                best = self._replay(self.captured[key], live)
            else:
                self._sample(best) if whole else None
                self._advance()
        for slot in self.running:
            self.lengths[slot] += 1
        return self._send(best)

    def feed(self) -> None:
        """Nothing: `draw` has fed the tokens already."""

    def _send(self, best) -> Step:
        if not self.on_cuda:
            best = best and tuple(t.clone() for t in best)
            return Step(list(self.requests), self.results.clone(), best, failures=self.failures)
        results = torch.empty(self.results.shape, dtype=self.results.dtype, pin_memory=True)
        results.copy_(self.results, non_blocking=True)
        if best is not None:
            best = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in best), best
            for target, source in zip(*best, strict=True):
                target.copy_(source, non_blocking=True)
            best = best[0]
        ready = torch.cuda.Event()
        ready.record()
        return Step(list(self.requests), results, best, ready, self.failures)

    # -- the device program

    def context(self) -> Context:
        """As in `Batch`, with the whole history: its width may not change between replays."""
        context = super().context()
        context.tokens = self.history
        return context

    def _sample(self, best) -> None:
        """Draw a token for every slot; memory is updated where it lies."""
        context = self.context()
        drawn = self.sampler.sample(self.logits, context)
        self.failures = context.cache.get("failures", {})
        advanced = self.sampler.accept(drawn.tokens, context, every_row=True)
        for old, new in zip(self.sampler.active(), advanced.active(), strict=True):
            _overwrite(old, new)
        self.results.copy_(torch.stack((drawn.tokens, drawn.raw_logprobs, drawn.logprobs), 1))
        self.tokens.copy_(drawn.tokens)
        if best is not None:
            top = self.logits.log_softmax(-1).topk(best[0].shape[1])
            best[0].copy_(top.indices)
            best[1].copy_(top.values)

    def _advance(self) -> None:
        """Append the tokens, run the model over all slots, and move the rows that go on."""
        self.history.scatter_(1, self.positions, self.tokens[:, None])
        self.logits.copy_(self.model.forward(self._feed(), self.cache).logits[:, -1])
        stopped = (self.tokens[:, None] == self.stops).any(1, keepdim=True)
        stopped |= self.positions + 1 >= self.limits
        self.active.masked_fill_(stopped, 0)
        self.positions.add_(self.active)

    def _feed(self) -> Feed:
        on_host = self.positions.device.type == "cpu"
        rows = [IDLE if row is None or not row.table.blocks else row.table.blocks for row in self.rows]
        lengths = [min(n + 1, len(blocks) * self.block) for n, blocks in zip(self.lengths, rows, strict=True)]
        return Feed(
            ids=self.tokens[:, None],
            positions=self.positions,
            cells=self.cells.gather(1, self.positions),
            tables=rows if on_host else (),
            lengths=lengths if on_host else (),
            block_table=self.table[:, : self._blocks()],
            cell_counts=self.positions[:, 0] + 1,
        )

    def _blocks(self) -> int:
        """Width of the block table that the step reads: all of it, or a power of two where cells are gathered."""
        if self.model.path == "attention":
            return self.table.shape[1]
        needed = max(self.lengths) // self.block + 1
        return min(self.table.shape[1], 1 << (needed - 1).bit_length())

    # -- capture

    def _capturable(self) -> bool:
        """Whether the pipeline is device work alone; a Python processor splits the graph at its place."""
        return all(member.processor.kind != "opaque" for member in self.sampler.active())

    def _live(self) -> list:
        """Everything of the pipeline that a step reads, in a fixed order."""
        members = self.sampler.active()
        values = [(m.processor.name, m.ready(self.sampler.site), m.memory) for m in members]
        plan = None if all(self.sampler.greedy) else self.sampler.plan()
        return [values, plan, self.sampler.greedy_rows()]

    def _key(self, live) -> tuple:
        shape = (
            self._blocks(),
            self.pool.capacity,
            tuple(self.stops.shape),
            self._top_count(),
            self.cache is None,
        )
        return (*shape, *(_describe(leaf) for leaf in _flatten(live)))

    def _best_buffers(self):
        count = self._top_count()
        if count is None:
            return None
        ids = torch.zeros(self.size, count, dtype=torch.long, device=self.logits.device)
        return ids, torch.zeros(self.size, count, device=self.logits.device)

    def _capture(self, key, live, best, whole: bool) -> None:
        leaves = [leaf for leaf in _flatten(live) if torch.is_tensor(leaf)]
        graph = torch.cuda.CUDAGraph()
        try:
            self._warm_up(best, whole, leaves)
            with torch.cuda.graph(graph, pool=self.memory_pool):
                if whole:
                    self._sample(best)
                self._advance()
        except (RuntimeError, torch.AcceleratorError) as error:
            self.refused.add(key)
            log.warning("the decode step runs uncaptured: %s", str(error).split("\n")[0])
            return
        self.captured[key] = Captured(graph, leaves, best if whole else None, [live])

    def _warm_up(self, best, whole, leaves) -> None:
        """Run the step twice on another stream, as capture demands, and put back what it changed."""
        changed = [self.logits, self.tokens, self.results, self.positions, self.active, self.history, *leaves]
        changed += [] if self.cache is None else list(self.cache.states())
        saved = [t.clone() for t in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                if whole:
                    self._sample(best)
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, old in zip(changed, saved, strict=True):
            tensor.copy_(old)

    def _replay(self, step: Captured, live):
        """Bring the graph's tensors up to date, make them the pipeline's own, and run it."""
        fresh = iter(leaf for leaf in _flatten(live) if torch.is_tensor(leaf))
        for mine, new in zip(step.leaves, fresh, strict=True):
            if mine is not new:
                mine.copy_(new)
        held = step.alive[0]
        for member, (_, values, memory) in zip(self.sampler.active(), held[0], strict=True):
            member.values, member.memory = values, memory
        self.sampler._plan, self.sampler._greedy_tensor = held[1], held[2]
        step.graph.replay()
        return step.best


def _overwrite(old, new) -> None:
    """Put a member's new memory into the tensors that hold the old one."""
    if old.memory is None or old.memory is new.memory:
        return
    if not isinstance(old.memory, dict):
        old.memory = new.memory
        return
    for name, tensor in old.memory.items():
        tensor.copy_(new.memory[name])


def _flatten(value) -> list:
    """The tensors and constants inside nested containers, in a fixed order."""
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        return [leaf for name in sorted(value) for leaf in (name, *_flatten(value[name]))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _flatten(item)]
    if hasattr(value, "__dataclass_fields__"):
        return _flatten(vars(value))
    return [value]


def _describe(leaf):
    """What must not change for a graph to be replayed: shape and dtype of a tensor, a constant itself."""
    if torch.is_tensor(leaf):
        return tuple(leaf.shape), leaf.dtype
    return leaf if leaf is None or isinstance(leaf, str | int | float | bool) else id(leaf)
