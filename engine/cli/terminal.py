"""What the command line shows of a result: its statistics in one line, its log-probabilities in a table."""

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..loop.generation import Generation

ALTERNATIVES = 5  # columns of a table at most; the records have all that were asked for


def statistics(generation: "Generation") -> str:
    """Tokens, speed, time to first token and finish reason of one sample, in one line."""
    times = generation.timings
    parts = [f"{generation.n_new} token{'' if generation.n_new == 1 else 's'}"]
    if times.tokens_per_second:
        parts.append(f"{times.tokens_per_second:.1f} tokens/s")
    parts += [f"first token after {times.first_token:.2f} s", f"finished: {reason(generation)}"]
    return " · ".join(parts)


def reason(generation: "Generation") -> str:
    """Why a sample ended, as `stop ("###")`, `length` or `error (...)`."""
    if generation.finish_reason == "error":
        return f"error ({generation.error})"
    if generation.finish_reason == "eos" or generation.stop_reason is None:
        return str(generation.finish_reason)
    return f"{generation.finish_reason} ({generation.stop_reason!r})"


def probabilities(generation: "Generation", tokenizer: Any) -> Table:
    """One row a token: probability after and before the pipeline, and the most probable alternatives."""
    width = min(ALTERNATIVES, max((len(top) for top in generation.top_logprobs or []), default=0))
    table = Table(*("token", "p", "raw p"), *["alternatives"] * bool(width), box=None, pad_edge=False)
    tops = generation.top_logprobs or [{}] * generation.n_new
    rows = zip(generation.token_ids, generation.logprobs, generation.raw_logprobs, tops, strict=True)
    for token, processed, raw, top in rows:
        best = sorted(top.items(), key=lambda pair: -pair[1])[:width]
        shown = "  ".join(f"{_token(other, tokenizer)} {_percent(logprob)}" for other, logprob in best)
        cells = [_token(token, tokenizer), _percent(processed), _percent(raw), *[shown] * bool(width)]
        table.add_row(*map(Text, cells))
    return table


def _token(token: int, tokenizer: Any) -> str:
    return str(token) if tokenizer is None else repr(tokenizer.decode([token]))


def _percent(logprob: float) -> str:
    return "?" if math.isnan(logprob) else f"{math.exp(logprob):.1%}"
