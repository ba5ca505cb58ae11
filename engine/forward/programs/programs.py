"""Programs: passes that are recorded once for a shape, on buffers that stay where they are, and replayed."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

log = logging.getLogger("handloom")


class Programs:
    """What is recorded of one kind of pass: found by its key, made when nobody waits, dropped when it is stale.

    A pass that is not recorded runs as it is, on the stream that recordings are made on, so that its kernels are
    compiled and its libraries set up; it is recorded by `catch_up`, after its results are on their way. What was
    dropped with the place of its cells has run before: `again` records it without another run, and it is replayed.

    Args:
        recorder: what records, see `capture.recorder_for`.
        pool: the block pool that the passes read and write; where its cells move, everything is dropped.
        most: how many are kept; the one unused longest goes first.
        what: their name in messages.
    """

    def __init__(self, recorder, pool, most: int, what: str):
        self.recorder, self.pool, self.most, self.what = recorder, pool, most, what
        self.refused: dict[Hashable, str] = {}  # passes that cannot be recorded, and why
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.due: OrderedDict[Hashable, Callable[[], Any]] = OrderedDict()  # what waits for being recorded
        self._wanted: Counter = Counter()
        self._dropped: set[Hashable] = set()  # what was recorded before cells moved, and not again since
        self._moves = -1

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Hashable) -> Any:
        """What was recorded under a key, or None."""
        if self.moved():
            return None
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    @torch.no_grad()
    def again(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was dropped under a key, recorded anew by `make`, see `run`; None where there was nothing."""
        if key not in self._dropped:
            return None
        self._dropped.remove(key)
        self.pool.clean()  # blocks are zeroed once, not at every replay
        try:
            made = make()
        except RuntimeError as error:  # so it runs, and is recorded as for the first time
            log.info("%s is run before it is recorded again: %s", self.what, root_of(error))
            return None
        if made is not None:
            self._keep(key, made)
        return made

    def moved(self) -> bool:
        """Whether the pool's cells have moved since the last look; what wrote to the old place is gone then."""
        if self._moves == self.pool.moves:
            return False
        self.forget()
        self._moves = self.pool.moves
        return True

    def forget(self) -> None:
        """Drop everything."""
        if self._kept:
            self.recorder.settle()
        self._dropped |= self._kept.keys()
        self._kept.clear()
        self.due.clear()

    def run(
        self, key: Hashable, program: Callable[[], None], make: Callable[[], Any], worth: int = 1
    ) -> None:
        """Run what is not recorded, and remember to record it.

        Args:
            program: the pass.
            make: gives what `find` shall find, by `record`, or None where that has become impossible.
            worth: it is recorded when it has run so many times.
        """
        self.recorder.warm_up(program)
        self._wanted[key] += 1
        if self._wanted[key] >= worth and key not in self.refused:
            self.due[key] = make

    def _keep(self, key: Hashable, made: Any) -> None:
        self._kept[key] = made
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)

    @torch.no_grad()
    def catch_up(self) -> None:
        """Record what is due."""
        self.pool.clean()  # blocks are zeroed once, not at every replay
        while self.due:
            key, make = self.due.popitem(last=False)
            try:
                made = make()
            except RuntimeError as error:  # out of memory too: as it is, it runs
                self.refused[key] = root_of(error)
                log.warning("%s runs uncaptured: %s", self.what, self.refused[key])
                continue
            if made is not None:
                self._keep(key, made)


def root_of(error: BaseException) -> str:
    """First line of what went wrong first: ending a spoilt capture raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().split("\n")[0] or type(error).__name__


def bucket(count: int, steps: int = 4, least: int = 16) -> int:
    """The next size at or above `count` of those that divide every doubling, from `least` on, into equal `steps`."""
    if count <= least:
        return least
    step = max(1, (1 << (count - 1).bit_length() - 1) // steps)
    return -(-count // step) * step
