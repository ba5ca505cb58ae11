"""Drafts from texts that were seen: prompt lookup (Saxena 2023) and suffix decoding (arXiv 2411.04975)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from ....errors import ParameterError


def prompt_lookup(tokens: list[int], count: int, max_ngram: int = 3) -> list[int]:
    """What followed the last few tokens when they occurred before; [] if they never did (Saxena 2023).

    Args:
        tokens: ids of one sequence, prompt included.
        count: how many tokens are wanted, >= 0; fewer come back where the text ends.
        max_ngram: longest run of tokens to look for; shorter ones are tried after it.

    The latest occurrence that has `count` tokens behind it wins, else the earliest.
    """
    last = tokens[-1] if tokens else None
    ends = [i + 1 for i, token in enumerate(tokens[:-1]) if token == last]
    for size in range(2, max_ngram + 1):
        longer = [end for end in ends if end >= size and tokens[end - size] == tokens[-size]]
        if not longer:
            break
        ends = longer
    end = max((end for end in ends if end + count <= len(tokens)), default=ends[0] if ends else len(tokens))
    return tokens[end : end + count]


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
