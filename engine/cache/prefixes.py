"""Prefixes: which full blocks hold the beginnings of prompts, so that a prompt that begins alike finds them."""

from __future__ import annotations

from collections.abc import Sequence


class Prefixes:
    """An index from (the block before, the tokens of a block) to the block that holds them.

    Args:
        size: tokens in a block.
    """

    def __init__(self, size: int):
        self.size = size
        self.blocks: dict[tuple[int, tuple[int, ...]], int] = {}
        self.keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._uids: dict[int, int] = {}  # a block's number can be given again, what stands behind it not
        self._next_uid = 1

    def __contains__(self, block: int) -> bool:
        return block in self.keys

    def match(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Blocks that hold the longest known prefix of `tokens`, leaving at least one token to compute."""
        found, parent = [], 0
        for start in range(0, len(tokens) - self.size, self.size):
            block = self.blocks.get((parent, tuple(tokens[start : start + self.size])))
            if block is None:
                break
            found.append(block)
            parent = self._uids[block]
        return tuple(found)

    def add(self, blocks: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Make the full blocks of `tokens` known; those that were not are returned."""
        added, parent = [], 0
        for i in range(len(tokens) // self.size):
            key = (parent, tuple(tokens[i * self.size : (i + 1) * self.size]))
            if key not in self.blocks:
                if blocks[i] in self:  # known behind a twin that is gone by now
                    del self.blocks[self.keys[blocks[i]]]
                self.blocks[key], self.keys[blocks[i]] = blocks[i], key
                self._uids[blocks[i]] = self._next_uid
                self._next_uid += 1
                added.append(blocks[i])
            parent = self._uids[self.blocks[key]]
        return added

    def remove(self, block: int) -> None:
        """Forget what a block holds."""
        del self.blocks[self.keys.pop(block)], self._uids[block]

    def clear(self) -> None:
        """Forget everything."""
        for index in (self.blocks, self.keys, self._uids):
            index.clear()

    def check(self) -> None:
        """Raise AssertionError unless the index agrees with itself."""
        assert set(self.blocks.values()) == set(self.keys) == set(self._uids), "prefix index out of step"
