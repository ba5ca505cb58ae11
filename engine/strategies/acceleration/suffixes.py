"""Drafts from texts that were seen: suffix decoding (arXiv 2411.04975) and Jacobi trajectories (arXiv 2402.02057)."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence

from ...errors import ParameterError


class SuffixDraft:
    """Drafts for `speculative` of what followed the longest known end of a row, in all texts that were seen.

    Unlike `prompt_lookup` it remembers other requests' texts, counts what followed, and drafts as far as it is sure:
    each token with its share of the continuations, as long as their product is at least `least`.

    Args:
        texts: token ids of texts to begin with, such as earlier outputs.
        longest: longest end that is looked up, >= 1.
        least: probability of a draft by counts, 0 to 1; 0 drafts whatever was seen.
    """

    def __init__(self, texts: Sequence[Sequence[int]] = (), *, longest: int = 16, least: float = 0.1):
        if longest < 1 or not 0 <= least <= 1:
            raise ParameterError(
                f"suffix decoding takes longest >= 1 and least in [0, 1], got {longest}, {least}"
            )
        self.longest, self.least = longest, least
        self.after: dict[tuple, Counter] = defaultdict(
            Counter
        )  # end of a text -> what followed it, and how often
        for text in texts:
            self.add(text)

    def add(self, text: Sequence[int], start: int = 0) -> None:
        """Remember a text from its token `start` on."""
        text = list(text)
        for at in range(max(1, start), len(text)):
            for size in range(1, min(self.longest, at) + 1):
                self.after[tuple(text[at - size : at])][text[at]] += 1

    def __call__(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` draft tokens behind a row."""
        own = SuffixDraft(longest=self.longest)
        own.add(tokens)
        text, drafted, sure = list(tokens), [], 1.0
        while len(drafted) < count:
            seen = self._seen(own, text)
            if not seen:
                break
            token, hits = max(seen.items(), key=lambda pair: (pair[1], -pair[0]))
            sure *= hits / seen.total()
            if sure < self.least:
                break
            drafted.append(token)
            text.append(token)
        return drafted

    def _seen(self, own: SuffixDraft, text: list[int]) -> Counter:
        for size in range(min(self.longest, len(text)), 0, -1):
            end = tuple(text[-size:])
            found = self.after.get(end, Counter()) + own.after.get(end, Counter())
            if found:
                return found
        return Counter()


class JacobiDraft:
    """Drafts for `speculative` of the model's own guesses: a pass over a wrong draft still says what would follow.

    The most probable tokens behind a rejected draft are n-grams that the model is about to say (the trajectory of a
    Jacobi iteration); a pool of them, by their first token, is what lookahead decoding verifies. No second model, and
    no extra rows: a guess costs nothing but its place in the next pass.

    Args:
        size: n-grams kept for each first token, >= 1.
    """

    def __init__(self, size: int = 8):
        if size < 1:
            raise ParameterError(f"a pool keeps size >= 1 n-grams, got {size}")
        self.size = size
        self.pool: dict[int, OrderedDict[tuple[int, ...], None]] = defaultdict(OrderedDict)

    def observe(self, tokens: list[int], draft: list[int], best: list[int]) -> None:
        """After a pass over a row's last token and its draft: `best` is what the model would say behind each."""
        for at in range(len(best) - 1):
            grams = self.pool[best[at]]
            grams[tuple(best[at + 1 :])] = None
            grams.move_to_end(tuple(best[at + 1 :]))
            if len(grams) > self.size:
                grams.popitem(last=False)

    def __call__(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` draft tokens behind a row; before anything was guessed, its last token again."""
        grams = self.pool.get(tokens[-1])
        found = list(next(reversed(grams))) if grams else []
        while found and len(found) < count and self.pool.get(found[-1]):
            found += next(reversed(self.pool[found[-1]]))
        return (found or [tokens[-1]] * count)[:count]
