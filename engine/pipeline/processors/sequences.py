"""Constraints that depend on the end of the text or on the place in the output."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache.transfer import upload
from ...errors import ParameterError
from ..forms import NEG_INF, Context, Edit
from .constraints import check_ids, id_table, packed_rows
from .repeats import recent

ANY = -1


def as_sequence(name: str, sequence, vocab_size: int) -> tuple[int, ...]:
    """A non-empty tuple of token ids; raises ParameterError for anything else."""
    if isinstance(sequence, str):
        raise ParameterError(
            f"{name} holds the string {sequence!r}; params.resolve(tokenizer) turns it into ids"
        )
    sequence = (sequence,) if isinstance(sequence, int) else tuple(int(i) for i in sequence)
    if not sequence:
        raise ParameterError(f"{name} holds an empty sequence")
    check_ids(name, sequence, vocab_size)
    return sequence


class SequenceBias(Edit):
    """Add a bias to the last token of a sequence when the text ends with the rest of it: `{(ids): bias}`.

    As Hugging Face's: a sequence of one token is biased always; biases with the same last token add up. Off
    when empty.
    """

    name = "sequence_bias"
    defaults = {"sequence_bias": {}}
    needs_history = True
    identity_when_off = True

    def on(self, settings):
        return bool(settings[self.fields[0]])

    def table(self, settings, context: Context) -> dict[tuple[int, ...], float]:
        """The biased sequences of one row."""
        given = settings["sequence_bias"] or {}
        return {as_sequence(self.name, ids, context.vocab_size): float(bias) for ids, bias in given.items()}

    def pack(self, rows, context):
        tables = [self.table(row, context) for row in rows]
        count = max([1, *map(len, tables)])
        depth = max([0, *(len(ids) - 1 for table in tables for ids in table)])
        prefix = torch.full((len(rows), count, depth), ANY)
        last = torch.full((len(rows), count), context.vocab_size)
        bias = torch.zeros(len(rows), count)
        for i, table in enumerate(tables):
            for j, (ids, value) in enumerate(table.items()):
                last[i, j], bias[i, j] = ids[-1], value
                for k, token in enumerate(reversed(ids[:-1])):
                    prefix[i, j, k] = token
        packed = {"prefix": prefix, "last": last, "bias": bias}
        return {name: tensor.to(context.device) for name, tensor in packed.items()}

    def listed(self, context: Context) -> Tensor:
        """The last tokens of the sequences whose other tokens the text ends with."""
        v = context.values
        if not v.prefix.shape[-1]:
            return v.last
        newest = recent(context, v.prefix.shape[-1])[:, None]
        return torch.where(((v.prefix == newest) | (v.prefix == ANY)).all(-1), v.last, context.vocab_size)

    def write(self, buffer: Tensor, ids: Tensor, context: Context) -> None:
        buffer.scatter_add_(1, ids, context.values.bias)


class BadWords(SequenceBias):
    """Never complete one of these token sequences. Off when empty.

    `spare_eos`: ignore sequences that are a single end-of-sequence token, as Hugging Face does.
    """

    name = "bad_words"
    defaults = {"bad_words": (), "spare_eos": False, "eos_token_ids": None}

    def table(self, settings, context: Context) -> dict[tuple[int, ...], float]:
        words = [as_sequence(self.name, word, context.vocab_size) for word in settings["bad_words"] or ()]
        spared = context.ends(settings) if settings["spare_eos"] else ()
        return {word: NEG_INF for word in words if len(word) > 1 or word[0] not in spared}


class ForcedTokens(Edit):
    """Force tokens at places of the output: `{position from 0: token id}`. Off when empty."""

    name = "forced_tokens"
    defaults = {"forced_tokens": {}}

    def on(self, settings):
        return bool(settings["forced_tokens"])

    def pack(self, rows, context):
        tables = [dict(row["forced_tokens"] or {}) for row in rows]
        ids = [list(map(int, table.values())) for table in tables]
        for row in ids:
            check_ids(self.name, row, context.vocab_size)
        places = id_table([list(map(int, table)) for table in tables], context.device, -1)
        return {"places": places, "ids": id_table(ids, context.device, 0)}

    def now(self, context: Context) -> Tensor:
        """Which of a row's places is the one now drawn, [B, K] bool."""
        return context.values.places == context.output_lengths[:, None]

    def mask(self, context: Context) -> Tensor:
        """Nothing where a token is forced, and else everything; `change` puts that token back."""
        words = -(-context.vocab_size // 32)
        return torch.where(self.now(context).any(-1, keepdim=True), 0, -1).to(torch.int32).expand(-1, words)

    def exclude(self, buffer: Tensor, context: Context) -> None:
        buffer.masked_fill_(self.now(context).any(-1, keepdim=True), NEG_INF)

    def listed(self, context: Context) -> Tensor:
        now = self.now(context)
        token = (context.values.ids * now).sum(-1, keepdim=True)
        return torch.where(now.any(-1, keepdim=True), token, context.vocab_size)

    def change(self, values: Tensor, ids: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(values)


class ExponentialDecay(Edit):
    """Raise the end-of-sequence logits more and more after `start` output tokens (Hugging Face): with n
    tokens beyond it, logit += |logit| * (factor^n - 1). Off at None.
    """

    name = "exponential_decay"
    defaults = {"exponential_decay": None, "eos_token_ids": None}
    identity_when_off = True

    def pack(self, rows, context):
        pairs = [row["exponential_decay"] or (0, 1.0) for row in rows]
        ends = [context.ends(row) for row in rows]
        return {
            "start": upload([[int(start)] for start, _ in pairs], context.device, None),
            "factor": upload([[float(factor)] for _, factor in pairs], context.device, None),
            "eos": id_table(ends, context.device, context.vocab_size)[:, : max(map(len, ends))],
        }

    def listed(self, context: Context) -> Tensor:
        return context.values.eos

    def change(self, values: Tensor, ids: Tensor, context: Context) -> Tensor:
        v = context.values
        beyond = (context.output_lengths[:, None] - v.start).clamp(min=0)
        gain = values.abs() * (v.factor**beyond - 1)
        return torch.where(values.isfinite(), values + gain, values)


class PrefixFunction(Edit):
    """Ask a function which tokens may follow: `prefix_fn(sample index, ids [T] of the text) -> allowed ids`.

    The sample index is the row's stream. Called for every row and step on the host. A row for which nothing
    is allowed is left without a token, which ends it with an error. Off at None.
    """

    name = "prefix_fn"
    kind = "opaque"  # asks the host at every step
    defaults = {"prefix_fn": None}
    needs_history = True
    speculative_safe = False
    identity_when_off = True

    def pack(self, rows, context):
        return {"functions": [row["prefix_fn"] for row in rows]}

    def answers(self, context: Context) -> list[list[int] | None]:
        """The ids that each row's function allows, None for rows without one; none at all where it raised."""
        lengths = context.lengths.tolist()
        streams = [0] * len(lengths) if context.streams is None else context.streams.tolist()
        found: list[list[int] | None] = []
        for row, function in enumerate(context.values.functions):
            if function is None:
                found.append(None)
                continue
            try:
                allowed = function(streams[row], context.history[row, : lengths[row]])
                found.append(check_ids(self.name, allowed, context.vocab_size))
            except Exception as error:  # noqa: BLE001 - one request's function must not take the others with it
                context.fail(row, f"prefix_fn raised {type(error).__name__}: {error}")
                found.append([])
        return found

    def mask(self, context: Context) -> Tensor:
        answers = self.answers(context)
        words = packed_rows([ids or () for ids in answers], context.vocab_size, context.lengths.device)
        free = upload([[ids is None] for ids in answers], words.device, None)
        return torch.where(free, -1, words)

    def exclude(self, buffer: Tensor, context: Context) -> None:
        for row, allowed in enumerate(self.answers(context)):
            if allowed is not None:
                kept = buffer[row, allowed]
                buffer[row] = NEG_INF
                buffer[row, allowed] = kept
